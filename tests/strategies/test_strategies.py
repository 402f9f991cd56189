"""Strategies that would train wrongly are refused by one line, before weights are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import make_ppo
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_rlhf.algorithms import base
from lit_rlhf.cli import main
from lit_rlhf.strategies import FSDP2Strategy, StrategyError, check_strategy, data_parallel_mesh, refuse_strategy

NAMES = StrategyRegistry.available_strategies()
REFUSED = [name for name in NAMES if name.startswith(("deepspeed", "fsdp")) and name != "fsdp2"]


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Two data-parallel times two tensor-parallel ranks, of which this process is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*REFUSED, "FSDPStrategy", "lightning.pytorch.strategies.DeepSpeedStrategy"])
def test_fsdp1_and_deepspeed_are_refused_by_every_name(name: str) -> None:
    with pytest.raises(StrategyError, match=r"experiments/strategies/fsdp2\.yaml"):
        refuse_strategy(name)
    assert (Path(__file__).parents[2] / "experiments/strategies/fsdp2.yaml").is_file()


def test_other_strategies_pass() -> None:
    assert len(REFUSED) >= 8
    assert "fsdp2" in NAMES
    for name in ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2", "ModelParallelStrategy"):
        refuse_strategy(name)
    check_strategy(DDPStrategy())


@pytest.mark.parametrize("name", ["deepspeed_stage_2", "fsdp"])
def test_the_command_line_says_it_in_one_line(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {class_path: SFT, init_args: {model: /nowhere, optimizer: {class_path: torch.optim.SGD, "
        "init_args: {lr: 0.1}}}}\ndata: {class_path: InstructionData, init_args: {train: /nowhere.jsonl}}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", str(config), "--trainer.strategy", name])
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-rlhf:")]
    assert len(lines) == 1
    assert f"strategy {name} is" in lines[0]


def test_a_tensor_parallel_mesh_is_refused_before_the_model_is_built(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "build_backbone", lambda *args, **kwargs: pytest.fail("the model was built"))
    strategy = ModelParallelStrategy()
    strategy._device_mesh = mesh
    with pytest.raises(StrategyError, match=r"tensor_parallel_size is 2 .*fsdp2\.yaml.*data_parallel_size: 4"):
        check_strategy(strategy)
    module = make_ppo()
    module._device_mesh = mesh
    with pytest.raises(StrategyError, match="tensor_parallel_size is 2"):
        module.configure_model()


def test_a_data_parallel_mesh_is_taken(mesh: Any) -> None:
    flat = init_device_mesh("cpu", (4, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    assert data_parallel_mesh(flat).size() == 4
    assert data_parallel_mesh(flat["data_parallel"]).size() == 4
    assert FSDP2Strategy(reshard_after_forward=False).reshard_after_forward is False
