"""The base of on-policy algorithms with a critic: one composed loss, and what keeps it stable."""

from typing import Any, ClassVar

from lightning.pytorch import Callback
from torch import Tensor

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import out_of_range, unpack
from lit_rlhf.backbone import PassOptions
from lit_rlhf.callbacks import CriticWarmup
from lit_rlhf.functional import (
    clipped_value_loss,
    differentiate_now,
    entropy_bonus,
    explained_variance,
    finish_moments,
    moments,
)
from lit_rlhf.rollout import Experience
from lit_rlhf.strategies.ranks import only_trainer_may_differentiate


class ActorCriticModule(OnPolicyModule):
    """Trains an actor and a critic: ``policy_loss + value_coef * value_loss - entropy_coef * entropy``.

    The value loss is ``0.5 * max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)``, mean over
    tokens. A subclass defines ``estimate`` and ``policy_loss``. The last three arguments are for ``j_hydra``, where
    both losses train one adapter (Santacroce et al. 2023, arXiv:2309.00754, found it unstable);
    ``experiments/results`` measures what these arguments do. To give the critic its own rank, use ``layout: hydra``
    with ``lora.ranks: {critic: 4}``.

    Args:
        gamma: Discount.
        value_clip: Range of the values around the old ones; None does not clip.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        critic_lr: Learning rate of the critic's own parameters; None uses the optimizer's.
        critic_warmup_iterations: Number of first iterations that update only the critic's own parameters.
        value_gradient: Factor on the value loss's gradient into weights shared with the actor; with 0 only the value
            head learns values. No effect where the critic has its own adapter or trunk.
        balance_losses: Divide the value loss by the variance of the rollout's returns, so that the reward's scale does
            not decide which of the two losses moves a shared adapter.
        **kwargs: See :class:`OnPolicyModule`.
    """

    roles: ClassVar[tuple[str, ...]] = ("actor", "critic", "reference")

    def __init__(
        self,
        gamma: float = 1.0,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        critic_lr: float | None = None,
        critic_warmup_iterations: int = 0,
        value_gradient: float = 1.0,
        balance_losses: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.value_clip = value_clip
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.critic_lr = critic_lr
        self.critic_warmup_iterations = critic_warmup_iterations
        self.value_gradient = value_gradient
        self.balance_losses = balance_losses
        self._returns_variance = 1.0

    def problems(self) -> list[str]:
        """Add the critic's settings."""
        return super().problems() + out_of_range(
            self,
            unit=("gamma",),
            positive=("value_clip", "critic_lr"),
            not_negative=("value_coef", "entropy_coef", "critic_warmup_iterations", "value_gradient"),
        )

    def configure_callbacks(self) -> list[Callback]:
        """Add the critic's warm-up."""
        warmup = [CriticWarmup(self.critic_warmup_iterations)] if self.critic_warmup_iterations else []
        return [*super().configure_callbacks(), *warmup]

    def loss(self, minibatch: Experience) -> Tensor:
        """Return the sum of policy, value and entropy losses; Lightning runs one backward pass.

        A critic with its own forward pass is differentiated before the actor's pass begins, so that only one pass's
        activations are alive at a time.
        """
        b = minibatch
        outputs = self.backbone(self.loss_passes()[0], *b.inputs, **self.pass_options())
        value_loss, value_stats = self.value_loss(outputs.pop("critic"), b)
        if "actor" not in outputs:
            if value_loss.requires_grad:
                value_loss = differentiate_now(value_loss, list(self.backbone.role_parameters("critic").values()))
            outputs = self.backbone(("actor",), *b.inputs, **self.pass_options())
        policy_loss, stats = unpack(self.policy_loss(outputs["actor"], b), self)
        self.minibatch_stats = {**stats, **value_stats}
        loss = policy_loss + value_loss
        if self.entropy_coef > 0:
            loss = loss - self.entropy_coef * entropy_bonus(outputs["entropy"], b.mask, count=b.count)
        return loss

    def loss_passes(self) -> list[tuple[str, ...]]:
        """One pass where actor and critic share it, or only the trainer may run backward; else the critic's first."""
        shared = len(self.backbone.passes(("actor", "critic"))) == 1
        if shared or only_trainer_may_differentiate(self):
            return [("actor", "critic")]
        return [("critic",), ("actor",)]

    def pass_options(self) -> PassOptions:
        """Add the factor on the value gradient, and the entropy where it has a weight."""
        return {"value_gradient": self.value_gradient, "entropy": self.entropy_coef > 0}

    def value_loss(self, values: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted value loss of ``[B, T]`` values, and what to log about it."""
        b = minibatch
        loss, stats = clipped_value_loss(values, b.values, b.returns, b.mask, self.value_clip, count=b.count)
        explained = explained_variance(values, b.returns, b.mask)
        stats = {"value_loss": loss.detach(), "explained_variance": explained, **stats}
        return self.value_coef / self._returns_variance * loss, stats

    def set_returns(self, experience: Experience, returns: Tensor) -> None:
        """Set the critic's targets, and record their variance over all ranks."""
        experience.returns = returns
        if self.balance_losses:
            _, variance = finish_moments(self.all_reduce_sum(moments(returns, experience.mask)))
            # Equal returns say nothing about the scale.
            self._returns_variance = float(variance) or 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: the actor's parameters, and those only the critic uses."""
        actor = self.backbone.role_parameters("actor")
        own = {name: p for name, p in self.backbone.role_parameters("critic").items() if name not in actor}
        critic: dict[str, Any] = {"params": list(own.values())}
        if self.critic_lr is not None:
            critic["lr"] = self.critic_lr
        return [{"params": list(actor.values())}, critic]
