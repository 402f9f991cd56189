"""Under FakeTensorMode a tensor has no values, so whatever waits for one (.item(), if tensor:) raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lit_rlhf import functional as lf


def test_the_detector_detects():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(2).sum() > 1)


def test_no_function_waits_for_a_value():
    with FakeTensorMode():
        a, b, c = (torch.randn(3, 5, requires_grad=True) for _ in range(3))
        mask, tokens, scores = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 5).long(), torch.randn(3)
        lf.response_mask(tokens, torch.tensor([2]))
        lf.position_ids(mask)
        lf.gather_last(a, mask)
        mean, var = lf.finish_moments(lf.moments(a, mask))
        lf.whiten(a, mask, mean=mean, var=var)
        lf.whiten(a, mask, mean=0.0, var=1.0)
        lf.masked_var(a, mask)
        lf.masked_mean(a, mask, count=mask.sum())
        lf.token_rewards(scores, lf.kl_estimate(a, b, mask, "k3"), mask, 0.1)
        lf.gae(a, b, mask, 1.0, 0.95)
        lf.returns_to_go(a, mask, 1.0)
        lf.explained_variance(a, b, mask)
        loss = lf.clipped_policy_loss(a, b, c, mask)[0] + lf.clipped_value_loss(a, b, c, mask)[0]
        loss = loss + lf.cross_entropy(a, mask) - lf.entropy_bonus(b, mask)
        loss = loss + lf.preference_loss(scores, scores) + lf.dpo_loss(scores, scores, 0.1, 0.1)
        loss = (
            loss
            + lf.policy_gradient_loss(a, b, mask)
            + lf.clipped_policy_loss(a, b, c, mask, aggregation="response")[0]
        )
        lf.remax_returns(scores, a, mask, 0.99, 0.1)
        lf.leave_one_out(scores, 3)
        lf.group_normalize(scores, 3)
        weight = torch.randn(7, 5, requires_grad=True)
        log_probs, entropy = lf.token_log_probs(a, weight, tokens[:, 0], softcap=2.0, with_entropy=True)
        (loss + log_probs.sum() + entropy.sum()).backward()
        assert weight.grad.shape == (7, 5)
