"""Strategies: FSDP2, how a backbone is sharded, what is refused and why."""

from lit_rlhf.errors import StrategyError
from lit_rlhf.strategies.checks import check_strategy, refuse_strategy
from lit_rlhf.strategies.fsdp2 import FSDP2Strategy, offload_backend
from lit_rlhf.strategies.sharding import class_path, data_parallel_mesh, shard, shard_module

__all__ = [
    "FSDP2Strategy",
    "StrategyError",
    "check_strategy",
    "class_path",
    "data_parallel_mesh",
    "offload_backend",
    "refuse_strategy",
    "shard",
    "shard_module",
]
