"""Rewards: the reward role, a Python function, or a weighted sum of rewards."""

import contextvars
import math
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import ConfigError, RewardError


@dataclass
class Scored:
    """What a reward sees of N responses.

    Args:
        prompts: Prompt texts.
        responses: Response texts, special tokens removed.
        columns: The data set's other columns, each a list of N.
        role_scores: ``[N]`` float32, the reward role's scores; None if no reward needs them.
    """

    prompts: list[str]
    responses: list[str]
    columns: Mapping[str, list[Any]]
    role_scores: Tensor | None = None


class Reward(ABC):
    """Rates whole responses. Subclass it, or use :class:`FunctionReward`, and name the class path in YAML."""

    needs_reward_role: bool = False

    @abstractmethod
    def score(self, batch: Scored) -> Tensor:
        """Return ``[N]`` float32, higher is better."""


class RoleReward(Reward):
    """The learned reward: the layout's reward role."""

    needs_reward_role = True

    def score(self, batch: Scored) -> Tensor:
        """Return the reward role's scores."""
        if batch.role_scores is None:
            raise ConfigError("RoleReward: the reward role was not run")
        return batch.role_scores


class FunctionReward(Reward):
    """A Python function, such as a rule, a classifier or a remote judge.

    Args:
        function: Import path of ``f(prompts, responses, **columns) -> sequence of float``.
        timeout: Seconds that one call on the whole batch may take; None waits forever. With a timeout the function runs
            in its own thread. Python cannot kill a thread: one that hangs ends with the process.
    """

    def __init__(self, function: Callable[..., Sequence[float]], timeout: float | None = None) -> None:
        super().__init__()
        if timeout is not None and timeout <= 0:
            raise ConfigError(f"timeout must be positive or null, got {timeout}")
        self.function = function
        self.timeout = timeout

    @property
    def name(self) -> str:
        """The function's name in messages."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def score(self, batch: Scored) -> Tensor:
        """Return the function's numbers.

        Raises:
            RewardError: It raised, with its exception as the cause, or did not return in time.
            ValueError: It returned the wrong count, or something that is not a finite number; the sample is named.
        """
        name = self.name
        if taken := {"prompts", "responses"} & set(batch.columns):
            raise ConfigError(
                f"reward function {name}: the data's column {sorted(taken)[0]!r} has the name of an argument"
            )
        try:
            values = self._call(batch) if self.timeout is None else self._call_in_time(batch, self.timeout)
        except RewardError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            columns = "unexpected keyword argument" in str(error) and any(repr(c) in str(error) for c in batch.columns)
            hint = "; it gets the data's columns as keyword arguments, so let it take **columns " if columns else " "
            raise RewardError(
                f"reward function {name} raised {type(error).__name__}: {error}{hint}"
                f"({frame.filename}, line {frame.lineno}) {_first_of(batch)}"
            ) from error
        if len(values) != len(batch.responses):
            raise ConfigError(
                f"reward function {name} returned {len(values)} numbers for {len(batch.responses)} responses"
            )
        for index, value in enumerate(values):
            try:
                finite = math.isfinite(value) and abs(value) <= torch.finfo(torch.float32).max
            except (TypeError, OverflowError):
                finite = False
            if not finite:
                where = f"prompt {batch.prompts[index]!r}, response {batch.responses[index]!r}"
                raise ConfigError(f"reward function {name} returned {value!r} for sample {index} ({where})")
        return torch.tensor([float(value) for value in values], dtype=torch.float32)

    def _call(self, batch: Scored) -> list[Any]:
        values = self.function(batch.prompts, batch.responses, **batch.columns)
        if not hasattr(values, "__iter__"):
            raise RewardError(f"reward function {self.name} returned {values!r}, not one number per response")
        return list(values)

    def _call_in_time(self, batch: Scored, seconds: float) -> list[Any]:
        """Call the function in a thread that has the caller's gradient mode, device and context variables."""
        values: list[Any] = []
        errors: list[BaseException] = []
        context, gradients = contextvars.copy_context(), torch.is_grad_enabled()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                with torch.set_grad_enabled(gradients):
                    values.extend(context.run(self._call, batch))
            except BaseException as error:  # handed to the caller, whatever it is
                errors.append(error)

        thread = threading.Thread(target=work, name=f"reward function {self.name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise RewardError(
                f"reward function {self.name} did not return within {seconds:g} s {_first_of(batch)}. Raise `timeout`, "
                "or make the function return a score in time"
            )
        if errors:
            raise errors[0]
        return values


def _first_of(batch: Scored) -> str:
    """Return the size and the first sample of a batch, shortened."""
    if not batch.responses:
        return "(an empty batch)"
    texts = [text if len(text) <= 120 else text[:120] + " ..." for text in (batch.prompts[0], batch.responses[0])]
    return f"(a batch of {len(batch.responses)}; the first: prompt {texts[0]!r}, response {texts[1]!r})"


class WeightedReward(Reward):
    """A weighted sum of rewards.

    Args:
        rewards: The rewards.
        weights: One factor each.
    """

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        super().__init__()
        if len(rewards) != len(weights) or not rewards:
            raise ConfigError(f"WeightedReward: {len(rewards)} rewards need as many weights, got {len(weights)}")
        self.rewards, self.weights = rewards, weights
        self.needs_reward_role = any(reward.needs_reward_role for reward in rewards)

    def score(self, batch: Scored) -> Tensor:
        """Return the sum."""
        parts = [reward.score(batch) * weight for reward, weight in zip(self.rewards, self.weights, strict=True)]
        device = batch.role_scores.device if batch.role_scores is not None else parts[0].device
        return torch.stack([part.to(device) for part in parts]).sum(dim=0)
