"""Convolutions in groups and of other paddings, each judged by the library that trained the adapter, unfused, in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reparam_export as rx
from reparam_export.errors import FusionError


class Net(nn.Module):
    def __init__(self, padding_mode: str = "zeros", padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=padding, groups=8, padding_mode=padding_mode)
        self.grouped = nn.Conv2d(8, 12, (3, 2), dilation=(1, 1), padding=padding, groups=2, bias=False)
        self.multiplied = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=4)
        self.line = nn.Conv1d(24, 12, 3, padding=1, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.depthwise(torch.tanh(self.stem(x))))))
        return self.line(torch.tanh(self.multiplied(x)).flatten(2)).mean(-1)


INPUTS = ["x=batch,4,12,10:float32"]


def build(**given: Any) -> Net:
    torch.manual_seed(0)
    return Net(**given)


def spec(folder: Path, **given: Any) -> str:
    (folder / "net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_grouped\n"
        f"def build():\n    return test_grouped.build(**{given!r})\n"
    )
    return f"py:{folder / 'net.py'}:build"


def agrees(checkpoint: rx.Checkpoint, trained: nn.Module) -> rx.VerifiedModel:
    """The fused model, its proof, and every output of it against the library's own model."""
    model = rx.verify(checkpoint, rx.fuse(checkpoint), count=3)
    x = model.reference.inputs["x"].double()
    with torch.no_grad():
        expected = trained(x)
        assert float((model.unfused(torch.float64)(x) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
        assert float((model.module().double()(x) - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert model.certificate.outputs_prove
    return model


ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "linear_dim": 3, "linear_alpha": 7, "conv_dim": 2, "conv_alpha": 5},
    "locon with cores": {"algo": "locon", "linear_dim": 4, "conv_dim": 3, "use_tucker": True},
    "locon decomposed": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "dora_wd": True},
    "locon decomposed by input": {"algo": "locon", "linear_dim": 2, "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha", "linear_dim": 3, "linear_alpha": 2},
    "lokr": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "factor": 2},
    "full": {"algo": "full"},
}


def network(model: nn.Module, options: dict[str, Any]) -> Any:
    """LyCORIS' network on this model, which answers with it from now on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
    made.apply_to()
    return made


def trained(options: dict[str, Any], file: Path) -> nn.Module:
    """A file as LyCORIS writes it, and the trained model in float64, unfused: it rebuilds the weight and convolves in the base's groups."""
    first, generator = network(build(), options), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in first.named_parameters():
            if ".org_" not in name:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    first.save_weights(str(file), torch.float32, None)
    model = build().double()
    again = network(model, options).double()
    again.load_state_dict({name: t.double() for name, t in load_file(file).items()})
    return model


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_lycoris_on_convolutions_in_groups(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its own merge is not used."""
    file = tmp_path / "adapter.safetensors"
    own = trained(options, file)
    assert {"lycoris_depthwise", "lycoris_grouped"} <= {name.partition(".")[0] for name in load_file(file)}
    model = agrees(rx.read(file, spec(tmp_path), inputs=INPUTS), own)
    rx.export(model, "onnx", tmp_path / "out", batch=(1, 2, 2))


def peft_adapter(folder: Path, targets: list[str], **given: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(**given), peft.LoraConfig(r=24, lora_alpha=60, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(("module", "groups"), [("depthwise", 8), ("grouped", 2), ("line", 3)])
def test_peft_s_lora_on_one_reads_every_channel_and_is_refused_by_that_name(
    tmp_path: Path, module: str, groups: int
) -> None:
    peft_adapter(tmp_path, [module]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FusionError, match=rf"{module}: LoRA on a convolution in {groups} groups: its lora_A reads all"):
        rx.read(tmp_path / "adapter", spec(tmp_path), inputs=INPUTS)


@pytest.mark.parametrize("module", ["depthwise", "grouped", "multiplied", "line"])
def test_where_it_reads_its_own_channels_only_it_is_folded(tmp_path: Path, module: str) -> None:
    model = peft_adapter(tmp_path, [module, "stem"])
    layer = model.base_model.model.get_submodule(module)
    a, groups = layer.lora_A["default"].weight, layer.base_layer.groups
    with torch.no_grad():
        for g in range(groups):
            for h in set(range(groups)) - {g}:
                a.view(groups, len(a) // groups, groups, a.shape[1] // groups, -1)[g, :, h] = 0
    model.save_pretrained(tmp_path / "adapter")
    agrees(rx.read(tmp_path / "adapter", spec(tmp_path), inputs=INPUTS), model.double().eval())


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_another_padding_is_refused_where_there_is_any(tmp_path: Path, mode: str) -> None:
    options = {"algo": "lora", "linear_dim": 3, "conv_dim": 2}
    for padding in (1, 0):
        base = spec(tmp_path, padding_mode=mode, padding=padding)
        made = lycoris.create_lycoris(
            build(padding_mode=mode, padding=padding), 1.0, warn_on_unmatched=False, **options
        )
        made.apply_to()
        with torch.no_grad():
            for name, tensor in made.named_parameters():
                if ".org_" not in name:
                    tensor += 0.3
        made.save_weights(str(tmp_path / f"{padding}.safetensors"), torch.float32, None)
        checkpoint = rx.read(tmp_path / f"{padding}.safetensors", base, inputs=INPUTS)
        if padding:
            with pytest.raises(FusionError, match=f"padding_mode='{mode}'"):
                rx.fuse(checkpoint)
        else:
            assert rx.verify(checkpoint, rx.fuse(checkpoint), count=2).certificate.verdict == "exact"


def test_other_adapters_of_peft_on_one_are_refused(tmp_path: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoHaConfig(r=2, target_modules=["grouped"], init_weights=False)
        peft.get_peft_model(build(), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises((FusionError, rx.errors.TensorMismatchError), match=r"group|base"):
        rx.fuse(rx.read(tmp_path / "adapter", spec(tmp_path), inputs=INPUTS))
