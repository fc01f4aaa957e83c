"""LyCORIS on its own files and kohya's: its modules, made of the file's tensors around a base of their own, held against our adapters.

    numbers    each layer's answers, with the real base layer inside
    whole      the outputs of the whole unfused model with all of them in it, where our reference has any

Which module a name means is found here once more: the dots of the module's name as underscores, after a prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint
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
    theirs = _applied(package, load_state(subject.checkpoint.path), model)
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
    named: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        named.setdefault(name.replace(".", "_"), []).append(name)
    found = {}
    for stem in dict.fromkeys(key.partition(".")[0] for key in state):
        names = [n for p in PREFIXES if stem.startswith(p) for n in named.get(stem.removeprefix(p), ())]
        if len(set(names)) != 1:
            raise UnableError(f"LyCORIS' own name {stem} is that of {len(set(names)) or 'no'} modules of the base")
        part = model.get_submodule(names[0])
        found[names[0]] = _module(package, state, stem, part)
    return found


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
