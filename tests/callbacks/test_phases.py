"""Phases: order, nesting, timing, and the end after an exception."""

import csv
from pathlib import Path
from typing import Any

import pytest
from helpers import make_ppo, make_trainer

from lit_rlhf import FunctionReward, PromptData
from lit_rlhf.callbacks import IterationProgress, PhaseListener


class Recorder(PhaseListener):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
        self.events.append(f"+{phase}")

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        self.events.append(f"-{phase}")


def test_phases_of_two_iterations_in_order(prompts: PromptData, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, 2, limit_val_batches=1)
    trainer.callbacks.insert(0, recorder)
    trainer.fit(make_ppo(), prompts)
    one = ["+generation", "-generation", "+scoring", "-scoring", "+training", "+evaluation", "-evaluation", "-training"]
    assert recorder.events == one * 2
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["time/training"]]
    assert len(rows) == 2
    for row in rows:
        seconds = [float(row[f"time/{name}"]) for name in ("generation", "scoring", "training")]
        assert all(value > 0 for value in seconds)
        assert float(row["time/samples_per_second"]) == pytest.approx(8 / sum(seconds), rel=1e-4)


def test_a_phase_ends_when_the_reward_raises(prompts: PromptData, tmp_path: Path) -> None:
    def broken(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("judge is down")

    recorder = Recorder()
    trainer = make_trainer(tmp_path, 2)
    trainer.callbacks.insert(0, recorder)
    with pytest.raises(RuntimeError, match="judge is down"):
        trainer.fit(make_ppo(reward=FunctionReward(broken)), prompts)
    assert recorder.events == ["+generation", "-generation", "+scoring", "-scoring"]


def test_the_progress_bar_names_iteration_and_phase(prompts: PromptData, tmp_path: Path) -> None:
    seen = []

    class Watched(IterationProgress):
        def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
            super().on_phase_start(trainer, pl_module, phase)
            seen.append(self._get_train_description(trainer.current_epoch))

    trainer = make_trainer(tmp_path, 2, enable_progress_bar=True, callbacks=[Watched()], enable_checkpointing=False)
    trainer.fit(make_ppo(), prompts)
    assert seen[:3] == ["iteration 1/2 · generation", "iteration 1/2 · scoring", "iteration 1/2 · training"]
    assert seen[-1] == "iteration 2/2 · training"
