"""A candidate is worth the same folded and unfolded, in this process and in others."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reparam_export.errors import UsageError
from reparam_export.training import Candidate, Fused, Search, Supernet, Unfused, accuracy, search, supernet

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Bare(nn.Module):
    """A layer without bias and one that is stored transposed: a path creates a bias on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * 16 * 16, 12, bias=False), Conv1D(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


@pytest.fixture(params=["vit", "bare"])
def net(request: pytest.FixtureRequest) -> Supernet:
    torch.manual_seed(0)
    model = Bare() if request.param == "bare" else timm.create_model("vit_tiny_patch16_224", **SHAPE)
    net = supernet(model.eval(), rank=3, ranks=(1, 3))
    for parameter in net.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return net


def candidates(net: Supernet, count: int = 6) -> list[Candidate]:
    draw = random.Random(0)
    return [net.space.drawn(draw) for _ in range(count)]


def test_the_folded_model_answers_as_the_path_does(net: Supernet) -> None:
    outputs: list[Tensor] = []

    def keep(model: nn.Module) -> float:
        with torch.inference_mode():
            outputs.append(model(IMAGES))
        return 0.0

    fused, unfused = Fused(net, keep), Unfused(net, keep)
    for candidate in candidates(net):
        fused(candidate)
        unfused(candidate)
        found, expected = outputs[-2:]
        exact = copy.deepcopy(net).fix(candidate).model.double()(IMAGES.double()).detach()
        floor = float((expected - exact).abs().max())
        assert float((found - exact).abs().max()) <= 8 * floor
    assert len({tuple(o.flatten().tolist()) for o in outputs[::2]}) == len(candidates(net))


def test_a_candidate_does_not_leave_anything_to_the_next(net: Supernet) -> None:
    batches = [(IMAGES[:48], torch.arange(48) % 3), (IMAGES[48:], torch.arange(48) % 3)]
    fused = Fused(net, accuracy(batches))
    first = [fused(c) for c in candidates(net)]
    assert [fused(c) for c in reversed(candidates(net))] == first[::-1]
    assert len(set(first)) > 1
    assert all(0 <= value <= 1 for value in first)


def test_the_supernet_is_left_as_it_was(net: Supernet) -> None:
    before = copy.deepcopy(net.model.state_dict())
    measure = accuracy([(IMAGES, torch.arange(96) % 3)])
    Fused(net, measure)(candidates(net)[0])
    Unfused(net, measure)(candidates(net)[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.model.state_dict().items())
    assert net.fixed is None
    with pytest.raises(UsageError, match="no defined output"):
        net.model(IMAGES)
    net.fix(candidates(net)[1])
    Unfused(net, measure)(candidates(net)[0])
    assert net.fixed == candidates(net)[1]


def test_training_further_does_not_change_what_is_evaluated(net: Supernet) -> None:
    fused = Fused(net, accuracy([(IMAGES, torch.arange(96) % 3)]))
    first = fused(candidates(net)[0])
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.mul_(3)
    assert fused(candidates(net)[0]) == first


def test_a_search_folder_is_not_taken_over_by_other_weights_or_data(net: Supernet, tmp_path: Path) -> None:
    settings = Search(population=4, select=2, mutations=1, crossovers=1, epochs=1)
    batches = [(IMAGES, torch.arange(96) % 3)]
    fused = Fused(net, accuracy(batches))
    first = search(net.space, fused, settings, folder=tmp_path)
    assert search(net.space, Fused(net, accuracy(batches)), settings, folder=tmp_path) == first
    fused(first.top[-1])  # what was evaluated last does not matter
    assert search(net.space, fused, settings, folder=tmp_path) == first
    with pytest.raises(UsageError, match="another search"):
        search(net.space, Fused(net, accuracy([(IMAGES, torch.arange(96) % 2)])), settings, folder=tmp_path)
    with torch.no_grad():
        net.layers()[1].adapter["Bu"][0, 0] += 1
    with pytest.raises(UsageError, match="another search"):
        search(net.space, Fused(net, accuracy(batches)), settings, folder=tmp_path)


class Alike(nn.Module):
    """Names that start with the name of another layer, as ``blocks.1`` and ``blocks.10`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_head(self.fc(x))


class Counted(Alike):
    """With a state that is no tensor."""

    state: Any = 1

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


FEATURES, CLASSES = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
ONCE = Search(population=2, select=1, mutations=1, crossovers=0, epochs=1)


def test_weights_of_a_layer_whose_name_starts_with_that_of_an_adapted_one_count(tmp_path: Path) -> None:
    net = supernet(Alike().eval(), ["fc"], rank=2)
    measure = accuracy([(FEATURES, CLASSES)])
    search(net.space, Fused(net, measure), ONCE, folder=tmp_path)
    with torch.no_grad():
        net.model.get_submodule("fc_head").get_parameter("weight")[0, 0] += 1
    with pytest.raises(UsageError, match="another search"):
        search(net.space, Fused(net, measure), ONCE, folder=tmp_path)


def test_a_state_that_is_no_tensor_counts_or_is_refused(tmp_path: Path) -> None:
    model = Counted().eval()
    net = supernet(model, ["fc"], rank=2)
    measure = accuracy([(FEATURES, CLASSES)])
    search(net.space, Fused(net, measure), ONCE, folder=tmp_path)
    model.state = 2
    with pytest.raises(UsageError, match="another search"):
        search(net.space, Fused(net, measure), ONCE, folder=tmp_path)
    model.state = Path("data")
    with pytest.raises(UsageError, match="_extra_state"):
        search(net.space, Fused(net, measure), ONCE, folder=tmp_path)


DIFFERENT: dict[str, tuple[Any, Any]] = {  # inputs that a model tells apart
    "a dict": ({"x": FEATURES}, {"x": FEATURES + 1}),
    "a list": ([FEATURES], [FEATURES + 1]),
    "a tuple in a dict": ({"x": (FEATURES, CLASSES)}, {"x": (FEATURES, CLASSES + 1)}),
    "another key": ({"x": FEATURES}, {"y": FEATURES}),
    "an exchange": ({"x": FEATURES, "y": -FEATURES}, {"x": -FEATURES, "y": FEATURES}),
    "a number": ({"x": FEATURES, "scale": 1.0}, {"x": FEATURES, "scale": 2.0}),
    "a string": ({"x": FEATURES, "task": "a"}, {"x": FEATURES, "task": "b"}),
    "nothing": ({"x": FEATURES, "mask": None}, {"x": FEATURES}),
    "an empty list": ({"x": FEATURES, "more": []}, {"x": FEATURES}),
    "a list for a dict": ([FEATURES], {0: FEATURES}),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_the_identity_is_that_of_all_data_however_the_inputs_hold_it(one: Any, other: Any) -> None:
    def identity(inputs: Any) -> str:
        return str(getattr(accuracy([(inputs, CLASSES)]), "identity"))  # noqa: B009

    assert identity(one) == identity(copy.deepcopy(one))
    assert identity(one) != identity(other)


def test_data_whose_content_is_not_known_is_refused_for_a_folder_only(tmp_path: Path) -> None:
    class Mean(Alike):
        def forward(self, x: Any) -> Tensor:
            return super().forward(torch.as_tensor(x["x"]))

    net = supernet(Mean().eval(), ["fc"], rank=2)
    fused = Fused(net, accuracy([({"x": FEATURES.numpy()}, CLASSES)]))
    assert search(net.space, fused, ONCE).evaluated == 2
    with pytest.raises(UsageError, match=r"'x'.* ndarray"):
        search(net.space, fused, ONCE, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


def _doubled(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (2 * inputs[0],)


def _raised(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return (inputs[0] + 1,), named


def test_the_hooks_of_the_model_are_evaluated_too(net: Supernet) -> None:
    net.model.register_forward_pre_hook(_doubled, prepend=True)
    net.model.register_forward_pre_hook(_raised, with_kwargs=True)
    net.model.register_forward_hook(lambda model, inputs, output: output.flip(-1))
    outputs: list[Tensor] = []

    def keep(model: nn.Module) -> float:
        with torch.inference_mode():
            outputs.append(model(IMAGES))
        return 0.0

    fused, candidate = Fused(net, keep), candidates(net)[0]
    fused(candidate)
    Unfused(net, keep)(candidate)
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4)
    assert [*fused.model._forward_pre_hooks.values()] == [_doubled, _raised]  # without the one that draws paths
    assert len(net.model._forward_pre_hooks) == 3


def test_a_candidate_of_another_space_is_refused(net: Supernet) -> None:
    with pytest.raises(UsageError, match="layers"):
        Fused(net, accuracy([(IMAGES, torch.arange(96) % 3)]))(candidates(net)[0][1:])


def test_processes_get_a_copy_of_their_own() -> None:
    torch.manual_seed(0)
    net = supernet(Bare().eval(), rank=2)
    for parameter in net.model.parameters():
        nn.init.normal_(parameter, std=0.3)
    fused = Fused(net, accuracy([(IMAGES, torch.arange(96) % 3)]))
    again = pickle.loads(pickle.dumps(fused))
    assert [again(c) for c in candidates(net)] == [fused(c) for c in candidates(net)]
    settings = Search(population=48, select=4, mutations=12, crossovers=12, epochs=3)
    assert search(net.space, fused, settings, workers=2) == search(net.space, fused, settings)
    assert not any(tensor.is_shared() for tensor in fused.model.state_dict().values())
