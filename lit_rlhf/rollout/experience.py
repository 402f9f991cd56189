"""The record of one rollout."""

from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor
from transformers import PreTrainedTokenizerBase


class PromptBatch(TypedDict):
    """A batch of n prompts, left-padded to P."""

    tokens: Tensor
    """``[n, P]`` long."""
    attention_mask: Tensor
    """``[n, P]`` bool, True = token counts."""
    prompts: list[str]
    """Their texts."""
    columns: dict[str, list[Any]]
    """The data set's other columns, n values each."""


class Sample(TypedDict):
    """One response as text, for tables."""

    prompt: str
    response: str
    score: float


FILLED_BY = {
    "log_probs": "sample or score",
    "ref_log_probs": "score",
    "values": "score, where there is a critic,",
    "scores": "score",
    "greedy": "sample, with greedy=True,",
    "advantages": "estimate",
    "returns": "estimate, where there is a critic,",
}


class UnsetFieldError(AttributeError, ValueError):
    """A field of an experience was read before the step that fills it."""


class Experience:
    """Responses to N prompts and what was computed about them. Every tensor's first axis is the sample.

    Prompts are left-padded to P, responses right-padded to T, so that response column t is token column P+t.
    This padding is fixed once per rollout: scoring and training see the same layout, which ratio 1 needs in bf16.

    The fields from ``log_probs`` to ``greedy`` are filled by later steps. Until then reading one raises; ``hasattr``
    and ``getattr(experience, name, None)`` ask without raising, and setting one to None empties it. Further tensors
    that a module sets (``experience.weights = ...``, first axis the sample) travel with their rows into minibatches.

    Args:
        tokens: ``[N, P+T]`` long.
        attention_mask: ``[N, P+T]`` bool, True = token counts.
        mask: ``[N, T]`` bool, True = real response token, the first EOS included.
        truncated: ``[N]`` bool, True = the response hit its length limit without an EOS.
        log_probs: ``[N, T]`` float32, the sampling policy's. Filled by sampling or scoring.
        ref_log_probs: ``[N, T]`` float32, the reference's. Filled by scoring.
        values: ``[N, T]`` float32, the critic's before the update. Filled by scoring, never without a critic.
        scores: ``[N]`` float32, the reward of the whole response, as the reward gave it. Filled by scoring.
        advantages: ``[N, T]`` float32. Filled by ``estimate``.
        returns: ``[N, T]`` float32, the critic's targets. Filled by ``estimate``, never without a critic.
        greedy: The greedy responses to the same prompts, one per prompt, until the advantages are known; only where an
            algorithm asks for them.
        count: 0-dim float, set on minibatches: real tokens of a minibatch, averaged over ranks and over the minibatches
            of one optimizer step. Token losses divided by it add up to the mean over all tokens of the step. None: the
            loss divides by its own tokens.
        left_out: The rollout holds a number that is not finite: nothing is updated from it.

    Raises:
        UnsetFieldError: (an AttributeError) A field is read before it was filled.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    truncated: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor
    greedy: "Experience"
    count: Tensor | None = None
    left_out: bool = False

    # Not a dataclass: code that walks dataclass fields (FSDP, Lightning) would access unset ones.
    def __init__(self, tokens: Tensor, attention_mask: Tensor, mask: Tensor, truncated: Tensor, **filled: Any) -> None:
        given = {"tokens": tokens, "attention_mask": attention_mask, "mask": mask, "truncated": truncated, **filled}
        for name, value in given.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None:
            vars(self).pop(name, None)
        else:
            vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        # Called for unset attributes only.
        if any(name in vars(kind).get("__annotations__", {}) for kind in type(self).__mro__):
            by = f" ({FILLED_BY[name]} fills it)" if name in FILLED_BY else ""
            raise UnsetFieldError(f"experience has no {name} yet: the step that fills it has not run{by}")
        raise AttributeError(f"an Experience has no field {name!r}")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of a forward pass: tokens, attention mask, response mask."""
        return self.tokens, self.attention_mask, self.mask

    def replace(self, **changes: Any) -> "Experience":
        """Return a copy with some fields changed; the others are shared."""
        return type(self)(**{**vars(self), **changes})

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Experience":
        return self.replace(
            **{name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        )

    def __getitem__(self, index: slice | Tensor) -> "Experience":
        """Return the samples of a slice (views) or an index tensor (copies)."""
        return self._map(lambda tensor: tensor[index] if tensor.dim() else tensor)

    def to(self, *args: Any, **kwargs: Any) -> "Experience":
        """Return the record with every tensor moved; Lightning's batch transfer calls this."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def split(self, size: int) -> list["Experience"]:
        """Return consecutive chunks of at most ``size`` samples, as views."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def trim(self, prompt: int, response: int) -> "Experience":
        """Return the record with ``prompt`` and ``response`` columns left: padding dropped at both ends, as views."""
        width, longest = self.tokens.shape[1], self.mask.shape[1]
        columns = slice(width - longest - prompt, width - longest + response)
        kept = {
            name: value[:, columns] if value.shape[1] == width else value[:, :response]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.dim() == 2
        }
        return self.replace(**kept)

    def decode(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the response texts, special tokens removed."""
        rows = self.tokens[:, -self.mask.shape[1] :].tolist()
        lengths = self.mask.sum(dim=1).tolist()
        kept = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return tokenizer.batch_decode(kept, skip_special_tokens=True)

    def require(self, name: str) -> Tensor:
        """Return a field; the same as reading it, kept for modules written before reading raised."""
        value: Tensor = getattr(self, name)
        return value
