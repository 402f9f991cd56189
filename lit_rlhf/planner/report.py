"""Predictions as a table and as plain data."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_rlhf.errors import ConfigError
from lit_rlhf.planner.plan import KINDS, PHASES, Planner, Prediction, Setting, make_rows
from lit_rlhf.planner.shapes import load_config

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
HEADINGS = {"adapters": "adapters\n+ heads", "gathered": "unsharded", "kv_cache": "KV cache"}
SHORT = {"generation": "gen.", "scoring": "scor.", "training": "train."}
NAMES = {"sft": "SFT, full", "lora_sft": "SFT, LoRA"}


def parse_bytes(text: str) -> int:
    """Read a size such as ``24GiB``, ``80GB`` or ``512MiB``; ``24G`` is binary, as in nvidia-smi.

    Raises:
        ConfigError: It is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"size {text!r} cannot be parsed; write 24GiB, 80GB or 512MiB")
    base = 1000 if match[3].lower() == "b" else 1024
    return int(float(match[1]) * base ** UNITS[match[2].lower()])


def assumptions(setting: Setting) -> list[str]:
    """Return the assumptions behind the numbers."""
    lines = [
        "Live bytes of tensors: the allocator's fragmentation, kernels' workspaces and the CUDA context are not "
        "included; leave room for them.",
        f"Every prompt is padded to {setting.prompt_length} tokens and every response has {setting.response_length}; "
        "some prompts are shorter (without any padding attention needs no mask, and less memory).",
        "Attention by SDPA's flash or memory-efficient kernel: no T x T scores are kept. The rollout itself (tokens, "
        "log-probs, advantages; kilobytes per sample) is not counted.",
        f"From the second optimizer step on. AdamW ({setting.adamw}) keeps two moments in the parameters' dtype, in "
        "all phases; Lightning frees a step's gradients only after the next step's loss is computed.",
    ]
    if setting.devices > 1 and setting.strategy == "ddp":
        lines.append("DDP keeps buckets as large as the gradients (gradient_as_bucket_view is off by default).")
    if setting.devices > 1 and setting.strategy == "fsdp2":
        lines.append(
            "FSDP2 divides parameters, gradients and moments by the devices; one decoder layer and all that is in no "
            "layer (embeddings, heads) are whole, in backward with gradients. Prefetching may hold one layer more."
        )
    return lines


def as_data(planner: Planner, predictions: Sequence[Prediction], model: str, fits: Mapping[str, int]) -> dict[str, Any]:
    """Return everything as plain data, bytes as integers.

    Args:
        planner: What predicted.
        predictions: The rows; the first is full SFT.
        model: The model's name.
        fits: Row name to largest batch, empty where none was searched.
    """
    setting = planner.setting
    plain = {name: value for name, value in vars(setting).items() if name != "lora"}
    reference = predictions[0].peak
    rows = []
    for p in predictions:
        row: dict[str, Any] = {
            "name": p.row.name,
            "phases": {phase: {**p.phases[phase], "total": p.total(phase)} for phase in PHASES if phase in p.phases},
            "largest": dict(p.largest),
            "peak": p.peak,
            "peak_phase": p.peak_phase,
            "ratio_to_full_sft": round(p.peak / reference, 4),
        }
        if fits:
            row["largest_batch"] = fits[p.row.name]
        rows.append(row)
    return {
        "model": model,
        "parameters": planner.parameters,
        "setting": {**plain, "lora": dict(vars(setting.lora))},
        "rows": rows,
        "assumptions": assumptions(setting),
        "versions": {name: _version(name) for name in ("lit-rlhf", "torch", "transformers", "peft")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def report(model: str, layouts: Sequence[str], setting: Setting, budget: str | None, as_json: bool) -> None:
    """Predict these layouts beside SFT and print the result.

    Args:
        model: Model name, see :func:`lit_rlhf.planner.load_config`.
        layouts: See :func:`lit_rlhf.planner.make_rows`.
        setting: What is planned.
        budget: Memory of a device, such as ``24GiB``; None searches no largest batch.
        as_json: Print one JSON object instead of the table.
    """
    available = None if budget is None else parse_bytes(budget)
    rows = make_rows(layouts, setting)
    planner = Planner(load_config(model), setting)
    predictions = [planner.predict(row) for row in rows]
    fits = {} if available is None else {row.name: planner.largest_batch(row, available) for row in rows}
    if as_json:
        print(json.dumps(as_data(planner, predictions, model, fits)))
    else:
        print_table(planner, predictions, model, fits, budget)


def print_table(
    planner: Planner, predictions: Sequence[Prediction], model: str, fits: Mapping[str, int], budget: str | None
) -> None:
    """Print the rows side by side: each kind at its largest, each phase's peak, the peak of all."""
    setting = planner.setting
    scale, unit = (2**30, "GiB") if max(p.peak for p in predictions) >= 2**30 else (2**20, "MiB")
    kinds = [kind for kind in KINDS if any(p.largest[kind] for p in predictions)]
    phases = [phase for phase in PHASES if any(phase in p.phases for p in predictions)]
    title = (
        f"{model}: {planner.parameters / 1e9:.2f} B parameters, {setting.precision}, LoRA rank {setting.lora.r}, "
        f"{setting.algorithm}, batch {setting.batch_size}"
        + (f" (rollout {setting.rollout_batch_size})" if setting.rollout_batch_size else "")
        + f" x ({setting.prompt_length} + {setting.response_length}) tokens"
        + (", gradient checkpointing" if setting.gradient_checkpointing else "")
        + (f", {setting.devices} devices ({setting.strategy})" if setting.devices > 1 else "")
        + f". {unit} per device"
    )
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    for kind in kinds:
        table.add_column(HEADINGS.get(kind, kind), justify="right")
    for phase in phases:
        table.add_column(SHORT[phase], justify="right", style="dim")
    table.add_column("peak", justify="right", style="bold")
    table.add_column("in", justify="left")
    table.add_column("x SFT", justify="right")
    if fits:
        table.add_column(f"batch in\n{budget}", justify="right", style="bold")
    for p in predictions:
        cells = [_cell(p.largest[kind], scale) for kind in kinds]
        cells += [_cell(p.total(phase), scale) if phase in p.phases else "" for phase in phases]
        cells += [_cell(p.peak, scale), SHORT[p.peak_phase], f"{p.peak / predictions[0].peak:.2f}"]
        if fits:
            cells.append(str(fits[p.row.name]) if fits[p.row.name] else "none")
        table.add_row(NAMES.get(p.row.name, p.row.name), *cells, end_section=p.row.name == "lora_sft")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width to fit into
    console.print(table)
    console.print(
        "Each kind at its largest (they are not largest together), each phase's peak, the peak and the phase it is in."
    )
    for line in assumptions(setting):
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def _cell(size: float, scale: int) -> str:
    return f"{size / scale:.2f}" if size else "-"
