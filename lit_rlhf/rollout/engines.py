"""Engines: what samples the responses of a rollout."""

from typing import Any, Literal

from transformers import PreTrainedModel

from lit_rlhf.errors import ConfigError
from lit_rlhf.rollout.decoding import DynamicDecoder
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.generation import Request, decode_request
from lit_rlhf.rollout.static import StaticDecoder


class Engine:
    """Samples responses with the current actor. Subclass it, override :meth:`respond`, and name the class path in YAML.

    ``gives_log_probs`` says whether the engine can keep the log-probs of sampling; where it cannot, a forward pass over
    the responses computes them.
    """

    gives_log_probs: bool = False

    def generate(self, model: PreTrainedModel, *prompts: Any, **options: Any) -> Experience:
        """Respond to the :class:`Request` of these arguments; an engine may override this instead of ``respond``."""
        return self.respond(model, Request(*prompts, **options))

    def respond(self, model: PreTrainedModel, request: Request) -> Experience:
        """Sample responses to each prompt, and decode one greedily if wanted.

        Args:
            model: The actor's language model on its device, in eval mode, its adapter on.
            request: Prompts and settings.

        Returns:
            An :class:`Experience` with the sequence fields filled, all responses padded to one T: ``[N * samples]``
            sampled rows, those of a prompt adjacent, whose ``greedy`` holds the N greedy ones. Without samples: the
            greedy rows.
        """
        raise NotImplementedError(f"{type(self).__name__} must define respond")


class TransformersEngine(Engine):
    """The training weights themselves, run by transformers.

    Args:
        cache: ``dynamic`` grows the KV cache and drops the rows that ended; ``static`` has one of fixed size, which
            ``compile`` needs. Families without such a cache are refused.
        compile: Compile the decoding steps, on CUDA with CUDA graphs; the first rollout then compiles too.
            Requires ``cache: static``.

    Raises:
        ValueError: ``compile`` with the dynamic cache, whose steps all differ in shape.
    """

    gives_log_probs = True

    def __init__(self, cache: Literal["dynamic", "static"] = "dynamic", compile: bool = False) -> None:
        super().__init__()
        if compile and cache != "static":
            raise ConfigError("engine.compile needs engine.cache: static; the steps of a growing cache differ in shape")
        self.compile = compile
        self.decoder = StaticDecoder(compile) if cache == "static" else DynamicDecoder()

    def respond(self, model: PreTrainedModel, request: Request) -> Experience:
        """Decode with the training weights; see :class:`Engine`."""
        return decode_request(model, request, self.decoder)
