"""The base of on-policy algorithms with a critic: value loss, its own learning rate, and what keeps it stable."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.ranges import out_of_range
from lit_rlhf.functional import clipped_value_loss, explained_variance, finish_moments, moments
from lit_rlhf.rollout import Experience


class ActorCriticModule(OnPolicyModule):
    """On-policy training of an actor and a critic, on separate LoRA sets or a shared one.

    The last three arguments are for ``j_hydra``, where both losses pull at one LoRA set (Santacroce et al. 2023,
    arXiv:2309.00754, found it unstable); what they did is measured in ``experiments/results``. A rank of the critic's
    own is ``layout: hydra`` with ``lora.ranks: {critic: 4}``.

    Args:
        gamma: Discount.
        value_clip: Range of the values around the old ones; None does not clip.
        value_coef: Weight of the value loss.
        critic_lr: Learning rate of the critic's own parameters; None uses the optimizer's.
        critic_warmup_iterations: First iterations, in which only the critic's own parameters are updated.
        value_gradient: Factor on the value loss's gradient into what the actor reads too; 0 leaves the value head alone
            to learn values. Changes nothing where the critic has a LoRA set or a trunk of its own.
        balance_losses: Divide the value loss by the variance of the rollout's returns, so that the reward's scale does
            not decide which of the two losses moves a shared LoRA set.
        **kwargs: See :class:`OnPolicyModule`.
    """

    roles: ClassVar[tuple[str, ...]] = ("actor", "critic", "reference")

    def __init__(
        self,
        gamma: float = 1.0,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        critic_lr: float | None = None,
        critic_warmup_iterations: int = 0,
        value_gradient: float = 1.0,
        balance_losses: bool = False,
        **kwargs: Any,
    ) -> None:
        self.gamma = gamma
        self.value_clip = value_clip
        self.value_coef = value_coef
        self.critic_lr = critic_lr
        self.critic_warmup_iterations = critic_warmup_iterations
        self.value_gradient = value_gradient
        self.balance_losses = balance_losses
        self._returns_variance = 1.0
        super().__init__(**kwargs)

    def problems(self) -> list[str]:
        """Add the critic's settings."""
        return super().problems() + out_of_range(
            self,
            unit=("gamma",),
            positive=("value_clip", "critic_lr"),
            not_negative=("value_coef", "critic_warmup_iterations", "value_gradient"),
        )

    def read(self, minibatch: Experience) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Read actor and critic on a minibatch.

        Returns:
            The actor's log-probs ``[B, T]`` under ``actor`` (and the policy's ``entropy``, where the options ask for
            it); the weighted value loss; what to log about it. A critic with a pass of its own is differentiated before
            the actor's pass begins, so that the activations of one pass are alive at a time.
        """
        if self._reads_jointly():
            read = self.read_for_loss(("actor", "critic"), minibatch)
            return read, *self.value_loss(read["critic"], minibatch)
        loss, stats = self.value_loss(self.read_for_loss(("critic",), minibatch)["critic"], minibatch)
        if torch.is_grad_enabled():
            loss = differentiate_now(loss, list(self.backbone.role_parameters("critic").values()))
        return self.read_for_loss(("actor",), minibatch), loss, stats

    def reading_options(self) -> dict[str, Any]:
        """Add the factor on the value gradient."""
        return {**super().reading_options(), "value_gradient": self.value_gradient}

    def roles_to_carry(self, experience: Experience) -> tuple[str, ...]:
        """The critic's graph, which the loss needs first, or the one graph of both."""
        return ("actor", "critic") if self._reads_jointly() else ("critic",)

    def _reads_jointly(self) -> bool:
        """Whether one graph holds both: they share a pass, or only the trainer's own backward pass will do.

        Under FSDP2 that pass reduces the gradients; a loss scaler keeps float16's from vanishing.
        """
        scaler = None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)
        shared = len(self.backbone.passes(("actor", "critic"))) == 1
        return shared or scaler is not None or self.backbone.is_sharded

    def value_loss(self, values: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted value loss of ``[B, T]`` values, and what to log about it."""
        b = minibatch
        loss, stats = clipped_value_loss(
            values, b.require("values"), b.require("returns"), b.mask, self.value_clip, count=b.count
        )
        explained = explained_variance(values, b.require("returns"), b.mask)
        stats = {"value_loss": loss.detach(), "explained_variance": explained, **stats}
        return self.value_coef / self._returns_variance * loss, stats

    def set_returns(self, experience: Experience, returns: Tensor) -> None:
        """Give the experience the critic's targets, and take note of their variance over all ranks."""
        experience.returns = returns
        if self.balance_losses:
            _, variance = finish_moments(self.all_reduce_sum(moments(returns, experience.mask)))
            # Equal returns say nothing about the scale.
            self._returns_variance = float(variance) or 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: the actor's parameters, and those only the critic reads."""
        actor = self.backbone.role_parameters("actor")
        own = {name: p for name, p in self.backbone.role_parameters("critic").items() if name not in actor}
        critic: dict[str, Any] = {"params": list(own.values())}
        if self.critic_lr is not None:
            critic["lr"] = self.critic_lr
        return [{"params": list(actor.values())}, critic]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the actor's parameters without gradients while the critic warms up: no step, no decay, no momentum."""
        if self.current_epoch < self.critic_warmup_iterations:
            drop_gradients(optimizer.param_groups[:1])


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are known already; they are multiplied by what comes from above."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Keep the gradients and return the loss."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Any:
        """Hand them out, once."""
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(above) for gradient in gradients)


def differentiate_now(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """Differentiate a loss and free its graph; the loss returned hands the gradients on in its own backward pass.

    Its value and gradients are those of ``loss``. Hooks on the parameters (DDP's) see one backward pass as ever.

    Args:
        loss: 0-dim.
        parameters: Everything that the loss is to be differentiated by.
    """
    with torch.autocast(loss.device.type, enabled=False):  # as the trainer's own backward pass
        gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return _Differentiated.apply(loss.detach(), gradients, *parameters)


def drop_gradients(groups: list[dict[str, Any]]) -> None:
    """Leave these parameters as they are in the coming optimizer step."""
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = None
