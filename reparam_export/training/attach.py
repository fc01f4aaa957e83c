"""Trainable adapters on the linear layers of a frozen model, and our own checkpoint format of what was trained.

    attach()      each targeted layer now runs its kind's ``apply``: what is trained is what is folded and proven later
    trainable()   how many numbers an optimizer would change
    save()        adapters, trained tensors and the base in one file, which ``reparam_export.read`` takes as it is

A kind can be trained when it has a function in ``INITIAL``: the Params it starts from, with which it changes nothing.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam_export.adapters import hydra, kind, lora, repadapter
from reparam_export.affine import Affine, Bottleneck, map_tensors, tensors_of
from reparam_export.assembly import tied_names
from reparam_export.checkpoints import NATIVE
from reparam_export.checkpoints.native import BASES, to_plain
from reparam_export.errors import FusionError, SharedWeightError, UsageError
from reparam_export.files import PICKLES
from reparam_export.layouts import layout_of, matrix
from reparam_export.models import split_argument

READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # may use a child's weight without calling it


class Frozen(Affine):
    """The base layer's own map, computed by the same torch function as in the layer, so that its bits are the same."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Attached(nn.Module):
    """A frozen linear layer with a trainable adapter: x (..., in) -> (..., out) is ``kind.apply(x, base, params)``.

    ``weight`` and ``bias`` are the layer's own, under their own names; the adapter's tensors are in ``adapter``.
    """

    def __init__(self, layer: nn.Module, layout: str, kind_name: str, params: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix(layer.weight, layout).shape[::-1]  # type: ignore[arg-type]
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)
        self.layout, self.kind = layout, kind_name
        self.adapter = nn.ParameterDict({_key(name): tensor for name, tensor in tensors_of(params).items()})
        self._fields = map_tensors(params, lambda t: t.to("meta"))  # how the tensors of ``adapter`` make up Params

    def params(self) -> Any:
        """The kind's Params as they are now; gradients flow through them."""
        tensors = iter([self.adapter[_key(name)] for name in tensors_of(self._fields)])
        return map_tensors(self._fields, lambda _: next(tensors))

    def forward(self, x: Tensor) -> Tensor:
        base = Frozen(matrix(self.weight, self.layout), self.bias)  # type: ignore[arg-type]
        y: Tensor = kind(self.kind).apply(x, base, self.params())
        return y


def attach(
    model: nn.Module, kind: str, targets: str | Sequence[str], *, train: str | Sequence[str] = (), **settings: Any
) -> nn.Module:
    """Put a trainable adapter on every linear layer that a target names; changes ``model`` and returns it.

    kind: "hydra" (rank, scale=1.0, branches="both", "parallel" or "sequential", bias=True), "lora" (rank, scale=1.0) or
    "repadapter" (rank, scale=1.0, bias=True). targets, train: module names, ``*`` and ``?`` as in file names.
    All else is frozen but the modules in ``train`` (a new head), with everything inside them. Before training the model
    gives the base's outputs bit for bit. Adapters are drawn from torch's global generator, in the layer's dtype.
    Raises UsageError (unknown kind or setting, a name that matches nothing, a layer that cannot be adapted),
    SharedWeightError (a tied weight).
    """
    initial = _initial(kind, settings)
    layers = _targeted(model, _listed(targets))
    _check_shared(model, layers)
    trained = _trained_modules(model, _listed(train))
    attached = {name: _attached(model, name, kind, initial) for name in layers}
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    for name, module in attached.items():
        module.weight.requires_grad_(False)
        if module.bias is not None:
            module.bias.requires_grad_(False)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return model


def trainable(model: nn.Module) -> int:
    """The number of trainable parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save(model: nn.Module, path: str | Path, *, base: str | None, base_state: bool | None = None) -> None:
    """Write the trained model to ``path`` (.pt), as our own format; the file appears whole or not at all.

    base: spec of the plain base, "timm:...", "hf:..." or "open_clip:..."; None: to be given when it is read.
    base_state: put the frozen base's tensors into the file, under the plain base's names; default: for a timm base
    without pretrained=true, which exists nowhere else. ``replaced`` are the trained modules and running statistics.
    Raises UsageError for a model without adapters, a base or an ending that cannot be read back.
    """
    path = Path(path)
    attached = {name: module for name, module in model.named_modules() if isinstance(module, Attached)}
    if not attached:
        raise UsageError(f"{path}: the model has no adapter to save; expected one that attach() was called on")
    if not path.name.endswith(PICKLES):
        raise UsageError(f"{path}: expected a name that ends in {', '.join(PICKLES)}; found {path.name!r}")
    if base is not None and not base.startswith(BASES):
        raise UsageError(f"base {base!r}: expected {', '.join(BASES)} or None; give any other when reading, as --base")
    with_base = _exists_nowhere_else(base) if base_state is None else base_state
    own = {f"{name}.adapter.{tensor}" for name, module in attached.items() for tensor in module.adapter}
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if name not in own}
    replaced = {name: state[name] for name in _trained_tensors(model) if name in state}
    content = {
        "format": NATIVE,
        "base": base,
        "base_state": {name: t for name, t in state.items() if name not in replaced} if with_base else None,
        "adapters": [
            {
                "module": name,
                "kind": module.kind,
                "rows": None,
                "params": to_plain(map_tensors(module.params(), Tensor.cpu)),
            }
            for name, module in attached.items()
        ],
        "replaced": replaced,
        "notes": [],
    }
    _write(path, content)


def hydra_params(
    base: Affine, rank: int, scale: float = 1.0, branches: str = "both", bias: bool = True
) -> hydra.Params:
    """As the authors' vtab1k code: down xavier uniform, up and biases zero. Raises UsageError for unknown branches."""
    if branches not in ("both", "parallel", "sequential"):
        raise UsageError(f"branches {branches!r}: expected 'both', 'parallel' or 'sequential'")
    out = base.out_features
    parallel = None if branches == "sequential" else _pair(base, rank, base.in_features, out, bias)
    sequential = None if branches == "parallel" else _pair(base, rank, out, out, bias)
    return hydra.Params(parallel, sequential, float(scale), float(scale))


def lora_params(base: Affine, rank: int, scale: float = 1.0) -> lora.Params:
    """As the authors' loralib: down kaiming uniform with a = sqrt(5), up zero, no biases."""
    pair = _pair(base, rank, base.in_features, base.out_features, False, partial(nn.init.kaiming_uniform_, a=5**0.5))
    return lora.Params(pair, float(scale))


def repadapter_params(base: Affine, rank: int, scale: float = 1.0, bias: bool = True) -> repadapter.Params:
    """As the authors' code with one group: down xavier uniform, up zero, biases zero."""
    return repadapter.Params(_pair(base, rank, base.in_features, base.in_features, bias), float(scale))


INITIAL: Mapping[str, Callable[..., Any]] = {
    "hydra": hydra_params,
    "lora": lora_params,
    "repadapter": repadapter_params,
}


def _pair(
    base: Affine,
    rank: int,
    in_features: int,
    out_features: int,
    bias: bool,
    draw: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_,
) -> Bottleneck:
    """A low-rank pair with a random way down and a zero way up, in the dtype and on the device of the base."""
    like = base.weight
    down = draw(like.new_empty(rank, in_features))
    return Bottleneck(
        Affine(down, like.new_zeros(rank) if bias else None),
        Affine(like.new_zeros(out_features, rank), like.new_zeros(out_features) if bias else None),
    )


def _key(name: str) -> str:
    return name.replace(".", "_")  # the name of a parameter holds no dot


def _initial(kind_name: str, settings: Mapping[str, Any]) -> Callable[[Affine], Any]:
    """The kind's first Params as a function of the base layer. Raises UsageError for the kind or its settings."""
    if kind_name not in INITIAL:
        raise UsageError(f"kind {kind_name!r} cannot be trained here; there are: {', '.join(INITIAL)}")
    make = INITIAL[kind_name]
    try:
        inspect.signature(make).bind(None, **settings)
    except TypeError as error:
        known = list(inspect.signature(make).parameters)[1:]
        raise UsageError(f"kind {kind_name!r}: {error}; its settings are {', '.join(known)}") from error
    rank = settings["rank"]
    if not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank {rank!r}: expected a whole number of at least 1")
    return lambda base: make(base, **settings)


def _attached(model: nn.Module, name: str, kind_name: str, initial: Callable[[Affine], Any]) -> Attached:
    layer = model.get_submodule(name)
    layout = layout_of(name, layer)
    bias = getattr(layer, "bias", None)
    base = Affine(matrix(layer.weight.detach(), layout), None if bias is None else bias.detach())  # type: ignore[operator]
    return Attached(layer, layout, kind_name, initial(base))


def _targeted(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The linear layers that the patterns name. Raises UsageError for a pattern without any."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if _is_linear(name, module)]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in linear if fnmatchcase(name, pattern)]
        if not found:
            others = [f"{n} ({type(m).__name__})" for n, m in modules.items() if n and fnmatchcase(n, pattern)]
            what = f"matches no linear layer, only {', '.join(others[:3])}" if others else "matches no module"
            raise UsageError(f"target {pattern!r} {what}; {_nearest(pattern, linear)}")
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise UsageError("no targets; name the linear layers to adapt, such as 'blocks.*.attn.proj'")
    for name in chosen:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, READS_WEIGHTS):
            raise UsageError(
                f"{name}: {type(parent).__name__} reads this layer's weight without calling the layer, so an adapter "
                "on it would have no effect; choose another target"
            )
    return list(chosen)


def _is_linear(name: str, module: nn.Module) -> bool:
    """A layer with a plain float matrix that multiplies the last axis of its input, and no adapter yet."""
    try:
        plain = bool(name) and layout_of(name, module) in ("linear", "transposed")
    except FusionError:
        return False
    weight = module._parameters.get("weight")
    return plain and weight is not None and weight.is_floating_point()


def _check_shared(model: nn.Module, layers: Iterable[str]) -> None:
    tied = tied_names(model)
    for name in layers:
        if f"{name}.weight" in tied:
            owners = tied[f"{name}.weight"]
            raise SharedWeightError(
                f"{' and '.join(owners)} are one tensor: folding an adapter into it would change both; choose another "
                "target, or untie them first",
                tensor=f"{name}.weight",
                owners=owners,
            )


def _trained_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The modules that are trained whole. Raises UsageError for a pattern that matches none with a parameter."""
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    chosen: list[str] = []
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise UsageError(f"train {pattern!r} matches no module with parameters; {_nearest(pattern, names)}")
        chosen += found
    return chosen


def _trained_tensors(model: nn.Module) -> list[str]:
    """What training changes besides the adapters: parameters with gradients, and running statistics."""
    trained = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad]
    running = [name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return trained + running


def _exists_nowhere_else(base: str | None) -> bool:
    scheme, _, argument = (base or "").partition(":")
    return scheme == "timm" and not split_argument(argument)[1].get("pretrained", False)


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _nearest(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern.replace("*", "0"), names, n=3, cutoff=0.4)
    return f"nearest names: {', '.join(near or names[:3]) or 'none'}"


def _write(path: Path, content: object) -> None:
    """A reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
