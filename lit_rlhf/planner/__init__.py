"""Memory of a run before it runs: shapes without weights, and the framework's own passes on them."""

from lit_rlhf.planner.live import LiveBytes
from lit_rlhf.planner.plan import (
    KINDS,
    PHASES,
    Planner,
    Prediction,
    Row,
    Setting,
    make_rows,
)
from lit_rlhf.planner.shapes import SHAPES, kv_cache_bytes, load_config
from lit_rlhf.planner.simulation import Simulation, Sizes, count_parameters

__all__ = [
    "KINDS",
    "PHASES",
    "SHAPES",
    "LiveBytes",
    "Planner",
    "Prediction",
    "Row",
    "Setting",
    "Simulation",
    "Sizes",
    "count_parameters",
    "kv_cache_bytes",
    "load_config",
    "make_rows",
]
