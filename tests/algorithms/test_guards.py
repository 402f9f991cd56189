"""NaN and infinity in reward, log-probs, loss and gradient of real algorithms, on one rank and on two."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, adamw, count_e, make_ppo, make_trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lit_rlhf import PPO, AdaptiveKL, LoraArgs, PreferenceData, PromptData, ReMax, Reward, RewardModel
from lit_rlhf.errors import NonFiniteError
from lit_rlhf.rollout import Experience, Scored

NAN, INF = float("nan"), float("inf")


class BadReward(Reward):
    """Not finite for one sample of the second rollout."""

    def __init__(self, bad: float = NAN) -> None:
        self.calls, self.bad = 0, bad

    def score(self, batch: Scored) -> Tensor:
        self.calls += 1
        scores = torch.tensor(count_e(batch.prompts, batch.responses))
        if self.calls == 2:
            scores[5] = self.bad
        return scores


class BadLoss(PPO):
    """NaN in the third minibatch of the second iteration."""

    here: tuple[int, int] | None = (1, 2)

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * NAN if (self.current_epoch, batch_idx) == self.here else loss


class BadGradient(BadLoss):
    """A finite loss, one number of one gradient infinite."""

    name = ""

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        loss = PPO.training_step(self, batch, batch_idx)
        if (self.current_epoch, batch_idx) == self.here:
            self.name, weight = next((n, p) for n, p in self.named_parameters() if "lora_B.actor" in n)

            def spoil(gradient: Tensor) -> Tensor:
                handle.remove()
                return gradient.flatten().index_fill(0, torch.tensor([0]), INF).view_as(gradient)

            handle = weight.register_hook(spoil)
        return loss


class BadLogProbs(PPO):
    """The sampling policy's log-prob of one token of the second rollout is not a number."""

    field = "log_probs"

    def score(self, experience: Experience, prompts: dict[str, Any]) -> Scored:
        texts = super().score(experience, prompts)
        if self._trainer is not None and self.current_epoch == 1:
            getattr(experience, self.field)[3, 0] = -INF
        return texts


class BadReference(BadLogProbs):
    field = "ref_log_probs"


def fit(module: Any, data: Any, folder: Path, epochs: int = 3, **kwargs: Any) -> Any:
    trainer = make_trainer(folder, epochs, **kwargs)
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_ppo(reward=BadReward()), "iteration 2 of 3, scoring: not finite: reward"),
        (lambda: make_ppo(reward=BadReward(INF)), "iteration 2 of 3, scoring: not finite: reward"),
        (lambda: make_ppo(BadLogProbs), "iteration 2 of 3, scoring: not finite: log-probs of the sampling policy"),
        (lambda: make_ppo(BadReference), "iteration 2 of 3, scoring: not finite: log-probs of the reference"),
        (lambda: make_ppo(BadLoss), "iteration 2 of 3, training, minibatch 3 of 4: the loss is nan"),
        (lambda: make_ppo(BadGradient), "iteration 2 of 3, training, minibatch 3 of 4: the loss is finite, its grad"),
    ],
)
def test_the_run_stops_and_names_the_place_the_samples_and_the_checkpoint(
    make: Callable[[], PPO], message: str, prompts: PromptData, tmp_path: Path
) -> None:
    module = make()
    with pytest.raises(NonFiniteError) as error:
        fit(module, prompts, tmp_path)
    text = str(error.value)
    assert text.startswith(message)
    assert f"last good checkpoint: {tmp_path / 'last.ckpt'}" in text
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    assert "prompt 'The " in text
    assert "response '" in text
    if "scoring" in message:
        sample = 5 if "reward" in message else 3
        assert "1 of 8 samples:" in text
        assert f"    sample {sample}: prompt " in text
    else:
        assert "no single sample is to blame; 4 in all" in text
    if isinstance(module, BadGradient):
        assert f"gradients are not finite: {module.name}" in text


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


class Watch(PPO):
    """Keeps the weights at the end of each iteration."""

    def on_train_epoch_end(self) -> None:
        self.ends = [*getattr(self, "ends", []), {n: v.clone() for n, v in self.state_dict().items()}]


class BadLogProbsWatched(BadLogProbs, Watch):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: make_ppo(Watch, reward=BadReward(), **kwargs),
        lambda **kwargs: make_ppo(BadLogProbsWatched, **kwargs),
    ],
)
def test_a_rollout_that_is_not_finite_changes_nothing_and_the_next_one_trains(
    make: Callable[..., Any], prompts: PromptData, tmp_path: Path
) -> None:
    module = make(on_non_finite="skip_step", kl=AdaptiveKL(0.1, 1.0, 40.0), reward_scaling="running")
    with pytest.warns(match="its optimizer steps are skipped"):
        trainer = fit(module, prompts, tmp_path, epochs=3)
    first, second, third = module.ends
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert any(not torch.equal(third[name], value) for name, value in second.items())
    assert all(value.isfinite().all() for value in third.values())
    moments = trainer.optimizers[0].state_dict()["state"].values()
    assert {int(m["step"]) for m in moments} == {2 * 4}
    assert 0 < module.kl.value < 1
    assert all(number == number for number in module.reward_scaler.state_dict()["total"])
    assert trainer.callback_metrics["train/skipped_steps"] == 0


@pytest.mark.parametrize("kind", [BadLoss, BadGradient])
def test_only_the_step_with_the_bad_number_is_left_out(
    kind: type[BadLoss], prompts: PromptData, tmp_path: Path
) -> None:
    module = make_ppo(kind, on_non_finite="skip_step")
    with pytest.warns(match="minibatch 3 of 4"):
        trainer = fit(module, prompts, tmp_path, epochs=2)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert {int(m["step"]) for m in trainer.optimizers[0].state_dict()["state"].values()} == {7}
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_a_greedy_response_whose_reward_is_nan(prompts: PromptData, tmp_path: Path) -> None:
    class GreedyNan(Reward):
        def score(self, batch: Scored) -> Tensor:
            scores = torch.ones(len(batch.responses))
            if len(batch.responses) == 4:
                scores[1] = NAN
            return scores

    module = make_ppo(ReMax, reward=GreedyNan(), inner_epochs=1, samples_per_prompt=2)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="reward of the greedy response") as error:
        fit(module, prompts, tmp_path)
    assert "2 of 8 samples:\n    sample 2: " in str(error.value)


def test_supervised_stages_name_the_sample_that_a_head_reads_as_nan(pairs: PreferenceData, tmp_path: Path) -> None:
    class Poisoned(RewardModel):
        """From batch 2 on, a word of one response has no embedding."""

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 1:
                self.word = int(batch["tokens"][6][-batch["mask"].shape[1]])
                table = self.backbone.language_model("trunk").get_input_embeddings().weight
                table.data[self.word] = NAN
            return super().training_step(batch, batch_idx)

    module = Poisoned(model=TINY, optimizer=adamw(), lora=LoraArgs(r=4))
    with pytest.raises(NonFiniteError, match="epoch 1 of 1, training, minibatch 2 of 2: the loss is nan") as error:
        fit(module, pairs, tmp_path, epochs=1)
    # The rejected responses, the second half of the batch, begin with this word; the chosen ones do not.
    assert "4 of 8 samples:\n    sample 4: prompt 'The " in str(error.value)
    assert "weights before the step are not finite: backbone.trunks.trunk" in str(error.value)
    assert "(reward)" in str(error.value)


def test_a_learning_rate_far_too_high(prompts: PromptData, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="iteration 1 of 3, training, minibatch 2 of 4: the loss is nan") as error:
        fit(make_ppo(optimizer=adamw(1e37)), prompts, tmp_path)
    assert "last good checkpoint: none was saved yet" in str(error.value)
    assert not list(tmp_path.glob("*.ckpt"))


def test_sampling_from_broken_logits_says_which_weights(prompts: PromptData, tmp_path: Path) -> None:
    class Broken(PPO):
        def on_train_epoch_end(self) -> None:
            table = next(p for n, p in self.backbone.named_parameters() if "embed_tokens" in n)
            table.data.fill_(NAN)

    with pytest.raises(
        NonFiniteError, match="iteration 2 of 3, generation: the policy's logits are not finite"
    ) as error:
        fit(make_ppo(Broken), prompts, tmp_path)
    assert "weights are not finite: backbone.trunks." in str(error.value)


def test_mixed_16_bit_gradients_are_left_to_the_loss_scaler(prompts: PromptData, tmp_path: Path) -> None:
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer = fit(make_ppo(BadGradient), prompts, tmp_path, epochs=2, plugins=[scaled])
    assert {int(m["step"]) for m in trainer.optimizers[0].state_dict()["state"].values()} == {7}


TWO_RANKS = """
import sys
tests, folder, data, where, mode, strategy = sys.argv[1:7]
sys.path[:0] = [tests, tests + "/algorithms"]
import json, os
from pathlib import Path
from helpers import make_ppo, make_trainer
from test_guards import BadLoss, BadReward
from lit_rlhf import PromptData
rank = int(os.environ.get("LOCAL_RANK", "0"))
if where != "loss" or rank == 0:
    BadLoss.here = None
bad = {"reward": float("nan"), "raises": "no number"}.get(where, 0.5) if rank else 0.5
module = make_ppo(BadLoss, reward=BadReward(bad), samples_per_prompt=2, on_non_finite=mode)
trainer = make_trainer(Path(folder), 3, devices=2, strategy=strategy)
try:
    trainer.fit(module, PromptData(train=data, validation_size=4))
except Exception as error:
    Path(folder, f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    raise
whole = [v.full_tensor() if strategy == "fsdp2" else v for v in module.state_dict().values()]
row = {"sums": [float(v.double().sum()) for v in whole],
       "skipped": float(trainer.callback_metrics["train/skipped_steps"]),
       "steps": sorted({int(m["step"]) for m in trainer.optimizers[0].state_dict()["state"].values()})}
Path(folder, f"rank{rank}.json").write_text(json.dumps(row))
"""


def run_to_the_end(command: list[str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command; where it hangs, end its whole process group, so that no rank stays behind."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def run_two_ranks(
    folder: Path, data_folder: Path, where: str, mode: str, strategy: str
) -> subprocess.CompletedProcess[str]:
    folder.joinpath("run.py").write_text(TWO_RANKS)
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, str(folder / "run.py"), tests, str(folder), str(data_folder / "prompts.jsonl")]
    return run_to_the_end([*command, where, mode, strategy])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "NonFiniteError: iteration 2 of 3, training, minibatch 3 of 4: rank 1: the loss is nan"),
        ("reward", "NonFiniteError: iteration 2 of 3, scoring: rank 1: not finite: reward"),
        ("raises", "RuntimeError: rank 1 failed: TypeError: "),
    ],
)
def test_two_ranks_stop_together_when_only_one_sees_it(
    where: str, message: str, strategy: str, data_folder: Path, tmp_path: Path
) -> None:
    assert run_two_ranks(tmp_path, data_folder, where, "raise", strategy).returncode != 0
    first, second = ((tmp_path / f"error{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith(message)
    if where == "raises":
        assert second.startswith("TypeError: can't assign a str")
    else:
        assert first == second
        assert "prompt 'The " in first
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "steps", "strategy"), [("loss", 11, "ddp"), ("reward", 8, "ddp"), ("loss", 11, "fsdp2")]
)
def test_two_ranks_leave_the_same_step_out(
    where: str, steps: int, strategy: str, data_folder: Path, tmp_path: Path
) -> None:
    done = run_two_ranks(tmp_path, data_folder, where, "skip_step", strategy)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["steps"] == [steps]
    assert all(number == number for number in first["sums"])
