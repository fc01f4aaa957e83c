"""mlx-lm adapters: ``adapters.safetensors`` with ``adapter_config.json``, the transposes of what torch has.

    X.lora_a (in, r), X.lora_b (r, out)     y + scale (x A) B; the scale as it is, not divided by r
    X.m (out)                               DoRA: the rows of W + scale (A B)^T, each made as long as m says
    X.weight, ...                           ``fine_tune_type`` full: whole tensors of the model

``lora_parameters`` of the configuration has the scale (ml-explore/mlx-lm, mlx_lm/tuner/lora.py, dora.py, utils.py); versions that had
``alpha`` there too multiplied it by alpha / r, later ones do not read it: where alpha is not r, ``--set scale=`` says what was run. They
are in the last ``num_layers`` of the model. Where mlx kept the model in fewer bits, the base is the one before that.
"""

from __future__ import annotations

from typing import Any

from reparam_export.adapters import dora, lora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.errors import CheckpointError, FusionError, TensorMismatchError

LOOKED_FOR = "X.lora_a and X.lora_b, with lora_parameters in adapter_config.json (mlx-lm)"
EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embeddings")


def accepts(source: Source) -> bool:
    if "peft_type" in source.config:
        return False
    full = source.config.get("fine_tune_type") == "full" and "lora_parameters" in source.config
    return full or any(name.endswith(".lora_a") for name in source.tensors)


def read(source: Source) -> Parts:
    model = source.config.get("model")
    base = f"hf:{source.near(model)}" if isinstance(model, str) and model and not set(model) & set("?&") else None
    if source.config.get("fine_tune_type") == "full":
        return Parts((), dict(source.tensors), base=base)
    claim = source.claim()
    modules = dict.fromkeys(name.removesuffix(".lora_a") for name in source.tensors if name.endswith(".lora_a"))
    scale = _scale(source, {int(source.tensors[f"{module}.lora_a"].shape[-1]) for module in modules})
    adapters = tuple(_adapter(source, claim, module, scale) for module in modules)
    claim.finish()
    return Parts(adapters, base=base, covers=lambda names: [])


def _scale(source: Source, ranks: set[int]) -> float:
    """The configuration's own, where it can only be that. Raises MissingSettingError."""
    said: Any = source.config.get("lora_parameters")
    said = said if isinstance(said, dict) else {}
    alpha = said.get("alpha")
    if "scale" in said and (alpha is None or {alpha} == ranks):
        source.settings.offer("scale", said["scale"], "adapter_config.json")
    where = "lora_parameters of mlx-lm's adapter_config.json"
    if alpha is not None:
        where += f"; it has alpha {alpha} too, by which (over the rank) older versions of mlx-lm multiply it and later ones do not"
    return source.settings.number("scale", found_in=where)


def _adapter(source: Source, claim: Claim, module: str, scale: float) -> Adapter:
    a, b, m = claim.take(f"{module}.lora_a"), claim.take(f"{module}.lora_b"), claim.take_if(f"{module}.m")
    if len(a.shape) == 3:
        raise FusionError(
            f"{source.path}: {module}: mlx-lm's LoRA on the stacked matrices of experts (SwitchLinear) is not read"
        )
    if module.rpartition(".")[2] in EMBEDDINGS:
        raise FusionError(
            f"{source.path}: {module}: mlx-lm's LoRA on an embedding, which with tied weights changes the output layer too, is not read"
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise TensorMismatchError(
            f"{source.path}: {module}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} are not (in, r) and (r, out)",
            module=module,
            tensor="lora_b",
            expected=(int(a.shape[-1]), "out"),
            found=tuple(b.shape),
        )
    pair = Bottleneck(Affine(a.T), Affine(b.T))
    if (m is not None) != (source.config.get("fine_tune_type") == "dora"):
        raise CheckpointError(
            f"{source.path}: {module} has {'no' if m is None else 'a'} magnitude m, and fine_tune_type is "
            f"{source.config.get('fine_tune_type')!r}; file and configuration do not belong together"
        )
    return (
        Adapter(module, "lora", lora.Params(pair, scale))
        if m is None
        else Adapter(module, "dora", dora.Params(pair, m, scale))
    )
