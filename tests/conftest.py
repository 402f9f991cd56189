"""Fixtures shared by all rooms."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Two BLAS threads on a small shared machine spin against each other; the models here are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import pytest
import torch
from helpers import OPENINGS, TINY, adamw, make_trainer, write_jsonl

from lit_rlhf import HydraSFT, LoraArgs, PreferenceData, PromptData, RewardModel

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def finish_wandb() -> Iterator[None]:
    """A W&B run that a test leaves open would take in what the next one of this process logs."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


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


@pytest.fixture(scope="session")
def hydra_checkpoint(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A short Hydra-SFT run with LoRA; its last.ckpt."""
    folder = tmp_path_factory.mktemp("hydra_sft")
    L.seed_everything(0, verbose=False)
    data = PreferenceData(train=str(data_folder / "pairs.jsonl"), validation_size=4, batch_size=4)
    module = HydraSFT(model=TINY, optimizer=adamw(1e-2), lora=LoraArgs(r=4))
    make_trainer(folder, epochs=3, limit_val_batches=1.0).fit(module, data)
    return folder / "last.ckpt"


@pytest.fixture(scope="session")
def lora_reward_checkpoint(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, hydra_checkpoint: Path) -> Path:
    """A LoRA reward model on top of the Hydra-SFT policy, as layout ``pe`` uses it."""
    folder = tmp_path_factory.mktemp("reward")
    L.seed_everything(0, verbose=False)
    data = PreferenceData(train=str(data_folder / "pairs.jsonl"), validation_size=4, batch_size=4)
    module = RewardModel(model=TINY, optimizer=adamw(1e-2), lora=LoraArgs(r=4), policy_checkpoint=str(hydra_checkpoint))
    make_trainer(folder, epochs=2).fit(module, data)
    return folder / "last.ckpt"


@pytest.fixture(scope="session")
def full_reward_checkpoint(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, hydra_checkpoint: Path) -> Path:
    """A reward model with a trunk of its own, as layouts ``full``, ``lora`` and ``dynamic_lora`` use it."""
    folder = tmp_path_factory.mktemp("full_reward")
    L.seed_everything(0, verbose=False)
    data = PreferenceData(train=str(data_folder / "pairs.jsonl"), validation_size=4, batch_size=4)
    module = RewardModel(model=TINY, optimizer=adamw(1e-3), policy_checkpoint=str(hydra_checkpoint))
    make_trainer(folder, epochs=2).fit(module, data)
    return folder / "last.ckpt"


@pytest.fixture(scope="session")
def varied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully fine-tuned Hydra-SFT whose policy says one of three things, so that there is something to choose."""
    folder = tmp_path_factory.mktemp("varied")
    said = (" good and fine.", " a feast of scenes, well made.", " not my thing, but all right.")
    rows = [{"prompt": p, "chosen": c, "rejected": " bad and dull, sadly."} for p in OPENINGS for c in said]
    data = PreferenceData(train=write_jsonl(folder / "pairs.jsonl", rows), validation_size=0, batch_size=4)
    L.seed_everything(0, verbose=False)
    make_trainer(folder, 10).fit(HydraSFT(model=TINY, optimizer=adamw(3e-3)), data)
    return folder / "last.ckpt"
