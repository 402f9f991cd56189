"""Sampling settings, and drawing a token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from lit_rlhf.errors import NonFiniteError

# Tokens whose probabilities are added up before one of them is chosen; near the square root of usual vocabularies.
BLOCK = 256
# The nucleus is searched among this many tokens before everything is sorted.
NUCLEUS_HEAD = 1024


@dataclass
class Sampling:
    """How responses are sampled. Nothing else is applied: the hub's own sampling settings are switched off.

    Args:
        max_new_tokens: Longest response, in tokens.
        min_new_tokens: No EOS before this many tokens.
        temperature: Divides the logits; log-probs are taken at the same temperature.
        top_p: Nucleus probability mass; 1 samples the policy itself.
        top_k: Number of most probable tokens kept; 0 keeps all.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, one line each."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"sampling.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            found.append(f"sampling.min_new_tokens must be in 0..{self.max_new_tokens}, got {self.min_new_tokens}")
        if self.temperature <= 0:
            found.append(f"sampling.temperature must be positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            found.append(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            found.append(f"sampling.top_k must not be negative, got {self.top_k}")
        return found

    def weights(self, probabilities: Tensor) -> Tensor:
        """Return ``[B, V]`` weights: the probabilities, zero where ``top_k`` and then ``top_p`` leave a token out."""
        weights = probabilities
        if 0 < self.top_k < weights.shape[1]:
            weights = weights.masked_fill(weights < weights.topk(self.top_k).values[:, -1:], 0.0)
        if self.top_p < 1:
            weights = weights.masked_fill(weights < self._nucleus_floor(weights), 0.0)
        return weights

    def _nucleus_floor(self, weights: Tensor) -> Tensor:
        """Return ``[B, 1]``: the smallest weight in the smallest set of tokens that holds ``top_p`` of the mass."""
        mass = self.top_p * weights.sum(dim=1, keepdim=True)
        head = weights.topk(min(self.top_k or NUCLEUS_HEAD, weights.shape[1])).values
        # On a GPU the check would synchronize at every step, so it always sorts.
        if (self.top_k == 0 and weights.device.type != "cpu") or (
            self.top_k == 0 and bool((head.sum(dim=1, keepdim=True) < mass).any())
        ):
            head = weights.sort(dim=1, descending=True).values
        larger = head.cumsum(dim=1) - head
        last = (larger < mass).sum(dim=1, keepdim=True) - 1
        return head.gather(1, last.clamp_min(0))


def uniform_dtype(device: torch.device) -> torch.dtype:
    """Return float64 where the device has it: float32's 24 bits give tokens of 1e-9 probability either 0 or 6e-8."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one index per row with probability proportional to its weight, from one uniform number per row.

    Ten times faster than ``torch.multinomial`` on a CPU, which draws an exponential for every weight. First a block
    of weights is chosen, then a weight of the block; sums are taken in the uniforms' dtype.

    Args:
        weights: ``[B, V]`` float, not negative; a row's sum need not be 1.
        uniforms: ``[B]`` float in [0, 1].

    Returns:
        ``[B]`` long. A weight of zero is never chosen, unless the row holds nothing else.
    """
    blocks = nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block, rest = _choose(blocks.sum(dim=2), uniforms)
    members = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)
    member, _ = _choose(members, rest)
    return block * BLOCK + member


def _choose(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ``[B]`` chosen indices, and what is left of the uniforms: again uniform, whatever was chosen."""
    weights = weights.to(uniforms.dtype)
    ends = weights.cumsum(dim=1)
    target = uniforms[:, None] * ends[:, -1:]
    # A parallel cumsum may step up where weights are zero, or never pass the target: both are checked.
    beyond = (ends > target) & (weights > 0)
    chosen = torch.where(beyond.any(dim=1), beyond.int().argmax(dim=1), weights.argmax(dim=1))[:, None]
    width = weights.gather(1, chosen)
    rest = (target - ends.gather(1, chosen) + width) / width
    return chosen[:, 0], rest.clamp(0, 1)[:, 0]


class Sampler:
    """Chooses the next token of each row and computes its log-prob, in one pass over the logits.

    Args:
        sampling: Settings.
        uniforms: ``[B, T]`` uniform numbers in [0, 1), a row's own for each step: so its tokens depend neither on which
            rows are decoded beside it nor on when those end.
        greedy: ``[B]`` bool, rows that take their most probable token.
        eos_ids: ``[E]`` long, ids that ``min_new_tokens`` forbids.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, greedy: Tensor, eos_ids: Tensor) -> None:
        self.sampling = sampling
        self.uniforms = uniforms
        self.greedy = greedy
        self.eos_ids = eos_ids
        self._any_greedy, self._any_sampled = bool(greedy.any()), not bool(greedy.all())
        self._finite = torch.ones((), dtype=torch.bool, device=uniforms.device)

    def __call__(self, logits: Tensor, step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the tokens of one step.

        Args:
            logits: ``[A, V]`` of the rows still decoded.
            step: Response column.
            rows: ``[A]`` long, their places among all B.

        Returns:
            ``[A]`` long tokens, and their ``[A]`` float32 log-probs under the policy itself at its temperature: top-k,
            top-p and minimum length do not affect them.
        """
        logits = logits.float()
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        policy = logits.softmax(dim=1)
        # Not finite once any logit is NaN or +inf.
        self._finite &= policy[:, 0].isfinite().all()
        allowed, probabilities = logits, policy
        if step < self.sampling.min_new_tokens:
            allowed = logits.index_fill(1, self.eos_ids, -torch.inf)
            probabilities = allowed.softmax(dim=1)
        tokens = rows
        if self._any_sampled:
            tokens = inverse_cdf(self.sampling.weights(probabilities), self.uniforms[rows, step])
        if self._any_greedy:
            tokens = torch.where(self.greedy[rows], allowed.argmax(dim=1), tokens)
        # The chosen token's own probability may have underflowed; the largest one has not.
        normalizer = logits.amax(dim=1) - policy.amax(dim=1).log()
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - normalizer

    def check(self) -> None:
        """Check afterwards whether all logits were finite; a check at every step would synchronize the device.

        Raises:
            NonFiniteError: They were not.
        """
        if not bool(self._finite):
            raise NonFiniteError("probability tensor contains nan: the policy's logits are not finite")


class DrawnToken(LogitsProcessor):
    """Makes transformers' ``generate`` take the tokens of a :class:`Sampler`, and keeps their log-probs.

    Args:
        sampler: Chooses the tokens.
        prompt_length: Number of columns of the prompt.
    """

    def __init__(self, sampler: Sampler, prompt_length: int) -> None:
        super().__init__()
        self._sampler = sampler
        self._prompt_length = prompt_length
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``[B, V]`` scores whose maximum is the chosen token."""
        rows = torch.arange(len(scores), device=scores.device)
        tokens, log_probs = self._sampler(scores, input_ids.shape[1] - self._prompt_length, rows)
        self.log_probs.append(log_probs)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
