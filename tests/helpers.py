"""What the tests of several rooms build: the tiny model's settings, data files, trainers, a PPO module."""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import PPO, FunctionReward, LoraArgs, Sampling
from lit_rlhf.backbone import quantization

TINY = "random:tiny"
LAYOUTS = ["full", "lora", "dynamic_lora", "pe", "j_hydra", "hydra"]
OPENINGS = [
    f"The {thing} of the {film} was"
    for thing in ("plot", "music", "cast", "end")
    for film in ("film", "sequel", "show")
]


def adamw(lr: float = 1e-3) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def count_e(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward that tiny models can learn: how often the letter e occurs."""
    return [response.count("e") / 10 for response in responses]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_trainer(folder: Path, epochs: int = 2, **kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": CSVLogger(folder, name="", version=""),
        "callbacks": [ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**defaults, **kwargs})


def make_ppo(kind: type[PPO] = PPO, **kwargs: Any) -> PPO:
    """A PPO module on the tiny model; with a Python reward unless checkpoints are given."""
    defaults: dict[str, Any] = {
        "model": TINY,
        "layout": "hydra",
        "lora": LoraArgs(r=4),
        "sampling": Sampling(max_new_tokens=8),
        "rollout_size": 8,
        "minibatch_size": 4,
        "inner_epochs": 2,
        "seed": 7,
    }
    if "policy_checkpoint" not in kwargs and kwargs.get("layout") != "full":
        defaults["reward"] = FunctionReward(count_e)
    return kind(optimizer=kwargs.pop("optimizer", adamw()), **{**defaults, **kwargs})


def silence(module: Any) -> None:
    """Let a module compute losses without a trainer."""
    module._trainer = None
    module.log = lambda *args, **kwargs: None


@contextmanager
def quantization_device() -> Iterator[torch.device]:
    """Let quantized trunks run inside the block: on CUDA as they are, elsewhere by bitsandbytes' plain CPU kernels.

    On CPUs with bfloat16 units bitsandbytes repacks 4-bit weights at the first pass of a module in eval mode, which
    ours is for good, and has no gradient for that form. On CUDA there is no such form.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_device_is_there", lambda: True)
        patch.setattr(importlib.import_module("bitsandbytes.nn.modules"), "has_avx512bf16", lambda: False)
        yield torch.device("cpu")
