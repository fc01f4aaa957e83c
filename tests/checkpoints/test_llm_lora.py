"""LoRA of mlx-lm and torchtune, which cannot run here: each file as its code lays it out, held against its forward written out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import reparam_export as rx
from reparam_export.errors import CheckpointError, FusionError, MissingSettingError, TensorMismatchError, UsageError
from reparam_export.streaming.plan import plan_of

State = dict[str, torch.Tensor]
HEADS, KV_HEADS, HEAD, WIDTH = 4, 2, 8, 24  # heads * head != width


def llama(folder: Path, kind: str = "llama") -> tuple[str, State]:
    """The base spec of a small model, and its tensors in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": HEAD, "vocab_size": 64}
    config, build = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    model: Any = build(
        config(**sizes, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False)
    )
    model.save_pretrained(folder / "base")
    return f"hf:{folder / 'base'}", {n: t.double() for n, t in model.state_dict().items()}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def off(checkpoint: rx.Checkpoint, expected: State) -> float:
    """The largest difference of fused weights from what they must be."""
    fused = rx.fuse(checkpoint)
    assert set(expected) <= set(fused) | set(fused.aliases)
    return max(float((fused[n].double() - expected[n]).abs().max()) for n in fused)


# --- mlx-lm (mlx_lm/tuner/lora.py, dora.py)

MLX = [
    f"model.layers.{n}.{layer}" for n in (0, 1) for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


def mlx(
    folder: Path, base: State, kind: str, scale: float = 2.5, modules: list[str] | None = None, **said: Any
) -> State:
    """Writes the folder; the weights of the adapted model: y = W x + scale (x A) B, times m / |W + ...| for DoRA."""
    state, expected = {}, dict(base)
    for seed, module in enumerate(modules or MLX):
        weight = base[f"{module}.weight"]
        a, b = draw(weight.shape[1], 4, seed=seed), draw(4, weight.shape[0], seed=seed + 50)
        state |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        whole = weight + scale * (a.double() @ b.double()).T
        if kind == "dora":
            state[f"{module}.m"] = draw(weight.shape[0], seed=seed + 99).abs() + 0.5
            whole = state[f"{module}.m"].double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
        expected[f"{module}.weight"] = whole
    folder.mkdir()
    save_file(state, folder / "adapters.safetensors")
    parameters = {"rank": 4, "dropout": 0.0, "scale": scale} | said
    config = {"fine_tune_type": kind, "lora_parameters": parameters, "num_layers": 16, "model": "somewhere/else"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_adapters_are_transposed_and_their_scale_is_taken_as_it_is(kind: str, tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    expected = mlx(tmp_path / "adapters", base, kind)
    found = rx.read(tmp_path / "adapters", spec)
    assert (found.format, found.settings["scale"]) == ("mlx", 2.5)
    assert off(found, expected) < 1e-6
    assert rx.read(tmp_path / "adapters").base == "hf:somewhere/else"


def test_mlx_layers_may_be_the_last_ones_only_and_whole_tensors_may_be_trained(tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    expected = mlx(tmp_path / "adapters", base, "lora", modules=[m for m in MLX if ".1." in m])
    assert off(rx.read(tmp_path / "adapters", spec), expected) < 1e-6
    weight = draw(WIDTH, 40, seed=7)
    (tmp_path / "full").mkdir()
    save_file({"model.layers.1.mlp.down_proj.weight": weight}, tmp_path / "full" / "adapters.safetensors")
    (tmp_path / "full" / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "full", "lora_parameters": None})
    )
    assert off(rx.read(tmp_path / "full", spec), base | {"model.layers.1.mlp.down_proj.weight": weight.double()}) == 0


def test_an_mlx_scale_that_versions_read_in_two_ways_is_asked_for(tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    expected = mlx(tmp_path / "adapters", base, "lora", alpha=16)
    with pytest.raises(MissingSettingError, match="it has alpha 16 too") as caught:
        rx.read(tmp_path / "adapters", spec)
    assert caught.value.setting == "scale"
    assert off(rx.read(tmp_path / "adapters", spec, settings={"scale": 2.5}), expected) < 1e-6
    (tmp_path / "adapters" / "adapter_config.json").unlink()
    with pytest.raises(MissingSettingError, match="lora_parameters of mlx-lm's"):
        rx.read(tmp_path / "adapters", spec)


def test_what_mlx_runs_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    _, base = llama(tmp_path)
    mlx(tmp_path / "embedding", base, "lora", modules=["model.embed_tokens"])
    with pytest.raises(FusionError, match="on an embedding"):
        rx.read(tmp_path / "embedding")
    save_file({"x.lora_a": torch.ones(2, 3, 4), "x.lora_b": torch.ones(2, 4, 3)}, tmp_path / "experts.safetensors")
    with pytest.raises(FusionError, match="SwitchLinear"):
        rx.read(tmp_path / "experts.safetensors", settings={"scale": 2})
    save_file(
        {"x.lora_a": torch.ones(3, 4), "x.lora_b": torch.ones(4, 3), "x.m": torch.ones(3)}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(CheckpointError, match="a magnitude m"):
        rx.read(tmp_path / "odd.safetensors", settings={"scale": 2})
    save_file(
        {"x.lora_a": torch.ones(4, 3), "x.lora_b": torch.ones(3, 4).T.contiguous()}, tmp_path / "torch.safetensors"
    )
    with pytest.raises(TensorMismatchError, match=r"not \(in, r\) and \(r, out\)"):
        rx.read(tmp_path / "torch.safetensors", settings={"scale": 2})


@pytest.mark.parametrize("name", ["quantization", "quantization_config"])
def test_a_base_that_mlx_quantized_is_said_to_be_that(name: str, tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    mlx(tmp_path / "adapters", base, "lora")
    file = tmp_path / "base" / "config.json"
    said = {"group_size": 64, "bits": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": said, name: said}))
    with pytest.raises(CheckpointError, match="quantized by mlx"):
        rx.fuse(rx.read(tmp_path / "adapters", spec))


OWN = """
from torch import nn
from transformers import AutoModelForCausalLM
class Own(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.model, self.lm_head = nn.Module(), inner.lm_head
        self.model.embed_tokens, self.model.norm, self.model.layers = inner.model.embed_tokens, inner.model.norm, nn.ModuleList()
        for layer in inner.model.layers:
            own = nn.Module()
            own.self_attn, own.mlp = nn.Module(), nn.Module()
            for name, part in layer.self_attn.named_children():
                setattr(own.self_attn, name, part)
            for name, part in layer.mlp.named_children():
                setattr(own.mlp, name, part)
            own.input_layernorm, own.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
            self.model.layers.append(own)
    def forward(self, ids):
        return self.lm_head(self.model.embed_tokens(ids))
def make():
    return Own(AutoModelForCausalLM.from_pretrained({!r})).eval()
"""
IDS = ["ids=batch,5:int64:64"]

# --- torchtune (torchtune/modules/peft/lora.py, torchtune/models/convert_weights.py)

TUNE = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def heads_of(layer: str) -> int:
    return {"attn.q_proj": HEADS, "attn.k_proj": KV_HEADS}.get(layer, 0)


def to_tune(t: torch.Tensor, heads: int) -> torch.Tensor:
    """``hf_to_tune``."""
    return t.view(heads, 2, HEAD // 2, -1).transpose(1, 2).reshape(HEAD * heads, -1) if heads else t


def to_hf(t: torch.Tensor, heads: int) -> torch.Tensor:
    """``tune_to_hf``."""
    return t.view(heads, HEAD // 2, 2, -1).transpose(1, 2).reshape(HEAD * heads, -1) if heads else t


def tune(folder: Path, base: State, *, turned: bool, magnitude: bool) -> State:
    """Writes ``adapter_0.pt``; the weights of the adapted model under Hugging Face's names, turned back."""
    state, expected = {}, dict(base)
    for number in range(2):
        for seed, (layer, own) in enumerate(TUNE.items()):
            name, heads = f"model.layers.{number}.{own}.weight", heads_of(layer) if turned else 0
            weight = to_tune(base[name], heads)
            a, b = draw(4, weight.shape[1], seed=seed + 10 * number), draw(weight.shape[0], 4, seed=seed + 50)
            state |= {f"layers.{number}.{layer}.lora_a.weight": a, f"layers.{number}.{layer}.lora_b.weight": b}
            whole = weight + 12 / 4 * (b.double() @ a.double())
            if magnitude:
                m = draw(weight.shape[0], seed=seed + 99).abs() + 0.5
                state[f"layers.{number}.{layer}.magnitude"] = m
                whole = m.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
            expected[name] = to_hf(whole, heads)
    torch.save(state, folder / "adapter_0.pt")
    return expected


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_torchtunes_heads_are_turned_back(kind: str, magnitude: bool, tmp_path: Path) -> None:
    spec, base = llama(tmp_path, kind)
    expected = tune(tmp_path, base, turned=kind == "llama", magnitude=magnitude)
    settings = {"lora_alpha": 12, "model_type": kind} | ({"head_dim": HEAD} if kind == "llama" else {})
    for name in settings:
        with pytest.raises(MissingSettingError) as caught:
            rx.read(tmp_path / "adapter_0.pt", spec, settings={n: v for n, v in settings.items() if n != name})
        assert caught.value.setting == name
    found = rx.read(tmp_path / "adapter_0.pt", spec, settings=settings)
    assert found.format == "torchtune"
    assert off(found, expected) < 1e-6
    other = {
        "llama": {"lora_alpha": 12, "model_type": "qwen"},
        "qwen": settings | {"model_type": "llama", "head_dim": HEAD},
    }
    wrong = rx.read(tmp_path / "adapter_0.pt", spec, settings=other[kind])
    with pytest.raises(UsageError, match=rf"--set model_type={kind}, or the base"):
        rx.fuse(wrong)
    (tmp_path / "own.py").write_text(OWN.format(spec.removeprefix("hf:")))  # it says nothing of itself
    wrong = rx.read(tmp_path / "adapter_0.pt", f"py:{tmp_path / 'own.py'}:make", settings=other[kind], inputs=IDS)
    assert off(wrong, expected) > 1e-2


@pytest.mark.parametrize("name", ["head_dim", "num_query_groups"])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_base_says_of_its_heads_is_not_contradicted(name: str, streamed: bool, tmp_path: Path) -> None:
    """As many rows in other heads: the shapes fit, and the rows are others."""
    spec, base = llama(tmp_path)
    if name == "head_dim":
        tune(tmp_path, base, turned=True, magnitude=False)
        settings: dict[str, Any] = {"lora_alpha": 12, "model_type": "llama", "head_dim": HEAD // 2}
        found, own = rx.read(tmp_path / "adapter_0.pt", spec, settings=settings), HEAD
    else:
        nemo(tmp_path, base, "new")
        settings = {"lora_alpha": 12, "num_query_groups": 2 * KV_HEADS, "head_dim": HEAD // 2}
        found, own = rx.read(tmp_path / "model_weights.ckpt", spec, settings=settings), KV_HEADS
    with pytest.raises(UsageError, match=rf"model_type llama\) says .*pass --set {name}={own}"):
        plan_of(found) if streamed else rx.fuse(found)


def test_torchtunes_own_configuration_has_alpha_and_is_no_folder_of_peft(tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    (tmp_path / "epoch_0").mkdir()
    expected = tune(tmp_path / "epoch_0", base, turned=True, magnitude=False)
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "epoch_0" / "adapter_config.json").write_text(json.dumps(config))
    settings = {"model_type": "llama", "head_dim": HEAD}
    assert off(rx.read(tmp_path / "epoch_0" / "adapter_0.pt", spec, settings=settings), expected) < 1e-6
    for size, error in ((7, "expected an even number"), (24, "no heads of 24")):
        with pytest.raises((CheckpointError, UsageError), match=error):
            rx.read(tmp_path / "epoch_0" / "adapter_0.pt", spec, settings=settings | {"head_dim": size})
    torch.save(
        {"layers.0.fusion.lora_a.weight": torch.ones(4, 3), "layers.0.fusion.lora_b.weight": torch.ones(3, 4)},
        tmp_path / "odd.pt",
    )
    with pytest.raises(CheckpointError, match="no layer that torchtune converts"):
        rx.read(tmp_path / "odd.pt", settings={"lora_alpha": 12})


# --- NeMo (nemo/collections/nlp/modules/common/megatron/adapters/mcore_mixins.py)


def nemo(folder: Path, base: State, style: str) -> State:
    """Writes the tensors of one rank; the weights of the adapted model. The change of packed q, k, v is taken apart as the forward does."""
    state, expected, per = {}, dict(base), HEADS // KV_HEADS
    old = {
        "qkv": "lora_kqv_adapter",
        "proj": "lora_dense_attention_adapter",
        "fc1": "lora_hto4h_adapter",
        "fc2": "lora_4htoh_adapter",
    }
    sizes = {
        "qkv": (HEAD * (HEADS + 2 * KV_HEADS), WIDTH),
        "proj": (WIDTH, HEAD * HEADS),
        "fc1": (80, WIDTH),
        "fc2": (WIDTH, 40),
    }
    for number in range(2):
        for seed, (layer, (rows, columns)) in enumerate(sizes.items()):
            part = "mlp" if layer.startswith("fc") else "self_attention"
            name = f"adapter_layer.{old[layer]}" if style == "old" else f"linear_{layer}.adapter"
            stem = f"{'model' if style == 'old' else 'module'}.decoder.layers.{number}.{part}.{name}"
            a, b = draw(4, columns, seed=seed + 10 * number), draw(rows, 4, seed=seed + 50)
            state |= {f"{stem}.linear_in.weight": a, f"{stem}.linear_out.weight": b}
            delta, own = 12 / 4 * (b.double() @ a.double()), f"model.layers.{number}"
            if layer == "qkv":
                mixed = delta.view(KV_HEADS, per + 2, HEAD, WIDTH)
                q, k, v = mixed.split([per, 1, 1], dim=1)
                for letter, change in (("q", q), ("k", k), ("v", v)):
                    expected[f"{own}.self_attn.{letter}_proj.weight"] = base[
                        f"{own}.self_attn.{letter}_proj.weight"
                    ] + change.reshape(-1, WIDTH)
            elif layer == "fc1":
                for module, change in zip(("gate_proj", "up_proj"), delta.chunk(2), strict=True):
                    expected[f"{own}.mlp.{module}.weight"] = base[f"{own}.mlp.{module}.weight"] + change
            else:
                module = "self_attn.o_proj" if layer == "proj" else "mlp.down_proj"
                expected[f"{own}.{module}.weight"] = base[f"{own}.{module}.weight"] + delta
    torch.save(state, folder / "model_weights.ckpt")
    return expected


@pytest.mark.parametrize("style", ["old", "new"])
def test_nemos_packed_layers_are_taken_apart_by_groups(style: str, tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    expected = nemo(tmp_path, base, style)
    settings = {"lora_alpha": 12, "num_query_groups": KV_HEADS, "head_dim": HEAD}
    for name in settings:
        with pytest.raises(MissingSettingError, match=r"model_config\.yaml") as caught:
            rx.read(tmp_path / "model_weights.ckpt", spec, settings={n: v for n, v in settings.items() if n != name})
        assert caught.value.setting == name
    found = rx.read(tmp_path / "model_weights.ckpt", spec, settings=settings)
    assert found.format == "nemo"
    assert off(found, expected) < 1e-6
    with pytest.raises(CheckpointError, match="no 3 groups of heads of 8"):
        rx.read(tmp_path / "model_weights.ckpt", spec, settings=settings | {"num_query_groups": 3})
    assert len(rx.read(tmp_path / "model_weights.ckpt", inspecting=True).missing) == 3


def archive(folder: Path, files: dict[str, bytes | Path], mode: str = "w") -> Path:
    """A ``.nemo`` file, as NeMo's ``save_restore_connector`` makes it."""
    with tarfile.open(folder / "lora.nemo", mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "lora.nemo"


PEFT = "peft:\n  peft_scheme: lora\n  lora_tuning:\n    adapter_dim: 4\n    alpha: {}\n"
HEADS_OF = f"num_attention_heads: {HEADS}\nnum_query_groups: {KV_HEADS}\nhidden_size: {WIDTH}\n"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_nemo_archive_is_read_without_unpacking_it(mode: str, tmp_path: Path) -> None:
    spec, base = llama(tmp_path)
    expected = nemo(tmp_path, base, "old")
    config = f"{PEFT.format(12)}{HEADS_OF}kv_channels: {HEAD}\n".encode()
    files: dict[str, bytes | Path] = {
        "./model_config.yaml": config,
        "./model_weights.ckpt": tmp_path / "model_weights.ckpt",
    }
    found = rx.read(archive(tmp_path, files, mode), spec)
    assert found.settings == {"lora_alpha": 12, "num_query_groups": KV_HEADS, "head_dim": HEAD}
    assert off(found, expected) < 1e-6
    assert "lora_alpha 12 from model_config.yaml" in found.notes
    given = rx.read(tmp_path / "lora.nemo", spec, settings={"lora_alpha": 3})
    assert given.adapters[0].params.scale == 3 / 4
    config = f"{PEFT.format('${model.peft.lora_tuning.adapter_dim}')}{HEADS_OF}".encode()
    found = rx.read(archive(tmp_path, files | {"./model_config.yaml": config}), settings={"head_dim": HEAD})
    assert found.adapters[0].params.scale == 1
    with pytest.raises(CheckpointError, match="no 2 groups of heads of 6"):  # its own width / heads
        rx.read(tmp_path / "lora.nemo")
    archive(tmp_path, {"./model_config.yaml": b"a: 1", "./model_weights.ckpt": tmp_path / "model_weights.ckpt"})
    with pytest.raises(MissingSettingError, match="lora_alpha"):
        rx.read(tmp_path / "lora.nemo")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"mp_rank_00/model_weights.ckpt": b"x", "mp_rank_01/model_weights.ckpt": b"x"},
            "2 of them, one for each rank",
        ),
        (
            {"model_config.yaml": b"a: 1", "model_weights/__0_0.distcp": b"x"},
            "it holds model_config.yaml, model_weights/",
        ),
        ({"model_weights.ckpt": b"x"}, "cannot be read as a torch file"),
        (None, "a tar file"),
    ],
)
def test_a_nemo_archive_of_several_ranks_is_said_to_be_that(files: Any, said: str, tmp_path: Path) -> None:
    if files is None:
        (tmp_path / "lora.nemo").write_bytes(b"nothing of the kind")
    else:
        archive(tmp_path, files)
    with pytest.raises(CheckpointError, match=said):
        rx.read(tmp_path / "lora.nemo")


def test_a_link_in_a_nemo_archive_is_not_followed(tmp_path: Path) -> None:
    torch.save({"secret": torch.ones(2)}, tmp_path / "secret.pt")
    with tarfile.open(tmp_path / "lora.nemo", "w") as tar:
        info = tarfile.TarInfo("model_weights.ckpt")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.pt")
        tar.addfile(info)
    with pytest.raises(CheckpointError, match=r"expected one model_weights\.ckpt"):
        rx.read(tmp_path / "lora.nemo")
