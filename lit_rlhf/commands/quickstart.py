"""``lit-rlhf quickstart``: the whole path on a small real model. Heavy imports wait until it runs."""

from typing import Literal


def quickstart(
    out: str = "quickstart",
    seed: int = 0,
    tiny: bool = False,
    devices: int = 1,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
) -> None:
    """Align a small model with Hydra-RLHF and evaluate it with a scorer that training never saw.

    Args:
        out: Output folder; must not hold an earlier report.
        seed: Seed of training and sampling.
        tiny: The same pipeline on a two-layer model from random initialization, in under a minute.
        devices: Processes that share the training: batches and rollouts are divided among them.
        strategy: How they share it.
    """
    from lit_rlhf.commands.quickstart_pipeline import run_pipeline

    run_pipeline(out, seed, tiny, devices, strategy)


def main(argv: list[str]) -> None:
    """Parse the arguments and run."""
    from lit_rlhf.commands.run import run

    run(quickstart, argv, "quickstart")
