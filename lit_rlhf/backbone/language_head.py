"""The output embedding with the architecture's own logit scaling and soft-capping."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.errors import ConfigError
from lit_rlhf.functional import token_log_probs


@dataclass(frozen=True)
class LogitTransform:
    """``logits = softcap(scale * head(hidden))``, as Gemma, Granite or Cohere define it.

    Args:
        scale: Factor on the logits.
        softcap: ``cap * tanh(z / cap)`` after scaling; None for no cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Return the architecture's logits for the head's raw output."""
        logits = logits.float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def read_logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Read scale and soft cap from the config, and prove on eight probe tokens that nothing else is done.

    Raises:
        ValueError: The model's logits are not explained by its config; its log-probs would be silently wrong.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    else:
        scale = getattr(model, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0
    transform = LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))
    proven_elsewhere = model.get_output_embeddings().weight.is_meta  # by the rank that holds the weights
    if not proven_elsewhere and not _explains(model, transform):
        raise ConfigError(
            f"{type(model).__name__} changes its logits in a way that its config does not state "
            f"(tried {transform}). Its log-probs cannot be computed from the output embedding alone"
        )
    return transform


@torch.no_grad()
def _explains(model: PreTrainedModel, transform: LogitTransform) -> bool:
    weight = model.get_output_embeddings().weight
    tokens = torch.arange(8, device=weight.device).remainder(weight.shape[0]).unsqueeze(0)
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    ours = transform.apply(model.get_output_embeddings()(hidden))
    theirs = model(input_ids=tokens, use_cache=False).logits.float()
    tolerance = 1e-3 if weight.dtype == torch.float32 else 3e-2
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def masked_log_probs(
    model: PreTrainedModel,
    transform: LogitTransform,
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets where the mask is True; no other position touches the output embedding.

    Args:
        model: The causal language model whose output embedding is used.
        transform: Its logit transform.
        hidden: ``[B, T, H]``, hidden states that predict the targets.
        targets: ``[B, T]`` long.
        mask: ``[B, T]`` bool, True = compute.
        temperature: Divides the logits.
        with_entropy: Also return the entropy of each predicted distribution.

    Returns:
        Log-probs ``[B, T]`` float32, 0 where the mask is False, and entropies alike (or None).
    """
    head = model.get_output_embeddings()
    log_probs, entropy = token_log_probs(
        hidden[mask].to(head.weight.dtype),
        head.weight,
        targets[mask],
        bias=getattr(head, "bias", None),
        scale=transform.scale,
        softcap=transform.softcap,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    dense = torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device)
    return dense.masked_scatter(mask, log_probs), None if entropy is None else dense.masked_scatter(mask, entropy)
