"""The collector on a policy of typed numbers: order, what is asked of engine and reward, means, what is updated."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlhf import Experience, KLController, Sampling
from lit_rlhf.functional import kl_estimate
from lit_rlhf.rollout import Reward, RewardScaler, Scored
from lit_rlhf.rollout.collector import Collector

LENGTHS = [2, 1, 3, 3]
ACTOR = [[-1.0, -2.0], [-0.5], [-1.5, -0.2, -0.8], [-3.0, -0.4, -0.1]]
REFERENCE = [[-1.4, -2.5], [-0.2], [-2.5, -0.2, -1.0], [-2.8, -1.4, -0.6]]
SCORES = [1.0, -2.0, 0.5, 4.0]


def columns_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor([row + [0.0] * (3 - len(row)) for row in rows])


def responses(**filled: Any) -> Experience:
    """The first token of each row says which row it is."""
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.arange(4)[:, None].repeat(1, 5)
    attention = torch.cat([torch.ones(4, 2, dtype=torch.bool), mask], dim=1)
    return Experience(tokens, attention, mask, torch.tensor([False, False, False, True]), **filled)


class TypedBackbone:
    """Reads typed numbers by row."""

    in_step = True

    def __init__(self, *roles: str) -> None:
        self.layout = SimpleNamespace(roles=dict.fromkeys(roles))
        self.read: list[tuple[tuple[str, ...], int]] = []
        self.recorded: list[dict[str, Any]] = []

    def __call__(self, roles: tuple[str, ...], tokens: Tensor, *masks: Tensor, **options: Any) -> dict[str, Tensor]:
        self.read.append((tuple(roles), len(tokens)))
        rows, width = tokens[:, 0], masks[1].shape[1]
        every = {"actor": columns_of(ACTOR), "reference": columns_of(REFERENCE), "critic": columns_of(ACTOR) + 1}
        found = {name: value[rows, :width] for name, value in every.items()}
        found["reward"] = torch.tensor(SCORES)[rows]
        return {name: found[name] for name in roles}

    def record(self, roles: tuple[str, ...], *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
        self.recorded.append(options)
        return self(roles, *inputs)

    def forget(self) -> None:
        pass

    @contextmanager
    def use(self, role: str) -> Any:
        yield role

    def named_parameters(self, prefix: str) -> list[tuple[str, Tensor]]:
        return [(f"{prefix}.weight", torch.zeros(1))]


class TypedReward(Reward):
    """Returns the scores of the rows that it sees, and keeps what it was given."""

    def __init__(self, needs_reward_role: bool = False) -> None:
        self.needs_reward_role = needs_reward_role
        self.given: list[Scored] = []

    def score(self, batch: Scored) -> Tensor:
        self.given.append(batch)
        return torch.tensor(SCORES[: len(batch.responses)]) if batch.role_scores is None else batch.role_scores


class TypedEngine:
    """Keeps how it was asked."""

    gives_log_probs = True

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def generate(self, *arguments: Any, **options: Any) -> Experience:
        self.asked.append((arguments, options))
        return responses()


class Halving(KLController):
    """A coefficient that changes, and keeps what it was fed."""

    def __init__(self) -> None:
        super().__init__(0.8)
        self.fed: list[tuple[float, int]] = []

    def update(self, kl: float, n: int) -> None:
        self.fed.append((kl, n))
        self._value /= 2


class TypedPolicy:
    """A policy whose numbers are typed, and which keeps the order of its calls."""

    pad_id, eos_ids, temperature, device, current_epoch = 0, [2, 9], 1.0, torch.device("cpu"), 0
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **options: [f"row {row[0]}" for row in rows])

    def __init__(self, collector: Collector, roles: tuple[str, ...] = ("actor", "reference"), ranks: int = 1) -> None:
        self.collector, self.kl, self.reward_scaler = collector, Halving(), RewardScaler("running")
        self.backbone, self.calls, self.logged, self.estimated = TypedBackbone(*roles), [], {}, {}
        # Every rank holds the same numbers.
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor * (ranks if reduce_op == "sum" else 1))
        self._trainer: Any = SimpleNamespace(
            world_size=ranks, strategy=strategy, precision="32-true", callbacks=[], checkpoint_callbacks=[],
            max_epochs=3, current_epoch=0,
        )  # fmt: skip

    def log_all(self, prefix: str, values: dict[str, Any], **options: Any) -> None:
        self.logged.update({f"{prefix}/{name}": float(value) for name, value in values.items()})

    def sample(self, prompts: dict[str, Any]) -> Experience:
        self.calls.append("sample")
        return self.collector.generate(self, prompts)

    def score(self, experience: Experience, prompts: dict[str, Any]) -> Scored:
        self.calls.append("score")
        return self.collector.score(self, experience, prompts)

    def estimate(self, experience: Experience) -> None:
        self.calls.append("estimate")
        self.estimated = {"kl_coef": self.kl.value, "scaled": self.reward_scaler(experience.scores).tolist()}

    def kl_penalty(self, e: Experience) -> Tensor:
        return kl_estimate(e.log_probs, e.ref_log_probs, e.mask, "k2")

    def loss_passes(self) -> list[tuple[str, ...]]:
        return [tuple(role for role in self.backbone.layout.roles if role in ("actor", "critic"))]

    def pass_options(self) -> dict[str, Any]:
        return {"value_gradient": 0.5}


PROMPTS = {
    "tokens": torch.zeros(4, 2, dtype=torch.long),
    "attention_mask": torch.ones(4, 2, dtype=torch.bool),
    "prompts": ["a", "b", "c", "d"],
    "columns": {"topic": [1, 2, 3, 4]},
}


def a_collector(**settings: Any) -> Collector:
    defaults = {"engine": TypedEngine(), "sampling": Sampling(), "reward": TypedReward(), "batch_size": 4}
    return Collector(**{**defaults, **settings})


def token_sums(by_token: Any) -> list[float]:
    return [sum(by_token(p, q) for p, q in zip(*rows, strict=True)) for rows in zip(ACTOR, REFERENCE, strict=True)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_means_of_a_rollout_and_what_the_controllers_are_fed(ranks: int) -> None:
    policy = TypedPolicy(a_collector(), ranks=ranks)
    experience, samples = policy.collector.collect(policy, PROMPTS)
    kl = sum(token_sums(lambda p, q: p - q)) / 4
    entropies = [-sum(row) / len(row) for row in ACTOR]
    expected = {
        "score": sum(SCORES) / 4, "kl": kl, "kl_penalty": sum(token_sums(lambda p, q: (p - q) ** 2 / 2)) / 4,
        "response_length": 9 / 4, "truncated": 0.25, "entropy": sum(entropies) / 4, "kl_coef": 0.8,
    }  # fmt: skip
    assert policy.logged == pytest.approx({f"rollout/{name}": value for name, value in expected.items()}, rel=1e-5)
    assert policy.calls == ["sample", "score", "estimate"]
    # The KL per response, of as many responses as all ranks sampled; it decides the next iteration's coefficient.
    ((fed, count),) = policy.kl.fed
    assert (fed, count) == (pytest.approx(kl, rel=1e-5), 4 * ranks)
    assert policy.estimated["kl_coef"] == 0.8
    # Scores are scaled by a deviation that knows those of this rollout, on all ranks.
    every = SCORES * ranks
    deviation = (sum((x - sum(every) / len(every)) ** 2 for x in every) / (len(every) - 1)) ** 0.5
    assert policy.estimated["scaled"] == pytest.approx([x / deviation for x in SCORES], rel=1e-5)
    assert policy.reward_scaler.state_dict()["total"][0] == 4 * ranks
    assert samples == [{"prompt": p, "response": f"row {i}", "score": SCORES[i]} for i, p in enumerate("abcd")]
    assert experience.log_probs[0].tolist() == pytest.approx([-1.0, -2.0, 0.0])


def test_a_greedy_response_has_a_score_and_a_mean_of_its_own() -> None:
    class WithGreedy(TypedPolicy):
        def sample(self, prompts: dict[str, Any]) -> Experience:
            return responses(greedy=responses()[:2])

        def estimate(self, experience: Experience) -> None:
            super().estimate(experience)
            self.estimated["greedy"] = experience.greedy.scores.tolist()

    reward = TypedReward(needs_reward_role=True)
    policy = WithGreedy(a_collector(reward=reward), roles=("actor", "reference", "reward"))
    prompts = {**PROMPTS, "prompts": ["a", "b"], "columns": {"topic": [1, 2]}}
    experience, _ = policy.collector.collect(policy, prompts)
    assert policy.estimated["greedy"] == SCORES[:2]
    assert policy.logged["rollout/greedy_score"] == pytest.approx(sum(SCORES[:2]) / 2)
    assert policy.logged["rollout/score"] == pytest.approx(sum(SCORES) / 4)
    assert policy.backbone.read == [(("actor", "reference", "reward"), 4), (("reward",), 2)]
    assert not hasattr(experience, "greedy")
    # Two responses to a prompt stand together, and so do their prompts and columns.
    assert [given.prompts for given in reward.given] == [["a", "b"], ["a", "a", "b", "b"]]
    assert [given.columns["topic"] for given in reward.given] == [[1, 2], [1, 1, 2, 2]]


def test_a_rollout_left_out_feeds_no_controller() -> None:
    class Broken(TypedReward):
        def score(self, batch: Scored) -> Tensor:
            return torch.tensor([1.0, float("nan"), 2.0, 3.0])

    policy = TypedPolicy(a_collector(reward=Broken(), skip_non_finite=True))
    with pytest.warns(UserWarning, match="optimizer steps are skipped"):
        experience, _ = policy.collector.collect(policy, PROMPTS)
    assert experience.left_out
    assert policy.kl.fed == []
    assert policy.reward_scaler.state_dict()["total"] == [0.0, 0.0, 0.0]


def test_what_the_engine_is_asked() -> None:
    sampling = Sampling(max_new_tokens=5)
    policy = TypedPolicy(a_collector(sampling=sampling, batch_size=3, keep_log_probs=True))
    policy.collector.generate(policy, PROMPTS, samples=2, greedy=True)
    (((model, tokens, mask, *rest), options),) = policy.collector.engine.asked  # type: ignore[attr-defined]
    assert model == "actor"
    assert tokens is PROMPTS["tokens"]
    assert mask is PROMPTS["attention_mask"]
    assert rest == [sampling, 0, [2, 9]]
    assert options == {"samples": 2, "greedy": True, "batch_size": 3, "in_step": True, "keep_log_probs": True}


@pytest.mark.parametrize(
    ("settings", "precision", "matmul", "gives", "kept"),
    [
        ({"sampling_agrees": True}, "32-true", "highest", True, True),
        ({"sampling_agrees": True}, None, "highest", True, True),
        ({"sampling_agrees": True}, "bf16-mixed", "highest", True, False),
        ({"sampling_agrees": True}, "32-true", "high", True, False),
        ({"sampling_agrees": True}, "32-true", "highest", False, False),
        ({"sampling_agrees": False}, "32-true", "highest", True, False),
        ({"sampling_agrees": True, "keep_log_probs": False}, "32-true", "highest", True, False),
        ({"sampling_agrees": False, "keep_log_probs": True}, "bf16-mixed", "high", True, True),
    ],
)
def test_log_probs_of_sampling_are_kept_where_they_are_exact(
    settings: dict[str, Any], precision: str | None, matmul: str, gives: bool, kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    policy = TypedPolicy(a_collector(**settings))
    policy.collector.engine.gives_log_probs = gives  # type: ignore[misc]
    if precision is None:
        policy._trainer = None
    else:
        policy._trainer.precision = precision
    policy.collector.generate(policy, PROMPTS)
    assert policy.collector.engine.asked[0][1]["keep_log_probs"] is kept  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"batch_size": 4}, [4]),
        ({"batch_size": 3}, [3, 1]),
        ({"batch_size": 4, "group_size": 2}, [2, 2]),
        ({"batch_size": 1, "group_size": 3}, [3, 1]),
    ],
)
def test_responses_are_scored_so_many_at_once(settings: dict[str, int], sizes: list[int]) -> None:
    policy, experience = TypedPolicy(a_collector(**settings), roles=("actor", "critic", "reference")), responses()
    policy.score(experience, PROMPTS)
    assert policy.backbone.read == [(("actor", "critic", "reference"), size) for size in sizes]
    torch.testing.assert_close(experience.log_probs, columns_of(ACTOR))
    torch.testing.assert_close(experience.ref_log_probs, columns_of(REFERENCE))
    assert experience.values[experience.mask].tolist() == pytest.approx([x + 1 for row in ACTOR for x in row])


def test_what_is_known_is_not_read_again() -> None:
    policy = TypedPolicy(a_collector(), roles=("actor", "critic", "reference"))
    experience = responses(log_probs=torch.full((4, 3), -7.0))
    policy.score(experience, PROMPTS)
    assert policy.backbone.read == [(("critic", "reference"), 4)]
    assert bool((experience.log_probs == -7.0).all())


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"trained_as_one": True, "batch_size": 4}, True),
        ({"trained_as_one": True, "batch_size": 3}, False),
        ({"trained_as_one": False, "batch_size": 4}, False),
    ],
)
def test_the_pass_is_kept_where_it_is_the_losss_own(settings: dict[str, Any], recorded: bool) -> None:
    policy = TypedPolicy(a_collector(**settings), roles=("actor", "critic", "reference"))
    experience, _ = policy.collector.collect(policy, PROMPTS)
    # By the options of the loss, and what it gave is not read a second time.
    assert policy.backbone.recorded == ([{"value_gradient": 0.5}] if recorded else [])
    first = [(("actor", "critic"), 4), (("reference",), 4)]
    assert (policy.backbone.read == first) is recorded
    torch.testing.assert_close(experience.log_probs, columns_of(ACTOR))


def test_evaluation_logs_the_same_means_under_its_own_name() -> None:
    policy = TypedPolicy(a_collector())
    policy.collector.evaluate(policy, PROMPTS, "test")
    assert {name.split("/")[0] for name in policy.logged} == {"test"}
    assert policy.logged["test/score"] == pytest.approx(sum(SCORES) / 4)
    assert policy.kl.fed == []


def test_an_error_of_the_users_own_sampling_is_not_explained_away() -> None:
    class Failing(TypedPolicy):
        words = "no such device"

        def sample(self, prompts: dict[str, Any]) -> Experience:
            raise RuntimeError(self.words)

    policy = Failing(a_collector())
    with pytest.raises(RuntimeError, match="no such device"):
        policy.collector.collect(policy, PROMPTS)
    policy.words = "probability tensor contains inf"
    with pytest.raises(RuntimeError, match="the policy's logits are not finite"):
        policy.collector.collect(policy, PROMPTS)
