"""Tokens per second of decoding against what reading weights and cache allows, and against transformers' ``generate``.

    python experiments/benchmarks/decode.py --out decode.json

On CUDA a Llama of 1.3 billion random weights in bfloat16 with the actor's adapter of rank 16 unmerged, 64 prompts of
128 tokens, 128 new tokens each, no EOS; elsewhere a small one in float32, timed by processor time, its steps not
compiled unless ``--compile`` is given. The variants run in turn, every second round backwards; the first round of each
warms up (and compiles) and does not count. The roofline is the larger of the bytes that decoding must read over the
measured bytes/s and its FLOPs over the measured FLOP/s; the passes over the prompts are in the seconds, not in it.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lit_rlhf import LAYOUTS, Backbone, LoraArgs, Sampling, TransformersEngine
from lit_rlhf.bench import Workload
from lit_rlhf.bench.probe import decode_bytes, probe
from lit_rlhf.bench.report import make_console

PAD, EOS = 0, 2
BIG = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504}
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}


def make_backbone(sizes: dict[str, int], device: torch.device, dtype: torch.dtype, rank: int) -> Backbone:
    """Return layout ``hydra`` on random weights, the adapters changed so that they matter."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=32000, pad_token_id=PAD, eos_token_id=EOS)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    backbone = Backbone(LAYOUTS["hydra"].restricted_to(("actor", "reference")), {"hydra": model}, LoraArgs(r=rank))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return backbone.to(device)


def make_variants(
    backbone: Backbone, tokens: torch.Tensor, new_tokens: int, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """Return what is compared, by name; each call decodes the whole batch with the actor's adapter on."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    plain = GenerationConfig(do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=EOS, **length)

    def by_generate() -> Any:
        with backbone.use("actor") as model, torch.no_grad():
            return model.generate(tokens, attention_mask=mask.long(), generation_config=plain)

    def by(engine: TransformersEngine) -> Callable[[], Any]:
        def run() -> Any:
            with backbone.use("actor") as model:
                return engine.generate(model, tokens, mask, Sampling(**length), PAD, [EOS]).tokens

        return run

    variants = {
        "generate": by_generate,
        "dynamic": by(TransformersEngine()),
        "static": by(TransformersEngine("static")),
    }
    if compiled:
        variants["static, compiled"] = by(TransformersEngine("static", compile=True))
    return variants


def measure(variants: dict[str, Callable[[], Any]], shape: tuple[int, int], rounds: int, cuda: bool) -> dict[str, Any]:
    """Return each variant's seconds, one per round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            if cuda:
                torch.cuda.synchronize()
            since = time.perf_counter() if cuda else time.process_time()
            done = variants[name]()
            if cuda:
                torch.cuda.synchronize()
            passed = (time.perf_counter() if cuda else time.process_time()) - since
            if tuple(done.shape) != shape:
                raise SystemExit(f"decode.py: {name} gave {tuple(done.shape)}, not {shape}")
            if turn:
                seconds[name].append(passed)
    return seconds


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("prompt", 128), ("response", 128), ("rounds", 3), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="compile the static cache's steps off CUDA too")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    backbone = make_backbone(BIG if cuda else SMALL, device, dtype, args.rank)
    tokens = torch.randint(3, 32000, (args.batch, args.prompt), device=device)
    variants = make_variants(backbone, tokens, args.response, cuda or args.compile)
    seconds = measure(variants, (args.batch, args.prompt + args.response), args.rounds, cuda)

    workload = Workload(
        prompt_length=args.prompt, response_length=args.response, batch_size=args.batch,
        precision=str(dtype).removeprefix("torch."), lora_r=args.rank,
    )  # fmt: skip
    speeds = probe(device, dtype)
    total = args.batch * args.response
    read = decode_bytes(backbone, workload, {"calls": args.response, "passes": total})
    weights = sum(p.numel() for n, p in backbone.language_model("hydra").named_parameters() if "embed" not in n)
    least = max(read / speeds["bytes_per_second"], 2 * weights * total / speeds["flops_per_second"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "clock": "wall" if cuda else "processor",
        "settings": vars(args), "roofline_seconds": least, "bytes_read": read, **speeds, "seconds": seconds,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("lit-rlhf", "torch", "transformers", "peft")},
        "rows": {
            name: {
                "tokens_per_second": total / median,
                "to_generate": medians["generate"] / median,
                "of_roofline": least / median,
                "spread": (max(seconds[name]) - min(seconds[name])) / median,
            }
            for name, median in medians.items()
        },
    }  # fmt: skip
    table = Table("variant", "tokens/s", "to generate", "of the roofline", "spread", title=f"{result['device']}")
    for name, row in result["rows"].items():
        table.add_row(
            name, f"{row['tokens_per_second']:.0f}", f"{row['to_generate']:.2f}", f"{row['of_roofline']:.0%}",
            f"{row['spread']:.0%}",
        )  # fmt: skip
    make_console().print(table)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
