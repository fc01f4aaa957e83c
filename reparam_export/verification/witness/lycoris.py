"""LyCORIS on its own files and kohya's: its modules, made of the file's tensors around a base of their own, held against our adapters.

    numbers    each layer's answers, with the real base layer inside
    whole      the outputs of the whole unfused model with all of them in it, where our reference has any

Which module a name means is found here once more: the dots of the module's name as underscores, after a prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint
from reparam_export.checkpoints._folder import weights_file
from reparam_export.errors import MissingBackendError
from reparam_export.models import first_line
from reparam_export.state import load_state
from reparam_export.verification.certificate import WitnessEvidence
from reparam_export.verification.witness import Subject, UnableError
from reparam_export.verification.witness._layers import BOUND, answer, error, inputs_of, unfused
from reparam_export.verification.witness._whole import whole_parted

if TYPE_CHECKING:
    from torch import nn

LOOKS_AT = "files of LyCORIS and kohya"
PREFIXES = ("lycoris_", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_")


def accepts(checkpoint: Checkpoint) -> bool:
    """One such file, put on alone and whole."""
    return checkpoint.format == "lycoris" and not checkpoint.members and checkpoint.recipe.weight == 1


def testify(subject: Subject) -> WitnessEvidence:
    """Raises MissingBackendError without lycoris, UnableError for a file that it cannot load on this base."""
    package = _import()
    if subject.numbers is not None:
        raise UnableError(
            "LyCORIS' modules need the numbers of the base; they bear witness when the whole model is verified"
        )
    model = subject.fresh().double()
    theirs = _applied(package, _state(subject.checkpoint), model)
    ours = {a.module for a in subject.checkpoint.adapters}
    differences = [f"{name}: we adapt it, LyCORIS does not" for name in sorted(ours - set(theirs))]
    differences += [
        f"{name}: LyCORIS adapts it ({type(theirs[name]).__name__}), we do not" for name in sorted(set(theirs) - ours)
    ]
    worst, tried = 0.0, 0
    for name in sorted(ours & set(theirs)):
        parted = _number(name, model, subject)
        if parted is None:
            continue
        tried, worst = tried + 1, max(worst, parted)
        if not parted <= BOUND:
            differences.append(
                f"{name}: the answers of LyCORIS' {type(theirs[name]).__name__} and ours differ by {parted:.2g} of what the adapter does "
                f"there (at most {BOUND:g} is rounding)"
            )
    whole = whole_parted(model, subject, "LyCORIS")
    return WitnessEvidence(
        who="LyCORIS",
        version=_version(),
        settings=len(ours & set(theirs)),
        layers=tried,
        of_layers=len(ours),
        seed=subject.seed,
        error=worst,
        bound=BOUND,
        outputs=whole.outputs,
        output_error=whole.error,
        output_bound=whole.bound,
        differences=(*differences, *whole.differences),
    )


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The file's tensors, those of the one model that was chosen of several, without what was dropped by name."""
    part = f"lora_{checkpoint.settings['part']}_" if "part" in checkpoint.settings else ""
    state = load_state(weights_file(checkpoint.path))
    return {n: t for n, t in state.items() if n.startswith(part) and n not in checkpoint.dropped}


def _import() -> Any:
    try:
        import lycoris.modules
    except ImportError as error:
        raise MissingBackendError(
            "the package lycoris is not installed; pip install 'reparam-export[lycoris]'",
            package="lycoris-lora",
            extra="lycoris",
        ) from error
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return lycoris.modules


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lycoris-lora")


def _applied(package: Any, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """LyCORIS' modules by the base's names; the model answers with them from now on. Raises UnableError."""
    found = {}
    for stem, name in _modules(list(dict.fromkeys(key.partition(".")[0] for key in state)), model).items():
        found[name] = _module(package, state, stem, model.get_submodule(name))
    return found


def _modules(stems: Sequence[str], model: nn.Module) -> dict[str, str]:
    """The base's module of each of LyCORIS' names. Raises UnableError.

    The names of one prefix are those of one model: the base itself, or one that stands in it under some attribute.
    """
    models: dict[str, list[str]] = {}
    for stem in stems:
        models.setdefault(max((p for p in PREFIXES if stem.startswith(p)), key=len, default=""), []).append(stem)
    found: dict[str, str] = {}
    for prefix, own in models.items():
        rests = {stem: stem.removeprefix(prefix) for stem in own}
        places = [_inside(inner, name, rests) for name, inner in model.named_modules()]
        fits = [place for place in places if place is not None]
        fits = fits[:1] if places[0] is not None else fits  # LyCORIS' own way: around the model itself
        if len(fits) != 1:
            raise UnableError(f"LyCORIS' own names {own[0]}, ... are those of {len(fits) or 'no'} models in the base")
        found |= fits[0]
    return found


def _inside(inner: nn.Module, at: str, rests: Mapping[str, str]) -> dict[str, str] | None:
    """The names by which one of the base's parts has every one of these; None where it has not, or has two of one name."""
    named: dict[str, list[str]] = {}
    for name, _ in inner.named_modules():
        named.setdefault(name.replace(".", "_"), []).append(f"{at}.{name}".removeprefix("."))
    if any(len(named.get(rest, ())) != 1 for rest in rests.values()):
        return None
    return {stem: named[rest][0] for stem, rest in rests.items()}


def _module(package: Any, state: Mapping[str, Any], stem: str, part: nn.Module) -> Any:
    kind, weights = package.get_module(state, stem)
    if kind is None:
        raise UnableError(f"LyCORIS knows no module of the tensors of {stem}")
    own = {key.partition(".")[2]: tensor for key, tensor in state.items() if key.partition(".")[0] == stem}
    filled = [0.0 if w is None and key == "alpha" else w for key, w in zip(kind.weight_list, weights, strict=True)]
    attempts = [partial(package.make_module, kind, filled, stem, part)]
    others = [partial(_loaded, kind, stem, part, own, more) for more in _options(own)]
    by_input = (
        "dora_scale" in own and own["dora_scale"].shape[0] == 1
    )  # its own maker would spread that over all outputs
    attempts = [*others, *attempts] if by_input else [*attempts, *others]
    failure: Exception | None = None
    for make in attempts:  # its own maker does not know all that its trainer writes
        try:
            made = make().double().eval()
            made.apply_to()
        except Exception as error:  # of another library: many types, one meaning
            failure = failure or error
            continue
        return made
    assert failure is not None
    raise UnableError(f"LyCORIS cannot make its {kind.__name__} of {stem}: {first_line(failure)}") from failure


def _options(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a module of these tensors may have been made with, beyond what LyCORIS' own maker takes."""
    found: list[dict[str, Any]] = []
    if "dora_scale" in own:
        found.append({"weight_decompose": True, "wd_on_out": False})
    first = own["lokr_w1"] if "lokr_w1" in own else own.get("lokr_w1_a")
    factors = () if first is None else (*dict.fromkeys((*first.shape, -1)),)
    decomposed = found or [{}]
    for factor in factors:
        found += [{"factor": factor, "decompose_both": True, **more} for more in decomposed]
        found += [{"factor": factor, "unbalanced_factorization": True, **more} for more in decomposed]
        found += [{"factor": factor, **more} for more in decomposed]
    return found


def _loaded(kind: Any, stem: str, part: nn.Module, own: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    """One of LyCORIS' modules with these settings and the file's tensors, every one of them. Raises ValueError where they do not fit."""
    downs = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a1.weight")
    rank = next((own[key].shape[0] for key in downs if key in own), 1)
    core = any(key in own for key in ("lora_mid.weight", "hada_t1", "lokr_t2"))
    alpha = float(own["alpha"]) if "alpha" in own else 0.0
    made = kind(stem, part, 1.0, rank, alpha, use_tucker=core, **more)
    result = made.load_state_dict(dict(own), strict=False)
    if result.unexpected_keys or set(result.missing_keys) - {"scalar", "alpha"}:
        raise ValueError(f"{result.unexpected_keys or result.missing_keys} do not fit")
    return made


def _number(name: str, model: nn.Module, subject: Subject) -> float | None:
    module = subject.layer(name)
    inputs = inputs_of(module, subject.seed)
    if inputs is None:
        return None
    own = [a for a in subject.checkpoint.adapters if a.module == name]
    base = unfused(name, module, ())
    return error(
        answer(model.get_submodule(name), inputs), answer(unfused(name, module, own), inputs), answer(base, inputs)
    )
