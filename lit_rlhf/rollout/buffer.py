"""The rollout buffer: one Lightning epoch is one RL iteration."""

import os
import random
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_rlhf.checkpoints import model_checkpoints
from lit_rlhf.errors import ConfigError
from lit_rlhf.rollout.experience import Experience, PromptBatch, Sample
from lit_rlhf.rollout.length_groups import LengthGroup, length_groups
from lit_rlhf.rollout.policy import as_policy
from lit_rlhf.strategies.ranks import trainer_of


def iteration_seed(seed: int, iteration: int, rank: int) -> int:
    """Return the seed of one iteration on one rank; different arguments give different streams."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1)[0])


def reseed(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class PromptSource(Protocol):
    """What a data module must have to be sampled from."""

    num_prompts: int

    def prompt_batch(self, indices: list[int]) -> PromptBatch:
        """Return the prompts of these rows: ``tokens``, ``attention_mask``, ``prompts``, ``columns``."""


def prompt_data(trainer: Trainer) -> PromptSource | None:
    """Return the trainer's data module if it holds prompts."""
    data = getattr(trainer, "datamodule", None)
    return cast(PromptSource, data) if hasattr(data, "prompt_batch") else None


def _saves_inside_an_iteration(callback: ModelCheckpoint) -> str | None:
    """Return what is wrong with when a ModelCheckpoint saves, None if it saves at the ends of iterations."""
    if callback._every_n_train_steps or callback._train_time_interval is not None:
        return (
            "ModelCheckpoint saves by train steps or by time, which can fall inside an RL iteration, where a "
            "run cannot be resumed exactly. Use every_n_epochs: one epoch is one iteration"
        )
    if callback._save_on_train_epoch_end is False:
        return "ModelCheckpoint needs save_on_train_epoch_end: true (or unset) for on-policy training"
    return None


class RolloutBuffer(Callback):
    """Fills itself at the start of each epoch with a rollout, and is the loader of that epoch's minibatches.

    It reseeds every iteration from (seed, iteration, rank). That alone makes a resumed run continue with the same
    numbers: no RNG state is saved.

    An iteration's prompts, those of all ranks together, follow from the seed and their number alone. So a run may be
    resumed on another number of ranks if ``rollout_size`` times ranks stays what it was: every iteration draws the
    prompts that it would have drawn. The responses to them are sampled by other streams.

    Args:
        rollout_size: Responses that each rank samples per iteration.
        minibatch_size: Responses in one minibatch.
        inner_epochs: Passes over the rollout.
        seed: Base seed; a resumed run keeps the seed it began with. None takes that of ``seed_everything``, or 0.
        samples_per_prompt: Responses to each prompt; divides ``rollout_size``.
        group_by_length: Minibatches of samples of similar length, the same ones in every inner epoch.
    """

    def __init__(
        self,
        rollout_size: int,
        minibatch_size: int,
        inner_epochs: int,
        seed: int | None,
        samples_per_prompt: int = 1,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        self.rollout_size = rollout_size
        self.samples_per_prompt = samples_per_prompt
        self.minibatch_size = minibatch_size
        self.inner_epochs = inner_epochs
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.group_by_length = group_by_length
        self.experience: Experience | None = None
        self.samples: list[Sample] = []
        self._sampler: DistributedSampler[int] | None = None
        self._order_seed = 0
        self._counts = torch.ones(0)
        self._prompts_in_data = 0
        self._ranks = 1
        self._accumulated = 1

    @property
    def num_prompts(self) -> int:
        """Prompts a rank draws for one iteration."""
        return self.rollout_size // self.samples_per_prompt

    def __len__(self) -> int:
        """Return the number of minibatches of one iteration: constant, known before the first rollout."""
        return self.inner_epochs * (self.rollout_size // self.minibatch_size)

    def __iter__(self) -> Iterator[Experience]:
        """Yield shuffled minibatches, lazily: Lightning calls ``iter`` before the rollout hook has run."""
        if self.experience is None:
            raise RuntimeError(
                "the rollout buffer is empty: it was iterated outside a training epoch, or a checkpoint was saved in "
                "the middle of an iteration"
            )
        for group, count in zip(self._order(), self._counts, strict=True):
            # A rollout of one minibatch keeps its order and its tensors: the loss may reuse the pass that scored it.
            minibatch = self.experience if len(self) == 1 else group.take(self.experience)
            yield minibatch.replace(count=count)

    def _order(self) -> list[LengthGroup]:
        """Return the rows of each of the iteration's minibatches, and the columns they need."""
        assert self.experience is not None
        generator = torch.Generator().manual_seed(self._order_seed)
        if self.group_by_length:
            groups = length_groups(self.experience, self.minibatch_size)
            return [
                groups[i] for _ in range(self.inner_epochs) for i in torch.randperm(len(groups), generator=generator)
            ]
        responses = self.experience.mask.shape[1]
        prompts = self.experience.tokens.shape[1] - responses
        orders = [torch.randperm(self.rollout_size, generator=generator) for _ in range(self.inner_epochs)]
        rows = [index for order in orders for index in order.split(self.minibatch_size)]
        return [LengthGroup(index.to(self.experience.tokens.device), prompts, responses) for index in rows]

    def _count_tokens(self, trainer: Trainer) -> Tensor:
        """Return ``[len(self)]`` float: the divisor of each minibatch's token losses, see :class:`Experience`."""
        assert self.experience is not None
        lengths = self.experience.mask.sum(dim=1).float()
        counts = torch.stack([lengths[group.rows].sum() for group in self._order()])
        counts = trainer.strategy.reduce(counts, reduce_op="mean")
        steps = counts.split(trainer.accumulate_grad_batches)
        return torch.cat([step.mean().expand(len(step)) for step in steps])

    def problems(self, module: LightningModule) -> list[str]:
        """Return what is wrong with the sizes and, where it is about to fit, with the trainer and its data.

        Args:
            module: The on-policy module.

        Returns:
            One line per problem.
        """
        counts = ("rollout_size", "samples_per_prompt", "minibatch_size", "inner_epochs")
        found = [f"{n} must be positive, got {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        for name in ("minibatch_size", "samples_per_prompt"):
            if (part := getattr(self, name)) > 0 and self.rollout_size % part:
                found.append(f"rollout_size {self.rollout_size} must be a multiple of {name} {part}")
        name = type(module).__name__
        if self.inner_epochs != 1 and getattr(module, "one_update", False):
            found.append(f"inner_epochs must be 1 for {name}, which has no policy ratio; got {self.inner_epochs}")
        trainer = trainer_of(module)
        if found or trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return found
        return self._trainer_problems(trainer, name)

    def _trainer_problems(self, trainer: Trainer, module_name: str) -> list[str]:
        found = [problem for c in model_checkpoints(trainer) if (problem := _saves_inside_an_iteration(c))]
        if len(self) % trainer.accumulate_grad_batches:
            found.append(
                f"accumulate_grad_batches {trainer.accumulate_grad_batches} must divide the {len(self)} minibatches "
                "of an iteration (inner_epochs * rollout_size / minibatch_size); else its last step would be smaller"
            )
        data = prompt_data(trainer)
        if data is None:
            return [*found, f"{module_name} needs a PromptData datamodule (or one with prompt_batch)"]
        needed = self.num_prompts * trainer.world_size
        if data.num_prompts < needed:
            found.append(
                f"rollout_size {self.rollout_size} with {self.samples_per_prompt} response(s) per prompt on "
                f"{trainer.world_size} rank(s) needs at least {needed} training prompts; the data has "
                f"{data.num_prompts} (after holding out validation_size). Lower rollout_size or validation_size, or "
                "add prompts"
            )
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the numbers of prompts and ranks; :meth:`problems` returns what does not fit."""
        if stage != "fit":
            return
        for callback in model_checkpoints(trainer):
            # Lightning's default saves after validation, inside the epoch, when validation is not run every epoch.
            if callback._save_on_train_epoch_end is None:
                callback._save_on_train_epoch_end = True
        data = prompt_data(trainer)
        self._prompts_in_data = 0 if data is None else data.num_prompts
        self._ranks, self._accumulated = trainer.world_size, trainer.accumulate_grad_batches
        self._sampler = DistributedSampler(
            range(self._prompts_in_data),  # type: ignore[arg-type]
            num_replicas=trainer.world_size,
            rank=trainer.global_rank,
            seed=self.seed,
            drop_last=True,
        )

    def prompt_indices(self, iteration: int) -> list[int]:
        """Return this rank's prompts of an iteration: consecutive slices of a fresh shuffle per pass."""
        assert self._sampler is not None
        per_pass = len(self._sampler) // self.num_prompts
        self._sampler.set_epoch(iteration // per_pass)
        start = (iteration % per_pass) * self.num_prompts
        return list(self._sampler)[start : start + self.num_prompts]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of updates that are off-policy, where no ratio corrects for it."""
        updates = len(self) // trainer.accumulate_grad_batches
        if getattr(pl_module, "one_update", False) and updates > 1:
            rank_zero_warn(
                f"{type(pl_module).__name__} has no policy ratio, so only the first of an iteration's {updates} "
                f"updates is on-policy. Set trainer.accumulate_grad_batches to {len(self)}"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the iteration's rollout with the current policy."""
        seed = iteration_seed(self.seed, trainer.current_epoch, trainer.global_rank)
        reseed(seed)
        self._order_seed = seed
        data = prompt_data(trainer)
        assert data is not None
        prompts = trainer.strategy.batch_to_device(data.prompt_batch(self.prompt_indices(trainer.current_epoch)))
        # A callback runs outside the precision plugin; old log-probs must come from the arithmetic of training.
        with trainer.precision_plugin.forward_context():
            self.experience, self.samples = as_policy(pl_module).rollout(prompts)
        if len(self.experience) != self.rollout_size:
            raise RuntimeError(
                f"the rollout holds {len(self.experience)} samples, but the epoch was planned for {self.rollout_size}"
            )
        self._counts = self._count_tokens(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Free the forward pass that was recorded for this loss, where the loss did not use it."""
        as_policy(pl_module).backbone.forget()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the rollout and the gradients; the next generation needs neither."""
        self.experience = None
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of the KL controller and of the reward's scaling, plain numbers only."""
        policy = as_policy(pl_module)
        checkpoint["controllers"] = {"kl": policy.kl.state_dict(), "reward_scaler": policy.reward_scaler.state_dict()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore their state."""
        policy = as_policy(pl_module)
        policy.kl.load_state_dict(checkpoint["controllers"]["kl"])
        policy.reward_scaler.load_state_dict(checkpoint["controllers"]["reward_scaler"])

    def state_dict(self) -> dict[str, Any]:
        """Return what decides which prompts an iteration draws; the rest follows from the iteration."""
        return {
            "seed": self.seed,
            "ranks": self._ranks,
            "rollout_size": self.rollout_size,
            "samples_per_prompt": self.samples_per_prompt,
            "prompts_in_data": self._prompts_in_data,
            "step_size": self._step_size,
        }

    @property
    def _step_size(self) -> int:
        """Responses of one optimizer step, over all ranks."""
        return self.minibatch_size * self._accumulated * self._ranks

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base seed of the interrupted run.

        Raises:
            ValueError: The responses of an iteration (of all ranks) or the prompts to choose from changed: the
                iterations would draw other prompts.
        """
        self.seed = int(state_dict["seed"])
        if self._sampler is None:  # validation or prediction, which draw no rollouts
            return
        for name, now in (("samples_per_prompt", self.samples_per_prompt), ("prompts_in_data", self._prompts_in_data)):
            if (before := state_dict.get(name, now)) != now:
                raise ConfigError(f"cannot resume: {name} was {before} and is now {now}")
        self._check_rollout_size(int(state_dict["rollout_size"]), int(state_dict.get("ranks", self._ranks)))
        if (before := state_dict.get("step_size", self._step_size)) != self._step_size:
            rank_zero_warn(
                f"resuming with {self._step_size} responses per optimizer step, where the checkpoint's run took "
                f"{before}: minibatch_size {self.minibatch_size} * accumulate_grad_batches {self._accumulated} * "
                f"{self._ranks} rank(s). Change one of them, unless the new step size is intended"
            )
        self._sampler.seed = self.seed

    def _check_rollout_size(self, before: int, ranks: int) -> None:
        total = before * ranks
        if self.rollout_size * self._ranks == total:
            return
        if ranks == self._ranks:
            raise ConfigError(f"cannot resume: rollout_size was {before} and is now {self.rollout_size}")
        fits = total % (self._ranks * self.samples_per_prompt) == 0
        advice = f"Set rollout_size to {total // self._ranks}" if fits else "Choose a number of ranks that divides it"
        raise ConfigError(
            f"cannot resume: the checkpoint's run sampled {total} responses per iteration (rollout_size {before} on "
            f"{ranks} rank(s)), this one would sample {self.rollout_size * self._ranks} (rollout_size "
            f"{self.rollout_size} on {self._ranks}). {advice}: then every iteration draws the same prompts"
        )
