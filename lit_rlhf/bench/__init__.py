"""Benchmarks: a configuration trained for a few iterations in its own process, measured and compared.

:mod:`~lit_rlhf.bench.process` starts the processes, :mod:`~lit_rlhf.bench.run` is what each of them does,
:mod:`~lit_rlhf.bench.probe` measures the machine and counts the work, :mod:`~lit_rlhf.bench.report` prints tables.
"""

from lit_rlhf.bench.workload import Workload

__all__ = ["Workload"]
