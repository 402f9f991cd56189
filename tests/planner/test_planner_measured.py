"""Predictions against what a real run holds, tensor by tensor: every phase of whole PPO iterations."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers import TINY, adamw, count_e, make_trainer, write_jsonl

from lit_rlhf import PPO, SFT, FunctionReward, InstructionData, LoraArgs, PromptData, ReMax, Sampling
from lit_rlhf.planner import PHASES, LiveBytes, Planner, Setting, load_config, make_rows
from lit_rlhf.rollout.phases import PhaseListener

ASSETS = Path(__file__).parents[2] / "lit_rlhf" / "assets" / "tiny"
Peaks = dict[str, int]
Shape = tuple[int, int, int]


class Watch(PhaseListener):
    """Tells the tracker which phase runs, and remembers the shapes of the minibatches."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.shapes: set[Shape] = set()

    def on_phase_start(self, trainer: L.Trainer, pl_module: L.LightningModule, phase: str) -> None:
        self.live.enter(phase)

    def on_phase_end(self, trainer: L.Trainer, pl_module: L.LightningModule, phase: str) -> None:
        self.live.enter("between")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        assert bool(batch.mask.all())
        rows, length = batch.tokens.shape
        self.shapes.add((rows, length - batch.mask.shape[1], batch.mask.shape[1]))


def measure(folder: Path, kind: type = PPO, minibatch_size: int = 4, **kwargs: Any) -> tuple[Peaks, Shape]:
    """Train two iterations of two minibatches; return each phase's peak and (B, P, T)."""
    rows = [{"prompt": "The plot of the film was " * n} for n in (6, 2) * 32]
    live = LiveBytes()
    watch = Watch(live)
    trainer = make_trainer(folder, 2, callbacks=[watch], enable_checkpointing=False, logger=False)
    defaults = {"model": TINY, "reward": FunctionReward(count_e)}
    with live:
        module = kind(
            sampling=Sampling(max_new_tokens=48, min_new_tokens=48),
            optimizer=adamw(),
            seed=0,
            log_samples=0,
            minibatch_size=minibatch_size,
            rollout_size=2 * minibatch_size,
            rollout_batch_size=minibatch_size,
            **{**defaults, **kwargs},
        )
        trainer.fit(module, PromptData(train=write_jsonl(folder / "prompts.jsonl", rows), validation_size=0))
    (shape,) = watch.shapes
    return {phase: live.peak(phase) for phase in PHASES}, shape


def predict(row_name: str, shape: Shape, model: str = TINY, reward_function: bool = True, **kwargs: Any) -> Peaks:
    setting = Setting(
        *(shape[0], None, *shape[1:], "float32"), adamw="forloop", reward_function=reward_function, **kwargs
    )
    (row,) = [row for row in make_rows(["all"], setting) if row.name == row_name]
    prediction = Planner(load_config(model), setting).predict(row)
    return {phase: prediction.total(phase) for phase in prediction.phases}


@pytest.mark.parametrize(
    ("layout", "batch", "checkpointing"),
    [
        ("full", 4, False),
        ("hydra", 2, True),
        ("hydra", 8, False),
        pytest.param("full", 8, True, marks=pytest.mark.slow),
        pytest.param("lora", 4, False, marks=pytest.mark.slow),
        pytest.param("lora", 8, True, marks=pytest.mark.slow),
        pytest.param("dynamic_lora", 8, False, marks=pytest.mark.slow),
        pytest.param("dynamic_lora", 2, True, marks=pytest.mark.slow),
        pytest.param("j_hydra", 4, False, marks=pytest.mark.slow),
        pytest.param("j_hydra", 4, True, marks=pytest.mark.slow),
    ],
)
def test_each_phase_of_a_ppo_run_peaks_where_predicted(
    layout: str, batch: int, checkpointing: bool, tmp_path: Path
) -> None:
    shared = {"lora": LoraArgs(r=4), "gradient_checkpointing": checkpointing}
    measured, shape = measure(tmp_path, layout=layout, minibatch_size=batch, **shared)
    assert predict(layout, shape, **shared) == pytest.approx(measured, rel=0.02)


def test_a_run_with_the_reward_role_and_one_without_critic(tmp_path: Path, hydra_checkpoint: Path) -> None:
    lora = LoraArgs(r=4)
    measured, shape = measure(tmp_path, layout="hydra", lora=lora, reward=None, policy_checkpoint=str(hydra_checkpoint))
    assert predict("hydra", shape, lora=lora, reward_function=False) == pytest.approx(measured, rel=0.02)
    measured, shape = measure(tmp_path, ReMax, layout="hydra", lora=lora)
    # Making some rows greedy takes a few copies of the [B, V] scores more, which are not modeled.
    assert predict("hydra", shape, lora=lora, algorithm="remax") == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_deeper_model_is_predicted_from_its_first_layers(checkpointing: bool, tmp_path: Path) -> None:
    config = json.loads((ASSETS / "config.json").read_text()) | {"num_hidden_layers": 7, "tie_word_embeddings": False}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text(json.dumps(config))
    model, shared = f"random:{tmp_path / 'deep'}", {"lora": LoraArgs(r=4), "gradient_checkpointing": checkpointing}
    for layout in ("hydra", "full"):
        measured, shape = measure(tmp_path, model=model, tokenizer=TINY, layout=layout, **shared)
        assert predict(layout, shape, model, **shared) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("lora", [None, LoraArgs(r=4)], ids=["full", "lora"])
def test_supervised_fine_tuning_peaks_where_predicted(lora: LoraArgs | None, tmp_path: Path) -> None:
    rows = [{"prompt": "The plot " * n, "response": " was good" * 12} for n in (6, 2) * 4]
    live = LiveBytes()
    data = InstructionData(train=write_jsonl(tmp_path / "rows.jsonl", rows), validation_size=0, batch_size=8)
    trainer = make_trainer(tmp_path, 2, callbacks=[], enable_checkpointing=False, logger=False)
    shapes = set()
    with live:
        module = SFT(model=TINY, optimizer=adamw(), lora=lora)
        module.on_train_batch_start = lambda batch, index: shapes.add(  # type: ignore[method-assign]
            (len(batch["mask"]), batch["tokens"].shape[1] - batch["mask"].shape[1], batch["mask"].shape[1])
        )
        module.on_train_start = lambda: live.enter("training")  # type: ignore[method-assign]
        trainer.fit(module, data)
    (shape,) = shapes
    predicted = predict("lora_sft" if lora else "sft", shape, lora=LoraArgs(r=4))
    assert predicted == pytest.approx({"training": live.peak("training")}, rel=0.02)
