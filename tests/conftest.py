"""Fixtures shared by all rooms: the tiny model, small data files, and quick trainers."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Two BLAS threads on a small shared machine spin against each other; the models here are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import PPO, FunctionReward, HydraSFT, LoraArgs, PreferenceData, PromptData, Sampling

torch.set_num_threads(1)

TINY = "random:tiny"
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


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": text, "topic": index} for index, text in enumerate(OPENINGS)])
    pairs = [{"prompt": p, "chosen": " good and fine.", "rejected": " bad and dull, sadly."} for p in OPENINGS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture
def prompts(data_folder: Path) -> PromptData:
    return PromptData(train=str(data_folder / "prompts.jsonl"), validation_size=4)


@pytest.fixture
def pairs(data_folder: Path) -> PreferenceData:
    return PreferenceData(train=str(data_folder / "pairs.jsonl"), validation_size=4, batch_size=4)


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


@pytest.fixture(scope="session")
def hydra_checkpoint(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A short Hydra-SFT run with LoRA; its last.ckpt."""
    folder = tmp_path_factory.mktemp("hydra_sft")
    L.seed_everything(0, verbose=False)
    data = PreferenceData(train=str(data_folder / "pairs.jsonl"), validation_size=4, batch_size=4)
    module = HydraSFT(TINY, adamw(1e-2), lora=LoraArgs(r=4))
    make_trainer(folder, epochs=3, limit_val_batches=1.0).fit(module, data)
    return folder / "last.ckpt"


def make_ppo(**kwargs: Any) -> PPO:
    """A PPO module on the tiny model; with a Python reward unless checkpoints are given."""
    defaults: dict[str, Any] = {
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
    return PPO(TINY, adamw(), **{**defaults, **kwargs})
