"""Code that is not ours: its errors are told as such, and transformers' experts run in an implementation that the step can take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import own_model

import reparam_export as rx
from reparam_export.calls import IMPLEMENTATIONS, experts, foreign
from reparam_export.errors import ExportError, FusionError, UsageError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def mixture() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=2, max_position_embeddings=32, mlp_only_layers=[],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def adapted(model: torch.nn.Module, folder: Path, **settings: object) -> torch.nn.Module:
    """The base and a random LoRA on it, saved; the unfused model of peft, in float64."""
    model.save_pretrained(folder / "base")
    own = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in own.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    own.peft_config["default"].base_model_name_or_path = str(folder / "base")
    own.save_pretrained(folder / "adapter")
    return own.double().eval()


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_of_experts_is_proven_and_exported_as_peft_computes_it(tmp_path: Path) -> None:
    unfused = adapted(mixture(), tmp_path, target_modules=["q_proj", "v_proj"])
    unfused.get_base_model().set_experts_implementation("eager")
    checkpoint = rx.read(tmp_path / "adapter")
    model = rx.verify(checkpoint, rx.fuse(checkpoint))
    with torch.no_grad():
        expected = unfused(**model.reference.inputs).logits
    assert torch.allclose(model.reference.outputs["logits"], expected, rtol=0, atol=1e-6)
    assert (
        model.module().config._experts_implementation == "grouped_mm"
    )  # the model itself is left as transformers makes it
    artifact = rx.export(model, "onnx", tmp_path / "out", batch=(1, 2, 3))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / artifact.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in model.reference.inputs.items()})
    assert float((torch.from_numpy(found).double() - expected).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_the_implementation_that_the_user_names_is_used_but_in_float64(tmp_path: Path) -> None:
    adapted(mixture(), tmp_path, target_modules=["q_proj", "v_proj"])
    checkpoint = rx.read(tmp_path / "adapter", base=f"hf:{tmp_path / 'base'}?experts_implementation=eager")
    with pytest.raises(FusionError, match=r"cannot be captured by torch\.export"):  # eager is a loop over numbers
        rx.verify(checkpoint, rx.fuse(checkpoint))


def test_experts_are_switched_for_one_step_and_switched_back() -> None:
    model = torch.nn.ModuleDict({"inside": mixture()})
    config = model["inside"].config

    def ask(step: str, named: str | None) -> str:
        with experts(model, step, named):  # type: ignore[arg-type]
            return str(config._experts_implementation)

    assert [ask(step, None) for step in IMPLEMENTATIONS] == ["eager", "eager", "batched_mm"]
    assert [ask(step, "grouped_mm") for step in IMPLEMENTATIONS] == ["eager", "grouped_mm", "grouped_mm"]
    with pytest.raises(ZeroDivisionError), experts(model, "capture"):
        raise ZeroDivisionError
    assert config._experts_implementation == "grouped_mm"


def test_an_error_of_others_is_one_line_that_says_whose_it_is_and_where() -> None:
    with pytest.raises(ExportError) as caught, foreign("Net", "run in float64", ExportError, "give another"):
        raise KeyError("a\nb")
    assert str(caught.value) == "Net cannot be run in float64: KeyError: 'a\\nb'; give another"
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UsageError, match=r"^ours$"), foreign("Net", "run"):
        raise UsageError("ours")
    with pytest.raises(MemoryError), foreign("Net", "run"):
        raise MemoryError


def test_what_a_module_returns_from_eval_is_not_relied_on() -> None:
    loralib = pytest.importorskip("loralib")
    layer = loralib.Linear(6, 4, r=2, lora_alpha=5)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(3, 6, generator=generator)
    expected = layer(x)
    assert layer.eval() is None
    layer.train()
    assert torch.allclose(rx.fuse_module(layer)(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (
            "self.fc(x) if x.dtype == torch.float32 else {}['of mine']",
            "Net cannot be run in float64: KeyError: 'of mine'",
        ),
        ("self.fc(x) * len(set(x[:, 0].tolist()))", "Net: its graph cannot be captured by torch.export: GuardOn"),
        (
            "self.fc(x) if not hasattr(self, 'copied') else 1 / 0",
            "Net cannot be copied: ZeroDivisionError: division by zero",
        ),
    ],
)
def test_a_model_that_fails_in_one_step_is_named_with_the_step(tmp_path: Path, forward: str, said: str) -> None:
    layers = "self.fc = Linear(6, 4)" + ("; self.copied = Uncopied()" if "copied" in forward else "")
    base = own_model(tmp_path, layers, forward.replace(" if not hasattr(self, 'copied') else 1 / 0", ""))
    (tmp_path / "net.py").write_text(
        "class Uncopied:\n    def __deepcopy__(self, memo):\n        return 1 / 0\n" + (tmp_path / "net.py").read_text()
    )
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, 6, 1), (6, 1, 1)))
    torch.save({"fc.adapter.conv_A.weight": a, "fc.adapter.conv_B.weight": b}, tmp_path / "c.pt")
    checkpoint = rx.read(tmp_path / "c.pt", base, inputs=["x=batch,6:float32"])
    with pytest.raises(FusionError) as caught:
        rx.verify(checkpoint, rx.fuse(checkpoint))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


class Odd:
    """Of a model of somebody else's."""


def ours(body: str) -> None:
    """Run as a line of this package."""
    from reparam_export import calls

    with foreign("a model", "run"):
        exec(compile(body, str(calls.PACKAGE / "models.py"), "exec"), {"Odd": Odd, "torch": torch})


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("missing", NameError),
        ("None.shape", AttributeError),
        ("[].shape", AttributeError),
        ("assert 1 > 2", AssertionError),
    ],
)
def test_a_fault_of_ours_is_not_blamed_on_the_model(body: str, fault: type[Exception]) -> None:
    with pytest.raises(fault):
        ours(body)


@pytest.mark.parametrize(
    "body", ["Odd().shape", "torch.nn.Linear(2, 3).config", "torch.zeros(2) @ torch.zeros(3)", "[][0]", "Odd()()"]
)
def test_what_an_object_of_the_model_has_not_is_told_of_the_model(body: str) -> None:
    with pytest.raises(FusionError, match="a model cannot be run: "):
        ours(body)


def test_a_name_error_in_the_code_of_a_model_is_the_models() -> None:
    with pytest.raises(FusionError, match="a model cannot be run: NameError"), foreign("a model", "run"):
        exec(compile("missing", "/somewhere/else/net.py", "exec"), {})
