"""Files of one rank of several: each is said to be that, and what puts them together; nothing of one part is taken for the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reparam_export as rx
from reparam_export.errors import CheckpointError
from reparam_export.state import load_state

STATE = {
    f"base_model.model.{module}.lora_{side}.default.weight": torch.ones(shape)
    for module in "xy"
    for side, shape in (("A", (2, 6)), ("B", (8, 2)))
}
DISTRIBUTED = """
import sys, torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
state = torch.load(sys.argv[1])
dcp.save(state, checkpoint_id=sys.argv[2] + "/pytorch_model_fsdp_0")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.save({n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in state.items()}, sys.argv[2] + "/whole.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FSDP writes: a distributed checkpoint, and DTensors in a file of one rank."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.save(STATE, folder / "plain.pt")
    command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, str(folder / "plain.pt"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["model_world_size_2_rank_0.pt"],
        ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"],
        ["rank_0.bin", "rank_1.bin", "rank_2.bin"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
    ],
)
def test_the_file_of_one_rank_is_named_with_what_merges_them(names: list[str], tmp_path: Path) -> None:
    for name in names:
        torch.save(STATE, tmp_path / name)
    for place in (tmp_path, tmp_path.parent / tmp_path.name / names[0]):
        with pytest.raises(CheckpointError, match=r"in parts.*verl\.model_merger merge.*zero_to_fp32") as caught:
            rx.read(place, settings={"lora_alpha": 3})
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "names",
    [
        ["model_world_size_1_rank_0.pt"],
        ["mp_rank_00_model_states.pt"],
        ["lora_rank_8.pt", "lora_rank_16.pt"],
        ["lora_rank_1.pt", "lora_rank_2.pt"],
        ["rank_0.pt", "frank_1.pt"],
    ],
)
def test_one_file_that_has_all_is_read_whatever_its_name(names: list[str], tmp_path: Path) -> None:
    for name in names:
        torch.save(STATE, tmp_path / name)
    assert len(rx.read(tmp_path / names[0], settings={"lora_alpha": 3}).adapters) == 2


@pytest.mark.parametrize("place", ["pytorch_model_fsdp_0", ".", "pytorch_model_fsdp_0/__0_0.distcp"])
def test_a_distributed_checkpoint_is_put_together_by_what_the_message_says(
    place: str, distributed: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"SHARDED_STATE_DICT") as caught:
        rx.read(distributed / place, settings={"lora_alpha": 3})
    command = str(caught.value).split("`")[1].split()
    assert command[:2] == ["python", "-m"]
    subprocess.run(
        [sys.executable, "-W", "ignore", *command[1:-1], str(tmp_path / "model.pt")], check=True, capture_output=True
    )
    assert len(rx.read(tmp_path / "model.pt", settings={"lora_alpha": 3}).adapters) == 2


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("act", [load_state, lambda path: rx.read(path, settings={"lora_alpha": 3})])
def test_tensors_of_torch_distributed_are_not_taken_for_whole(act: Any, known: bool, distributed: Path) -> None:
    """Once torch knows them they load, with the whole's shape and the numbers of one part."""
    if known:
        import torch.distributed.tensor  # noqa: F401
    with pytest.raises(CheckpointError, match=r"tensors of torch\.distributed: one part"):
        act(distributed / "whole.pt")
