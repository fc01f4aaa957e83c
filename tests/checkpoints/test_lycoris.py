"""LyCORIS files, made on the spot by LyCORIS, against its own unfused forward; and kohya's names."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from conftest import own_model
from safetensors.torch import load_file, save_file
from torch import nn

import reparam_export as rx
from reparam_export.errors import EquivalenceError, FusionError, TensorMismatchError


class Net(nn.Module):
    """Linear layers, convolutions of one and two dimensions, norms; names with underscores and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(6, 12, (3, 2), dilation=(2, 1), padding=(2, 0), bias=False)
        self.point = nn.Conv2d(12, 8, 1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_out": nn.Linear(8, 12), "to_in": nn.Linear(12, 8, bias=False)}) for _ in range(2)
        )
        self.line = nn.Conv1d(8, 10, 3, padding=1)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.group_norm(self.point(torch.tanh(self.wide(torch.tanh(self.stem_1(x)))))).flatten(2).mT
        for block in self.blocks:
            x = x + block["to_in"](torch.tanh(block["to_out"](x)))
        return self.head(self.norm(torch.tanh(self.line(x.mT)).mean(-1)))


ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "linear_dim": 3, "linear_alpha": 7, "conv_dim": 2, "conv_alpha": 5},
    "lora with its rank as alpha": {"algo": "lora", "linear_dim": 3, "linear_alpha": 0, "conv_dim": 2, "conv_alpha": 1},
    "locon with cores": {"algo": "locon", "linear_dim": 4, "linear_alpha": 1, "conv_dim": 3, "use_tucker": True},
    "locon decomposed by output": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "dora_wd": True},
    "locon decomposed by input": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "dora_wd": True, "wd_on_output": False},
    "locon with cores, decomposed": {"algo": "locon", "linear_dim": 2, "use_tucker": True, "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha", "linear_dim": 3, "linear_alpha": 2},
    "loha with cores": {"algo": "loha", "linear_dim": 2, "linear_alpha": 5, "use_tucker": True},
    "loha decomposed": {"algo": "loha", "linear_dim": 3, "linear_alpha": 2, "dora_wd": True},
    "loha decomposed by input": {"algo": "loha", "linear_dim": 2, "use_tucker": True, "dora_wd": True, "wd_on_output": False},
    "lokr": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 2},
    "lokr with both factored": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 4, "decompose_both": True},
    "lokr with cores": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 2, "use_tucker": True},
    "lokr whole": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "full_matrix": True},
    "lokr of large rank": {"algo": "lokr", "linear_dim": 64, "linear_alpha": 3},
    "lokr decomposed": {"algo": "lokr", "linear_dim": 1, "factor": 2, "dora_wd": True, "wd_on_output": False},
    "lokr unbalanced": {"algo": "lokr", "linear_dim": 1, "factor": 2, "unbalanced_factorization": True},
    "glora": {"algo": "glora", "linear_dim": 3, "linear_alpha": 7},
    "full": {"algo": "full"},
    "norms too": {"algo": "lora", "linear_dim": 3, "train_norm": True},
}  # fmt: skip

INPUTS = ["x=batch,4,9,7:float32"]


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def spec(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    file = folder / "net.py"
    file.write_text(
        f"import sys, torch\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_lycoris\n"
        f"def build():\n    return test_lycoris.build().to({dtype})\n"
    )
    return f"py:{file}:build"


def network(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """LyCORIS' network on this model, which answers with it from now on."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    made: nn.Module = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
    dtype = next(model.parameters()).dtype
    made.apply_to()
    return made.to(dtype)


def trained(
    options: dict[str, Any], file: Path, dtype: torch.dtype = torch.float32, base: torch.dtype = torch.float32
) -> nn.Module:
    """A file as LyCORIS writes it after training, and the trained model in float64, unfused."""
    g = torch.Generator().manual_seed(1)
    first = network(build(), options)
    with torch.no_grad():
        for name, tensor in first.named_parameters():
            if ".org_" not in name:
                tensor += 0.3 * torch.randn(tensor.shape, generator=g)
    first.save_weights(str(file), dtype, None)
    model = build().to(base).double()
    again = network(model, options)
    again.load_state_dict({name: t.double() for name, t in load_file(file).items()})
    return model


def read(file: Path, **options: Any) -> rx.Checkpoint:
    return rx.read(file, spec(file.parent), inputs=INPUTS, **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_file_is_proven_against_lycoris_own_unfused_forward(name: str, tmp_path: Path) -> None:
    model = trained(ALGORITHMS[name], tmp_path / "net.safetensors")
    checkpoint = read(tmp_path / "net.safetensors")
    assert checkpoint.format == "lycoris"
    proven = rx.verify(checkpoint, rx.fuse(checkpoint), count=4)
    assert proven.certificate.verdict == "exact"
    (witness,) = proven.certificate.witness
    if name == "lokr with both factored":  # which LyCORIS' modules cannot be made of
        assert "LyCORIS cannot make its LokrModule of lycoris_stem_1" in witness.absent
    else:
        assert (witness.who, witness.settings, witness.outputs) == ("LyCORIS", len(checkpoint.adapters), 1)
        assert max(witness.error, witness.output_error) < 1e-12
    ((_, reference),) = proven.reference.outputs.items()
    with torch.no_grad():
        expected = model(proven.reference.inputs["x"].double())
    assert float((reference - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("lora", "scale", lambda p: 1.0),
        ("loha", "scale", lambda p: 2 * p.scale),
        ("loha", "a1", lambda p: p.a2),
        ("lokr", "scale", lambda p: p.scale / 3),
        ("glora", "scale", lambda p: -p.scale),
    ],
)
def test_a_misread_file_is_found_out_by_lycoris_itself(name: str, field: str, value: Any, tmp_path: Path) -> None:
    trained(ALGORITHMS[name], tmp_path / "net.safetensors")
    checkpoint = read(tmp_path / "net.safetensors")
    adapters = tuple(
        replace(a, params=replace(a.params, **{field: value(a.params)})) if a.module.endswith("head") else a
        for a in checkpoint.adapters
    )
    wrong = replace(checkpoint, adapters=adapters)
    weights = rx.fuse(wrong)
    assert rx.verify(wrong, weights, count=2, witness="none").certificate.verdict == "exact"
    with pytest.raises(EquivalenceError, match=r"head: the answers of LyCORIS' .* and ours differ"):
        rx.verify(wrong, weights, count=2)


def test_the_kinds_are_the_ones_of_the_file(tmp_path: Path) -> None:
    expected = {
        "lora": {"lora": 9},
        "locon with cores": {"lora": 6, "locon": 3},
        "loha decomposed": {"decomposed": 9},
        "lokr": {"lokr": 9},
        "glora": {"glora_lycoris": 9},
        "full": {"full": 9},
        "norms too": {"lora": 9, "full": 2},
    }
    for name, kinds in expected.items():
        trained(ALGORITHMS[name], tmp_path / "net.safetensors")
        assert read(tmp_path / "net.safetensors").describe()["kinds"] == kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_and_a_file_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(ALGORITHMS["locon decomposed by output"], tmp_path / "net.safetensors", dtype, base=dtype)
    checkpoint = rx.read(tmp_path / "net.safetensors", spec(tmp_path, dtype), inputs=INPUTS)
    fused = rx.fuse(checkpoint)
    assert {t.dtype for t in fused.values()} == {dtype}
    proven = rx.verify(checkpoint, fused, count=4)
    assert proven.certificate.verdict == "exact"
    ((_, reference),) = proven.reference.outputs.items()
    with torch.no_grad():
        expected = model(proven.reference.inputs["x"].double())
    assert float((reference - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("prefix", ["lora_unet", "lora_te", "lora_te2", "lora_transformer", "any_thing"])
def test_every_prefix_is_found_by_the_names_of_the_base(prefix: str, tmp_path: Path) -> None:
    trained(ALGORITHMS["lora"], tmp_path / "net.safetensors")
    expected = rx.fuse(read(tmp_path / "net.safetensors"))
    tensors = load_file(tmp_path / "net.safetensors")
    save_file({f"{prefix}{n.removeprefix('lycoris')}": t for n, t in tensors.items()}, tmp_path / "other.safetensors")
    assert rx.fuse(read(tmp_path / "other.safetensors")).sha256() == expected.sha256()


def lines(stems: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Pairs of rank 2 on linear layers (out, in), without alpha."""
    tensors = {}
    for stem, (out, inn) in stems.items():
        tensors |= {f"{stem}.lora_up.weight": torch.randn(out, 2), f"{stem}.lora_down.weight": torch.randn(2, inn)}
    return tensors


def refusal(tensors: dict[str, torch.Tensor], layers: str, folder: Path) -> str:
    save_file(tensors, folder / "net.safetensors")
    with pytest.raises((TensorMismatchError, FusionError)) as caught:
        rx.fuse(rx.read(folder / "net.safetensors", own_model(folder, layers, "x"), inputs=["x=batch,4:float32"]))
    assert caught.value.exit_code in (3, 4)
    return str(caught.value)


def test_a_name_that_is_no_module_or_several_is_refused(tmp_path: Path) -> None:
    two = "self.a = torch.nn.ModuleDict({'b_c': Linear(4, 4), 'd': Linear(4, 4)}); self.a_b = torch.nn.ModuleDict({'c': Linear(4, 4)})"
    assert "could be each of a.b_c, a_b.c" in refusal(
        lines({"lycoris_a_b_c": (4, 4), "lycoris_a_d": (4, 4)}), two, tmp_path
    )
    message = refusal(lines({"lora_unet_a_d": (4, 4), "lora_te_text_model_q": (4, 4)}), two, tmp_path)
    assert "lora_te_text_model_q names no module of the base" in message
    assert "--set part=te|unet reads one of them" in message
    message = refusal(lines({"lycoris_a_d": (4, 4), "lycoris_a_e": (4, 4)}), two, tmp_path)
    assert "lycoris_a_e names no module of the base (nearest: a.d" in message
    assert "expected (4, 2)" in refusal(lines({"lycoris_a_d": (5, 4)}), two, tmp_path)


def test_what_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    one = "self.a_b = Linear(4, 4)"
    for algo, name in (("diag-oft", "OFT and BOFT"), ("ia3", "(IA)^3")):
        trained({"algo": algo, "linear_dim": 2}, tmp_path / "net.safetensors")
        with pytest.raises(FusionError, match=re.escape(f"{name} of LyCORIS on 9 modules, first lycoris_")):
            read(tmp_path / "net.safetensors")
    pair = lines({"lycoris_a_b": (4, 4)})
    for more in ("lycoris_a_b.alpha_2", "lycoris_a_b.dora_scale_2", "lycoris_a_c.alpha", "lycoris_a_b.scalar"):
        assert more in refusal(pair | {more: torch.ones(4, 1)}, one, tmp_path)
    down = next(n for n in pair if "down" in n)
    assert "is missing" in refusal({n: t for n, t in pair.items() if n != down}, one, tmp_path)
    for first, missing in (("hada_w1_a", "hada_w1_b"), ("lokr_w1", "lokr_w2_a"), ("a1.weight", "a2.weight")):
        assert missing in refusal({f"lycoris_a_b.{first}": torch.ones(4, 2)}, one, tmp_path)


def test_alpha_that_is_missing_or_zero_is_a_scale_of_1(tmp_path: Path) -> None:
    one = own_model(tmp_path, "self.a_b = Linear(4, 4)", "self.a_b(x)")
    pair = lines({"lycoris_a_b": (4, 4)})
    scales = []
    for alpha in ({}, {"lycoris_a_b.alpha": torch.tensor(0.0)}, {"lycoris_a_b.alpha": torch.tensor(3.0)}):
        save_file(pair | alpha, tmp_path / "net.safetensors")
        (adapter,) = rx.read(tmp_path / "net.safetensors", one, inputs=["x=batch,4:float32"]).adapters
        scales.append(adapter.params.scale)
    assert scales == [1.0, 1.0, 1.5]


def test_inspecting_needs_neither_torch_nor_lycoris(tmp_path: Path) -> None:
    trained(ALGORITHMS["lokr with cores"], tmp_path / "net.safetensors")
    code = (
        "import sys, reparam_export as rx\n"
        f"c = rx.read({str(tmp_path / 'net.safetensors')!r}, inspecting=True)\n"
        "assert c.format == 'lycoris' and c.describe()['kinds'] == {'lokr': 9}, c\n"
        "assert 'torch' not in sys.modules and 'lycoris' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
