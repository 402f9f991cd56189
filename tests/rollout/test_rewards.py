"""Rewards: roles, functions, sums, and what is said about bad ones."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from lit_rlhf import FunctionReward, Reward, RoleReward, WeightedReward
from lit_rlhf.errors import RewardError
from lit_rlhf.rollout import RewardScaler, Scored

BATCH = Scored(["p1", "p2"], ["r1", "r22"], {"topic": ["a", "b"]}, torch.tensor([0.5, -1.0]))


def lengths(prompts: list[str], responses: list[str], topic: list[str]) -> Sequence[float]:
    assert topic == ["a", "b"]
    return [len(response) for response in responses]


def test_role_function_and_weighted_sum() -> None:
    assert RoleReward().score(BATCH).tolist() == [0.5, -1.0]
    assert FunctionReward(lengths).score(BATCH).tolist() == [2.0, 3.0]
    both = WeightedReward([RoleReward(), FunctionReward(lengths)], [2.0, 0.1])
    torch.testing.assert_close(both.score(BATCH), torch.tensor([1.2, -1.7]))
    assert both.needs_reward_role
    assert not WeightedReward([FunctionReward(lengths)], [1.0]).needs_reward_role


def test_a_users_subclass_is_a_reward() -> None:
    class Constant(Reward):
        def score(self, batch: Scored) -> torch.Tensor:
            return torch.full((len(batch.responses),), 7.0)

    assert Constant().score(BATCH).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 numbers for 2 responses"),
        ([1.0, float("nan")], "returned nan for sample 1 .*p2.*r22"),
        ([float("inf"), 1.0], "returned inf for sample 0 .*p1.*r1"),
        ([1.0, None], "returned None for sample 1"),
        (["high", 1.0], "returned 'high' for sample 0"),
    ],
)
def test_bad_numbers_name_the_function_and_the_sample(returned: list, message: str) -> None:
    def judge(prompts: list[str], responses: list[str], **columns: object) -> list:
        return returned

    with pytest.raises(ValueError, match=message) as error:
        FunctionReward(judge).score(BATCH)
    assert "judge" in str(error.value)


def test_errors_of_wiring() -> None:
    with pytest.raises(ValueError, match="reward role was not run"):
        RoleReward().score(Scored(["p"], ["r"], {}))
    with pytest.raises(ValueError, match="2 rewards need as many weights, got 1"):
        WeightedReward([RoleReward(), RoleReward()], [1.0])


def test_equal_scores_are_not_blown_up() -> None:
    same = torch.full((4,), -1.0)
    for mode, want in (("none", same), ("running", same), ("batch", torch.zeros(4))):
        scaler = RewardScaler(mode)  # type: ignore[arg-type]
        scaler.update(same, torch.Tensor.clone)
        assert torch.equal(scaler(same), want)


def test_other_scores_are_scaled_by_what_the_rollout_showed() -> None:
    scores, greedy = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([3.0])
    scaler = RewardScaler("batch")
    scaler.update(scores, torch.Tensor.clone)
    assert scaler(greedy).tolist() == [0.0]  # the rollout's mean
    torch.testing.assert_close(scaler(scores) - scaler(greedy), (scores - greedy) / scores.std())


def test_a_column_named_like_an_argument_is_named() -> None:
    batch = Scored(["p"], ["r"], {"responses": ["x"]})
    with pytest.raises(ValueError, match="column 'responses' has the name of an argument"):
        FunctionReward(lengths).score(batch)


def test_running_scale_survives_a_checkpoint() -> None:
    identity = torch.Tensor.clone
    first, whole = RewardScaler("running"), RewardScaler("running")
    parts = [torch.tensor([1.0, 5.0, 2.0]), torch.tensor([-3.0, 0.0, 8.0])]
    first.update(parts[0], identity)
    second = RewardScaler("running")
    second.load_state_dict(first.state_dict())
    whole.update(parts[0], identity)
    for scaler in (second, whole):
        scaler.update(parts[1], identity)
    assert torch.equal(second(parts[1]), whole(parts[1]))
    torch.testing.assert_close(whole(parts[1]), parts[1] / torch.cat(parts).std())


def test_a_function_that_raises_is_named_with_its_line_and_batch() -> None:
    def judge(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
        return [{"a": 1.0}[response] for response in responses]

    for timeout in (None, 5.0):
        with pytest.raises(RewardError, match="judge raised KeyError: 'r1'") as error:
            FunctionReward(judge, timeout).score(BATCH)
        assert "test_rewards.py, line " in str(error.value)
        assert "a batch of 2; the first: prompt 'p1', response 'r1'" in str(error.value)
        assert isinstance(error.value.__cause__, KeyError)


def test_a_function_that_hangs_is_given_up() -> None:
    release = threading.Event()

    def judge(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
        release.wait(30)
        return [0.0] * len(responses)

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"judge did not return within 0.2 s \(a batch of 2; .*p1.*r1"):
        FunctionReward(judge, timeout=0.2).score(BATCH)
    assert time.monotonic() - start < 10
    release.set()
    assert FunctionReward(judge, timeout=5.0).score(BATCH).tolist() == [0.0, 0.0]


def test_the_timeout_covers_a_lazy_answer_and_changes_no_result() -> None:
    def lazy(prompts: list[str], responses: list[str], **columns: object) -> Iterator[float]:
        for response in responses:
            time.sleep(0.3 if response == "r22" else 0.0)
            yield float(torch.is_grad_enabled())

    with torch.no_grad():
        assert FunctionReward(lazy, timeout=20.0).score(BATCH).tolist() == [0.0, 0.0]
    assert FunctionReward(lazy, timeout=20.0).score(BATCH).tolist() == [1.0, 1.0]
    with pytest.raises(RewardError, match="did not return"):
        FunctionReward(lazy, timeout=0.05).score(BATCH)
    with pytest.raises(ValueError, match="timeout must be positive or null, got 0"):
        FunctionReward(lazy, timeout=0)


def test_an_answer_that_is_no_sequence_or_fits_no_float32() -> None:
    with pytest.raises(RewardError, match="returned None, not one number per response"):
        FunctionReward(lambda *texts, **columns: None).score(BATCH)  # type: ignore[arg-type,return-value]
    for huge in (1e39, 10**400):
        with pytest.raises(ValueError, match="for sample 1"):
            FunctionReward(lambda *texts, huge=huge, **columns: [1.0, huge]).score(BATCH)
