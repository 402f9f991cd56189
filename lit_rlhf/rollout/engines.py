"""Engines: what samples the responses of a rollout."""

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.errors import ConfigError
from lit_rlhf.rollout.decoding import DynamicDecoder
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.generation import generate
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.rollout.static import StaticDecoder


class Engine(ABC):
    """Samples responses with the current actor. Subclass it, and name the class path in YAML.

    ``gives_log_probs`` says whether the engine can keep the log-probs of sampling; where it cannot, a pass over the
    responses computes them.
    """

    gives_log_probs: bool = False

    @abstractmethod
    def generate(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        pad_id: int,
        eos_ids: list[int],
        *,
        samples: int = 1,
        greedy: bool = False,
        batch_size: int | None = None,
        keep_log_probs: bool = False,
        in_step: bool = False,
    ) -> Experience:
        """Sample responses to each prompt, and decode one greedily if wanted.

        Args:
            model: The actor's language model on its device, its LoRA set on.
            tokens: ``[N, P]`` long, left-padded.
            attention_mask: ``[N, P]`` bool, True = token counts.
            sampling: Settings.
            pad_id: Fills responses after their EOS.
            eos_ids: Every id that ends a response.
            samples: Responses sampled for each prompt; 0 decodes greedily only.
            greedy: Also decode the most probable tokens of each prompt.
            batch_size: Sequences decoded at once; None decodes all.
            keep_log_probs: Also fill ``log_probs``; asked only of engines that give them.
            in_step: The model is sharded: every pass gathers its weights from all ranks.

        Returns:
            What :func:`lit_rlhf.rollout.generate` returns: ``[N * samples]`` rows, those of a prompt together, whose
            ``greedy`` holds the N greedy ones; without samples the greedy rows.
        """


class TransformersEngine(Engine):
    """The training weights themselves, read by transformers.

    Args:
        cache: ``dynamic`` grows the KV cache and drops the rows that ended; ``static`` has one of fixed size, which
            ``compile`` needs. Families without such a cache are refused.
        compile: Compile the decoding steps, on CUDA with CUDA graphs; the first rollout then compiles too.
            Wants ``cache: static``.

    Raises:
        ValueError: ``compile`` with the dynamic cache, whose steps all differ in shape.
    """

    gives_log_probs = True

    def __init__(self, cache: Literal["dynamic", "static"] = "dynamic", compile: bool = False) -> None:
        if compile and cache != "static":
            raise ConfigError("engine.compile needs engine.cache: static; the steps of a growing cache differ in shape")
        self.compile = compile
        self.decoder = StaticDecoder(compile) if cache == "static" else DynamicDecoder()

    def generate(self, *args: Any, **kwargs: Any) -> Experience:
        """See :func:`lit_rlhf.rollout.generate`."""
        return generate(*args, **kwargs, decoder=self.decoder)
