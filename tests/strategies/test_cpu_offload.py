"""FSDP2 with CPU offload, as far as a machine without GPUs can show it: the same run, and where things would lie."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_ppo
from lightning.pytorch.plugins.precision import MixedPrecision

from lit_rlhf.errors import StrategyError
from lit_rlhf.strategies import FSDP2Strategy, check_strategy, offload_backend

RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from helpers import make_ppo, make_trainer
from lit_rlhf import PromptData
from lit_rlhf.strategies import FSDP2Strategy

folder, data, policy, jobs = Path(sys.argv[2]), *sys.argv[3:5], json.loads(sys.argv[5])

class Watch(L.Callback):
    def __init__(self, name):
        self.name, self.metrics = name, []
    def on_train_epoch_end(self, trainer, module):
        values = {n: repr(float(v)) for n, v in trainer.callback_metrics.items() if not n.startswith("time/")}
        self.metrics.append(values)
    def on_train_end(self, trainer, module):
        weights = {n: p.full_tensor().detach().clone() for n, p in module.backbone.named_parameters()}
        units = [m._get_fsdp_state()._fsdp_param_groups for m in module.modules() if isinstance(m, FSDPModule)]
        offloaded = [p.offload_to_cpu for groups in units for group in groups for p in group.fsdp_params]
        if trainer.global_rank == 0:
            row = {"metrics": self.metrics, "units": len(units), "offloaded": offloaded}
            (folder / f"{self.name}.json").write_text(json.dumps(row))
            torch.save(weights, folder / f"{self.name}.pt")

for name, epochs, settings, checkpoint in jobs:
    L.seed_everything(0, verbose=False)
    module = make_ppo(policy_checkpoint=policy, seed=3, rollout_size=4, minibatch_size=2)
    keeper = ModelCheckpoint(folder, filename=name, enable_version_counter=False)
    trainer = make_trainer(folder / "logs" / name, epochs, devices=2, strategy=FSDP2Strategy(**settings),
                           callbacks=[keeper, Watch(name)], gradient_clip_val=0.05, accumulate_grad_batches=2)
    resume = folder / checkpoint if checkpoint else None
    trainer.fit(module, PromptData(train=data, validation_size=0), ckpt_path=resume)
"""

ON, FOLDER = {"cpu_offload": True}, {"save_distributed_checkpoint": True}
JOBS: list[tuple[str, int, dict[str, Any], str]] = [
    ("plain", 3, {}, ""),
    ("offload", 3, ON, ""),
    ("plain_file", 2, {}, ""),
    ("offload_file", 2, ON, ""),
    ("offload_folder", 2, ON | FOLDER, ""),
    ("offload_from_plain", 3, ON, "plain_file.ckpt"),
    ("plain_from_offload", 3, {}, "offload_file.ckpt"),
    ("offload_from_folder", 3, ON, "offload_folder.ckpt"),
    ("plain_from_folder", 3, {}, "offload_folder.ckpt"),
]


@pytest.mark.slow
def test_an_offloaded_run_is_the_run_that_it_would_be_and_each_resumes_the_other(
    data_folder: Path, hydra_checkpoint: Path, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    arguments = [str(Path(__file__).parents[1]), str(tmp_path), str(data_folder / "prompts.jsonl")]
    arguments += [str(hydra_checkpoint), json.dumps(JOBS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], timeout=400, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name, *_ in JOBS}
    weights = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name, *_ in JOBS}
    for name, epochs, settings, _ in JOBS:
        assert rows[name]["units"] > 2
        assert set(rows[name]["offloaded"]) == {"cpu_offload" in settings}, name
        if epochs == 3:
            assert rows[name]["metrics"][-1] == rows["plain"]["metrics"][-1], name
            torch.testing.assert_close(weights[name], weights["plain"], rtol=0, atol=0)
    assert any(not torch.equal(weights["plain"][n], w) for n, w in weights["plain_file"].items())


def test_what_cannot_be_offloaded_is_refused_in_one_line() -> None:
    strategy, plain = FSDP2Strategy(cpu_offload=True), FSDP2Strategy()
    strategy._device_mesh = plain._device_mesh = SimpleNamespace(mesh_dim_names=())  # type: ignore[assignment]
    check_strategy(strategy)
    check_strategy(plain, quantized=True)
    with pytest.raises(StrategyError, match=r"bitsandbytes' weights only work on the GPU\. Remove cpu_offload"):
        check_strategy(strategy, quantized=True)
    strategy.precision_plugin = MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(StrategyError, match="cpu_offload and precision 16-mixed cannot be combined"):
        check_strategy(strategy)


def test_gpus_get_a_backend_for_either_kind_of_tensor() -> None:
    assert offload_backend("cpu", None) is None
    assert offload_backend("cuda", None) == "cpu:gloo,cuda:nccl"
    assert offload_backend("cuda", "cpu:gloo,cuda:nccl") == "cpu:gloo,cuda:nccl"
    with pytest.raises(StrategyError, match="Leave it out, or set cpu:gloo,cuda:nccl"):
        offload_backend("cuda", "nccl")


def test_buffers_go_to_the_device_and_parameters_stay() -> None:
    strategy = FSDP2Strategy(cpu_offload=True)
    strategy.parallel_devices = [torch.device("meta")]  # a device that is not the CPU's, and is everywhere
    strategy.cluster_environment = type("One", (), {"local_rank": lambda self: 0})()  # type: ignore[assignment]
    module = make_ppo()
    module.configure_model()
    strategy.model = module
    strategy.model_to_device()
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    buffers = [buffer for _, buffer in module.named_buffers()]
    assert len(buffers) > 0
    assert {buffer.device.type for buffer in buffers} == {"meta"}
    assert module.device.type == "meta"


@pytest.mark.slow
def test_on_a_device_that_pretends_shards_stay_on_the_cpu_and_layers_compute_on_the_device() -> None:
    command = [sys.executable, str(Path(__file__).parent / "fake_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "parameters": ["cpu"], "gradients": ["cpu"], "norm": "cpu", "moments": ["cpu"],
        "buffers": ["gpu"], "module": "gpu", "loss": "gpu", "weights in layers, inputs": [["gpu", "gpu"]],
        "taken from a file": ["cpu"], "gathered for a file": ["cpu"], "weights for a file": ["cpu"],
    }  # fmt: skip
