"""``lit-rlhf memory``: how much memory each layout will need. No GPU, no weights."""

from dataclasses import fields
from typing import Literal

from lit_rlhf.errors import ConfigError


def memory(
    model: str | None = None,
    layout: str | list[str] = "all",
    algorithm: Literal["ppo", "reinforce", "remax", "rloo", "grpo", "reinforce_plus_plus"] = "ppo",
    batch_size: int = 8,
    rollout_batch_size: int | None = None,
    prompt_length: int = 256,
    response_length: int = 256,
    lora_rank: int = 16,
    lora_targets: str | list[str] = "all-linear",
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    gradient_checkpointing: bool = False,
    samples_per_prompt: int | None = None,
    reward_function: bool = False,
    accumulate_grad_batches: int = 1,
    adamw: Literal["foreach", "fused", "forloop"] = "foreach",
    devices: int = 1,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
    fit: str | None = None,
    json: bool = False,
) -> None:
    """Predict the memory of every layout beside SFT, by kind and phase, from the model's config alone.

    Args:
        model: A built-in shape (llama-7b, llama2-7b, opt-1.3b, gpt2, smollm2-135m, ...), or any model name that
            training accepts; only its config is read.
        layout: Layouts to compare: ``all``, a name or import path, or several: ``--layout "[hydra, lora]"``.
        algorithm: ``ppo`` and ``reinforce`` have a critic, the others none.
        batch_size: Sequences in one minibatch, per device.
        rollout_batch_size: Sequences generated and scored at once, per device; the default is ``batch_size``.
        prompt_length: Tokens that prompts are padded to.
        response_length: Tokens of a response.
        lora_rank: Rank of the adapters.
        lora_targets: Modules that carry LoRA: ``all-linear``, names, or a regular expression.
        precision: Dtype of the trunks. Adapters, heads and their optimizer state are float32.
        gradient_checkpointing: Recompute activations in backward.
        samples_per_prompt: Sampled responses that share the pass over their prompt; None is the algorithm's default.
        reward_function: Rewards come from a Python function: no reward model in memory.
        accumulate_grad_batches: Minibatches per optimizer step.
        adamw: Implementation of the optimizer's step; torch takes ``foreach`` on CUDA, which needs a copy of the
            trained parameters for a moment.
        devices: Number of devices; sizes are per device.
        strategy: ``ddp`` copies everything, ``fsdp2`` shards.
        fit: Memory of a device, such as ``24GiB``: also find the largest batch that fits.
        json: Print one JSON object instead of the table.
    """
    given = dict(locals())  # every argument by its name; settings have the same names
    if model is None:
        raise ConfigError("give --model NAME, for example --model llama-7b")
    from lit_rlhf.backbone import LoraArgs
    from lit_rlhf.planner import Setting
    from lit_rlhf.planner.report import report

    lora = LoraArgs(r=lora_rank, target_modules=lora_targets)
    setting = Setting(lora=lora, **{f.name: given[f.name] for f in fields(Setting) if f.name != "lora"})
    report(model, [layout] if isinstance(layout, str) else layout, setting, fit, json)


def main(argv: list[str]) -> None:
    """Parse the arguments and run."""
    from lit_rlhf.commands.run import run

    run(memory, argv, "memory")
