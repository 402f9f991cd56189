"""The algorithms, one LightningModule each, and the contract for writing your own.

Subclass :class:`OnPolicyModule` (or :class:`ActorCriticModule`, which adds a critic), override the hooks that differ,
and name the class path in YAML. Layouts, logging, checkpoints, exact resume, DDP and FSDP2 come with the base.

One iteration
-------------
One Lightning epoch is one iteration. N is ``rollout_size`` responses on each rank, P and T the longest prompt and
response, K ``samples_per_prompt``; rows i * K to (i + 1) * K - 1 answer prompt i. The collector calls, in this order::

    sample(prompts) -> Experience      tokens, attention_mask, mask, truncated (log_probs, greedy)
    score(experience, prompts)         log_probs, ref_log_probs, values, scores
    estimate(experience)               advantages, returns

Then the buffer yields ``inner_epochs`` times ``rollout_size / minibatch_size`` minibatches of B =
``minibatch_size`` shuffled samples, and for each of them Lightning runs backward on ``loss(minibatch)``.

Hooks
-----
``sample(prompts)``
    Which responses to sample. ``prompts`` holds ``tokens`` [n, P] long (left-padded), ``attention_mask`` [n, P] bool,
    ``prompts`` (n texts) and ``columns`` (the data set's other columns, n values each), for the n = N / K prompts of
    this rank. Default: ``self.generate(prompts, K)``; ``greedy=True`` adds one greedy response per prompt as
    ``experience.greedy``.
``estimate(experience)``
    Fill ``advantages`` [N, T] (and ``returns``, by ``self.set_returns``, where there is a critic). Runs without
    gradients, once per iteration, on all N samples in the order in which they were sampled: groups of K are adjacent.
    Helpers: ``self.shaped_scores(e)`` [N], ``self.kl_penalty(e)`` [N, T], ``self.kl.value``, ``self.all_reduce_sum``.
``policy_loss(log_probs, minibatch)``
    Return the 0-dim loss of ``log_probs`` [B, T] under the current policy, and a dict of 0-dim statistics, detached,
    that are logged under ``train/``. A critic's value loss and the entropy bonus are added by
    :class:`ActorCriticModule`; ``target_kl`` compares the statistic ``approx_kl``.
``loss(minibatch)``
    Instead of ``policy_loss``, for a loss that needs other roles. ``self.log_probs(minibatch)`` gives the policy's.
``problems()``
    Return the problems with the settings, one line each, added to ``super().problems()``; all of them are reported
    together in ``setup``, before any weights load. ``self.needs_groups()`` reports K = 1.

A constructor declares its own arguments, passes ``**kwargs``, and calls ``super().__init__(**kwargs)`` first. (Plain
numbers set before it work too; modules, parameters and tensors do not.)

Experience
----------
Prompts are left-padded, responses right-padded: response column t is token column P + t. True in a mask means "counts".
Reading a field before its step has filled it raises; ``hasattr`` asks without raising.

=================  ============  ===========  =================================================================
field              shape         dtype        filled by
=================  ============  ===========  =================================================================
``tokens``         [N, P + T]    long         sample
``attention_mask`` [N, P + T]    bool         sample
``mask``           [N, T]        bool         sample: real response tokens, the first EOS included
``truncated``      [N]           bool         sample: the length limit was hit without an EOS
``log_probs``      [N, T]        float32      sample or score: the sampling policy's
``ref_log_probs``  [N, T]        float32      score: the reference's
``values``         [N, T]        float32      score: the critic's before the update; only with a critic
``scores``         [N]           float32      score: the reward of the whole response, as it was given
``greedy``         Experience    n samples    sample, where asked for; gone once the advantages are known
``advantages``     [N, T]        float32      estimate
``returns``        [N, T]        float32      estimate: the critic's targets; only with a critic
``count``          0-dim         float        the buffer, on minibatches: see below
``left_out``       bool                       the check: a number is not finite; nothing is updated
=================  ============  ===========  =================================================================

What else can be your own
-------------------------
Each is named by its class path in YAML, as an algorithm is.

``reward``
    A :class:`~lit_rlhf.Reward` with ``score(batch) -> [N] float32``, or ``FunctionReward`` around a function of
    ``(prompts, responses, **columns)``.
``engine``
    An :class:`~lit_rlhf.Engine` with ``respond(model, request) -> Experience``: the sequence fields filled, ``samples``
    rows to each prompt together. :func:`lit_rlhf.rollout.generation.as_experience` makes one of responses.
``kl``
    A :class:`~lit_rlhf.KLController`: ``value`` (a property, which may be overridden) is the coefficient, ``update(kl,
    n)`` is called once an iteration. Whatever changes during training belongs into ``state_dict`` and
    ``load_state_dict``: a resumed run has nothing else. The base keeps the coefficient that its constructor was given.
``layout``
    A :class:`~lit_rlhf.Layout` by import path: a trunk, an adapter and a head for each role.

What divides which loss
-----------------------
``minibatch.count`` is the number of real tokens of a minibatch, averaged over all ranks and over the minibatches of one
optimizer step (``accumulate_grad_batches``). A *token* loss is a sum over the minibatch's tokens divided by it
(``count=b.count`` in ``lit_rlhf.functional``): Lightning averages over minibatches, the strategy over ranks, and the
result is the mean over all tokens of the step, wherever they were. A *response* loss (GRPO's
``aggregation: response``) takes each response's own mean and then divides by B: every minibatch of every rank has the
same number of responses, so plain averages are right. Policy, value, entropy and KL losses of the algorithms here are
token losses unless they say otherwise. ``advantages`` whitened in ``estimate`` use the tokens of all ranks.
"""

from lit_rlhf.algorithms.actor_critic import ActorCriticModule
from lit_rlhf.algorithms.base import BackboneModule
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import Reinforce
from lit_rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.supervised import SFT, HydraSFT, RewardModel, SupervisedModule

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "RLOO",
    "SFT",
    "ActorCriticModule",
    "BackboneModule",
    "HydraSFT",
    "OnPolicyModule",
    "ReMax",
    "Reinforce",
    "ReinforcePlusPlus",
    "RewardModel",
    "SupervisedModule",
]
