"""A rollout, minibatches and a module in training of typed numbers, for tests that load no model."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_ppo
from torch import Tensor

from lit_rlhf import (
    Experience,
    FunctionReward,
    OnPolicyModule,
)

Rows = list[list[float]]

# Four responses of 3, 1, 4 and 2 tokens, to two prompts.
OLD = [[-1.0, -2.0, -0.5], [-1.5], [-0.7, -1.1, -2.2, -0.9], [-3.0, -0.4]]
REFERENCE = [[-1.2, -1.6, -0.5], [-2.5], [-0.6, -1.9, -2.0, -1.3], [-2.4, -0.8]]
NOW = [[-0.6, -2.1, -0.55], [-1.9], [-0.72, -0.9, -2.6, -0.3], [-3.05, -0.35]]
VALUES = [[0.3, -0.2, 0.8], [1.1], [0.0, 0.5, -0.4, 0.9], [-0.6, 0.2]]
VALUES_NOW = [[0.5, -0.25, 1.6], [0.4], [0.05, 0.8, -0.4, 0.2], [-0.9, 0.6]]
RETURNS = [[1.0, 0.7, 0.4], [-0.5], [0.2, -0.3, 0.6, 1.5], [0.1, -1.2]]
ADVANTAGES = [[1.0, -0.5, 0.7], [-1.3], [0.4, 2.0, -0.8, 0.6], [-0.2, 1.1]]
SCORES = [2.0, -0.3, 0.8, -4.0]
TRUNCATED = [False, True, True, False]
GREEDY_SCORES, GREEDY_TRUNCATED = [0.5, 3.0], [True, False]


def padded(rows: Rows) -> Tensor:
    """The rows right-padded to one width, by a number that must not matter."""
    width = max(map(len, rows))
    return torch.tensor([row + [7.0] * (width - len(row)) for row in rows])


def an_experience(**filled: Any) -> Experience:
    lengths = torch.tensor([len(row) for row in OLD])
    mask = torch.arange(4) < lengths[:, None]
    attention = torch.cat([torch.ones(4, 2, dtype=torch.bool), mask], dim=1)
    tokens = torch.arange(4)[:, None].repeat(1, 6)  # each row says which it is
    return Experience(tokens, attention, mask, torch.tensor(TRUNCATED), **filled)


def a_rollout() -> Experience:
    """As it is before ``estimate``."""
    columns = {"log_probs": padded(OLD), "ref_log_probs": padded(REFERENCE), "values": padded(VALUES)}
    greedy = an_experience(scores=torch.tensor([*GREEDY_SCORES, 0.0, 0.0]))[:2]
    greedy.truncated = torch.tensor(GREEDY_TRUNCATED)
    return an_experience(**columns, scores=torch.tensor(SCORES), greedy=greedy)


def a_minibatch(count: float | None = None) -> Experience:
    """As it is in the loss."""
    columns = {"log_probs": OLD, "ref_log_probs": REFERENCE, "values": VALUES, "returns": RETURNS}
    filled = {name: padded(rows) for name, rows in {**columns, "advantages": ADVANTAGES}.items()}
    return an_experience(**filled, count=None if count is None else torch.tensor(count))


def make(kind: type[OnPolicyModule], **settings: Any) -> Any:
    sizes = {"rollout_size": 4, "minibatch_size": 4, "inner_epochs": 1}
    return make_ppo(kind, **{**sizes, **settings})  # type: ignore[type-var]


def assert_rows(got: Tensor, expected: Rows) -> None:
    for row, values in enumerate(expected):
        assert got[row, : len(values)].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)


def kl_of(estimator: str, p: float, q: float) -> float:
    return {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": math.exp(q - p) - 1 + p - q}[estimator]


class FixedBackbone:
    """Reads typed numbers, all roles in one pass, and remembers what it was asked."""

    is_sharded, in_step = False, False
    eos_token_ids = (2,)

    def __init__(self, *roles: str) -> None:
        self.layout = SimpleNamespace(roles=dict.fromkeys(roles))
        self.asked: list[dict[str, Any]] = []
        self.read: list[int] = []
        self.recorded = 0

    def passes(self, roles: Sequence[str]) -> dict[str, Any]:
        return {"one": roles}

    def __call__(
        self, roles: Sequence[str], tokens: Tensor, attention_mask: Tensor, mask: Tensor, **options: Any
    ) -> dict[str, Tensor]:
        self.asked.append(options)
        self.read.append(len(tokens))
        entropy = [[0.5 - p for p in row] for row in NOW]
        every = {"actor": NOW, "critic": VALUES_NOW, "reference": REFERENCE, "entropy": entropy}
        found = {name: padded(rows)[tokens[:, 0], : mask.shape[1]] for name, rows in every.items()}
        return {name: rows for name, rows in found.items() if name in roles or name == "entropy"}

    def record(self, roles: Sequence[str], *inputs: Any, **options: Any) -> dict[str, Tensor]:
        self.recorded += 1
        return self(roles, *inputs)

    def forget(self) -> None:
        pass

    @contextmanager
    def use(self, role: str) -> Any:
        yield role


class FixedEngine:
    """Samples the typed responses, and keeps how it was asked."""

    gives_log_probs = True

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def generate(self, *arguments: Any, **options: Any) -> Experience:
        self.asked.append(options)
        experience = an_experience()
        if options["keep_log_probs"]:
            experience.log_probs = padded(OLD)
        return experience.replace(greedy=an_experience()) if options["greedy"] else experience


PROMPTS = {
    "tokens": torch.zeros(4, 2, dtype=torch.long),
    "attention_mask": torch.ones(4, 2, dtype=torch.bool),
    "prompts": ["a", "b", "c", "d"],
    "columns": {},
}


def in_training(kind: type[OnPolicyModule], **settings: Any) -> tuple[Any, dict[str, float]]:
    """A module on typed numbers with a trainer of one rank, and what it logs."""

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return SCORES

    module, logged = make(kind, **{"engine": FixedEngine(), "reward": FunctionReward(score), **settings}), {}
    roles = ("actor", "critic", "reference") if "critic" in kind.roles else ("actor", "reference")
    module.backbone = FixedBackbone(*roles)
    module._trainer = SimpleNamespace(
        world_size=1, strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor), precision="32-true",
        precision_plugin=SimpleNamespace(), callbacks=[], checkpoint_callbacks=[], max_epochs=2, current_epoch=0,
    )  # fmt: skip
    module.log = lambda name, value, **options: logged.update({name: float(value)})
    return module, logged
