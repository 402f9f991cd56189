"""How well a model predicts text."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenPerplexity(Metric):
    """Perplexity per real token: ``exp`` of the negative mean log-probability of all tokens seen.

    Every token has the same weight, whatever batch or rank it came in. nan before the first token.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    negative_log_prob: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("negative_log_prob", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, mask: Tensor) -> None:
        """Count more tokens.

        Args:
            log_probs: [B, T] float, log-probabilities of the tokens; junk where ``mask`` is False is ignored.
            mask: [B, T] bool, True = counts.

        Raises:
            ValueError: The shapes differ.
            TypeError: ``mask`` is not bool.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = counts), got {mask.dtype}")
        if mask.shape != log_probs.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, but log_probs has shape {tuple(log_probs.shape)}")
        kept = torch.where(mask, log_probs.detach(), torch.zeros_like(log_probs))
        self.negative_log_prob = self.negative_log_prob - kept.double().sum()
        self.tokens = self.tokens + mask.sum()

    def compute(self) -> Tensor:
        """Perplexity so far, 0-dim float32."""
        return (self.negative_log_prob / self.tokens).exp().float()
