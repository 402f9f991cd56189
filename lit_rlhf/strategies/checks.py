"""Which trainer strategies train correctly here, which are refused, and why."""

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.errors import StrategyError
from lit_rlhf.strategies.fsdp2 import FSDP2Strategy
from lit_rlhf.strategies.sharding import data_parallel_mesh

# By the first word of Lightning's registered names.
REFUSED = {
    "fsdp": "FSDP1, whose flat parameters cannot hold frozen trunks and trained adapters that are called directly",
    "deepspeed": "DeepSpeed, whose engine owns the forward pass, while one step here runs several roles",
}


def refuse_strategy(name: str) -> None:
    """Refuse a strategy by its registered name, or its class's name or path, before anything is built.

    Raises:
        StrategyError: lit_rlhf cannot train under it; the message names the file to use instead.
    """
    word = name.rpartition(".")[2].lower().removesuffix("strategy").partition("_")[0]
    if word in REFUSED:
        raise StrategyError(
            f"strategy {name} is {REFUSED[word]}. Layer experiments/strategies/fsdp2.yaml over the run instead "
            "(strategy: fsdp2), which shards parameters, gradients and optimizer state as ZeRO-3 does"
        )


def check_strategy(strategy: Strategy, quantized: bool = False) -> None:
    """Refuse a strategy under which gradients or checkpoints would be wrong; before any model loads.

    Args:
        strategy: The trainer's.
        quantized: Whether frozen trunks are.

    Raises:
        StrategyError: It is FSDP1 or DeepSpeed, its device mesh is tensor parallel, or it offloads what cannot be.
    """
    for kind in type(strategy).__mro__:
        refuse_strategy(kind.__name__)
    if getattr(strategy, "cpu_offload", False):
        if quantized:
            raise StrategyError(
                "strategy: cpu_offload moves shards to host memory, but bitsandbytes' weights only work on the GPU. "
                "Remove cpu_offload, or set model.dtype: bfloat16 instead of model.quantization"
            )
        if getattr(strategy.precision_plugin, "scaler", None) is not None:
            raise StrategyError(
                "strategy: cpu_offload and precision 16-mixed cannot be combined: the loss scaler expects "
                "gradients on the GPU. Use precision bf16-mixed or 32-true"
            )
    if isinstance(strategy, ModelParallelStrategy):
        data_parallel_mesh(strategy.device_mesh)
        if not isinstance(strategy, FSDP2Strategy):
            rank_zero_warn(
                "ModelParallelStrategy resumes only its own checkpoints (it numbers optimizer state differently); "
                "strategy fsdp2 resumes and writes those of every strategy"
            )
