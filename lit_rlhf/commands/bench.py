"""``lit-rlhf bench``: seconds and bytes of on-policy training, measured by really training a few iterations."""

from typing import Any

from lit_rlhf.bench import Workload
from lit_rlhf.errors import ConfigError


def bench(layout: str = "hydra", algorithm: str = "PPO", json: bool = False, **kwargs: Any) -> None:
    """Measure one configuration: seconds per sample and peak memory by phase, passes, FLOPs, share of the roofline.

    Args:
        layout: A layout's name, or the import path of your own.
        algorithm: An on-policy algorithm's name, or the import path of your own.
        json: Print one line of JSON instead of the table.
        **kwargs: See :class:`lit_rlhf.bench.Workload`.
    """
    workload = Workload(**kwargs)
    from lit_rlhf.bench.process import measure_one
    from lit_rlhf.bench.report import print_one

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
        **kwargs: See :class:`lit_rlhf.bench.Workload`.
    """
    workload = Workload(**kwargs)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    from lit_rlhf.bench.process import measure_alternating
    from lit_rlhf.bench.report import print_comparison, write_comparison

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
