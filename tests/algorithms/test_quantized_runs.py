"""Whole Lightning runs on quantized frozen trunks: on CUDA where there is one, else on bitsandbytes' CPU kernels.

The model's rows are whole blocks of 64 weights, which bitsandbytes' CPU kernel wants, and two channels of each of its
norms are large: the outliers that LLM.int8() computes in 16 bits.
"""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import make_ppo, make_trainer, quantization_device
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_rlhf import DPO, PPO, Experience, HydraSFT, LoraArgs, PreferenceData, PromptData, ReMax, TransformersEngine
from lit_rlhf.backbone import load_language_model, load_tokenizer
from lit_rlhf.cli import main

KINDS = ["nf4", "int8"]
# What 8-bit rounding makes of a log-prob where other rows' outliers change a row's reading.
INT8 = 0.05
RESPONSE = 5
Fit = Callable[..., L.Trainer]
Stage = Callable[..., "tuple[Path, Watch]"]


def fixed_batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences without padding: tokens, attention mask, response mask."""
    tokens = torch.randint(3, 1000, (4, 6 + RESPONSE), generator=torch.Generator().manual_seed(5)).to(device)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    return tokens, kept, kept[:, -RESPONSE:]


class Watch(L.Callback):
    """Keeps what a run's roles say of a fixed batch and its frozen weights, at both ends, and its rollouts."""

    def __init__(self) -> None:
        self.readings: list[dict[str, Tensor]] = []
        self.frozen: list[dict[str, Tensor]] = []
        self.experiences: list[Experience] = []
        self.differences: list[Tensor] = []

    def _look(self, module: Any) -> None:
        with torch.no_grad():
            read = module.backbone(tuple(module.backbone.layout.roles), *fixed_batch(module.device))
        self.readings.append({role: value.cpu() for role, value in read.items()})
        parameters = module.backbone.named_parameters()
        self.frozen.append({name: p.detach().cpu().clone() for name, p in parameters if not p.requires_grad})

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._look(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._look(module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx or not isinstance(batch, Experience):
            return
        self.experiences.append(module.rollout_buffer.experience)
        with torch.no_grad():
            read = module.backbone(("actor",), batch.tokens, batch.attention_mask, batch.mask)
        self.differences.append((read["actor"] - batch.require("log_probs"))[batch.mask])


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with quantization_device() as device:
        yield device


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    language_model = load_language_model("random:tiny")
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.dim() == 1:
                parameter[:2] *= 10
    return save(language_model, folder)


def save(language_model: PreTrainedModel, folder: Path) -> str:
    language_model.save_pretrained(folder)
    load_tokenizer("random:tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fit(device: torch.device) -> Fit:
    def fit(module: Any, data: Any, folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> L.Trainer:
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        trainer = make_trainer(folder, epochs, accelerator=accelerator, **options)
        trainer.callbacks.append(Watch())
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return trainer

    return fit


def watched(trainer: L.Trainer) -> Watch:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Watch))


@pytest.fixture(scope="module")
def hydra_sft(fit: Fit, model: str, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Checkpoint of a short Hydra-SFT run with LoRA, and what it showed; one for each setting."""
    done: dict[tuple[Any, ...], tuple[Path, Watch]] = {}

    def hydra_sft(quantization: str | None, model: str = model, dtype: str = "float32") -> tuple[Path, Watch]:
        key = (quantization, model, dtype)
        if key not in done:
            folder = tmp_path_factory.mktemp("hydra_sft")
            L.seed_everything(0, verbose=False)
            data = PreferenceData(train=str(data_folder / "pairs.jsonl"), validation_size=4, batch_size=4)
            module = HydraSFT(
                model=model, dtype=dtype, optimizer=steady(1e-2), lora=LoraArgs(r=4), quantization=quantization
            )
            trainer = fit(module, data, folder, 3, limit_val_batches=1.0)
            done[key] = folder / "last.ckpt", watched(trainer)
        return done[key]

    return hydra_sft


@pytest.fixture
def start(hydra_sft: Stage, model: str) -> Callable[..., dict[str, Any]]:
    """The arguments of a stage that goes on from Hydra-SFT."""

    def start(quantization: str | None, model: str = model, dtype: str = "float32") -> dict[str, Any]:
        path, _ = hydra_sft(quantization, model, dtype)
        stage = {"model": model, "dtype": dtype, "quantization": quantization, "policy_checkpoint": str(path)}
        return {**stage, "optimizer": steady(1e-2)}

    return start


def steady(lr: float) -> Callable[..., torch.optim.Optimizer]:
    """AdamW that does not blow up the rounding of gradients near zero."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, eps=1e-4)


def assert_same_weights(ours: Any, theirs: Any, **tolerance: float) -> None:
    ours, theirs = ours.lightning_module.state_dict(), theirs.lightning_module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


@pytest.mark.parametrize("layout", ["hydra", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_ppo_trains_adapters_and_leaves_the_quantized_trunks_alone(
    kind: str, layout: str, hydra_sft: Stage, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path
) -> None:
    trainer = fit(make_ppo(layout=layout, **start(kind)), prompts, tmp_path, 3)
    watch = watched(trainer)
    before, after = watch.frozen
    bits = {p.dtype for p in before.values()} & {torch.int8, torch.uint8}
    assert bits == {torch.int8 if kind == "int8" else torch.uint8}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name

    first, last = watch.readings
    _, sft = hydra_sft(kind)
    assert torch.equal(first["reference"], sft.readings[-1]["actor"])
    assert torch.equal(first["reward"], sft.readings[-1]["reward"])
    assert not torch.equal(sft.readings[0]["actor"], sft.readings[-1]["actor"])
    assert torch.equal(last["reference"], first["reference"])
    assert torch.equal(last["reward"], first["reward"])
    assert torch.equal(first["actor"], first["reference"])
    assert (last["actor"] - last["reference"]).abs().max() > 0.1
    assert not torch.equal(last["critic"], first["critic"])

    sampled, *later = watch.experiences
    assert torch.equal(sampled.log_probs, sampled.ref_log_probs)
    for experience in later:
        assert (experience.log_probs - experience.ref_log_probs).abs().max() > 0.1
    # The minibatch is half of the rows that were scored.
    for difference in watch.differences:
        torch.testing.assert_close(
            difference, torch.zeros_like(difference), atol=1e-5 if kind == "nf4" else INT8, rtol=0
        )

    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = trainer.lightning_module.backbone.trainable_names
    assert set(content["state_dict"]) == {f"backbone.{name}" for name in trained}
    assert {value.dtype for value in content["state_dict"].values()} == {torch.float32}
    assert all("lora_" in name or ".heads." in name for name in content["state_dict"])


@pytest.mark.parametrize("layout", ["hydra", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_every_number(
    kind: str, layout: str, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path
) -> None:
    settings = {"layout": layout, "reward_scaling": "running", **start(kind)}
    whole = fit(make_ppo(**settings), prompts, tmp_path / "whole", 3)
    fit(make_ppo(**settings), prompts, tmp_path / "part", 1)
    checkpoint = tmp_path / "part" / "last.ckpt"
    resumed = fit(make_ppo(**settings), prompts, tmp_path / "resumed", 3, checkpoint)
    assert_same_weights(resumed, whole)
    expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "resumed")
    assert {row["epoch"] for row in found} == {"1", "2"}
    assert found == [row for row in expected if row["epoch"] != "0"]
    with pytest.raises(ValueError, match=f"cannot resume: quantization was '{kind}' and is now None"):
        fit(make_ppo(**{**settings, "quantization": None}), prompts, tmp_path / "other", 3, checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_remax_runs(kind: str, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo(ReMax, **{**start(kind), "inner_epochs": 1, "minibatch_size": 8})
    watch = watched(fit(module, prompts, tmp_path, 2))
    assert torch.equal(watch.experiences[0].log_probs, watch.experiences[0].ref_log_probs)
    assert torch.equal(watch.readings[-1]["reference"], watch.readings[0]["reference"])
    assert (watch.readings[-1]["actor"] - watch.readings[0]["actor"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_starts_at_log_2_and_prefers_the_chosen_responses(
    kind: str, start: Any, fit: Fit, pairs: PreferenceData, tmp_path: Path
) -> None:
    trainer = fit(DPO(lora=LoraArgs(r=4), **start(kind)), pairs, tmp_path, 3, limit_val_batches=1.0)
    losses = [float(row["train/loss"]) for row in metrics(tmp_path) if row["train/loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert trainer.callback_metrics["val/accuracy"] == 1
    watch = watched(trainer)
    assert torch.equal(watch.readings[-1]["reference"], watch.readings[0]["reference"])


def test_an_nf4_run_is_the_run_on_the_weights_it_stands_for(
    start: Any, hydra_sft: Stage, fit: Fit, model: str, prompts: PromptData, tmp_path: Path
) -> None:
    """The plain run takes every path of ours: fused LoRA layers, log-probs kept from decoding, merged stages."""
    exact = load_language_model(model)
    for name, module in load_language_model(model, "float32", "nf4").named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = exact.get_submodule(name).weight
            weight.data.copy_(dequantize_module_weight(module).view_as(weight))
    plain = save(exact, tmp_path / "plain")
    sft = [hydra_sft("nf4")[1], hydra_sft(None, plain)[1]]
    torch.testing.assert_close(sft[0].readings[-1]["actor"], sft[1].readings[-1]["actor"], atol=1e-4, rtol=1e-4)
    runs = [
        fit(make_ppo(**{**start(*settings), "minibatch_size": 8}), prompts, tmp_path / str(settings[0]), 2)
        for settings in (("nf4",), (None, plain))
    ]
    for ours, theirs in zip(*(watched(run).experiences for run in runs), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.advantages, theirs.advantages, atol=1e-3, rtol=1e-3)
    assert_same_weights(*runs, atol=1e-4, rtol=1e-3)


class NothingCarried(PPO):
    """Runs every minibatch again, though scoring has just run it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.collector.trained_as_one = False


@pytest.mark.parametrize("kind", KINDS)
def test_the_pass_that_scoring_carries_over_trains_to_the_same_weights(
    kind: str, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path
) -> None:
    settings = {**start(kind), "minibatch_size": 8, "inner_epochs": 1}
    runs = [
        fit(make_ppo(algorithm, **settings), prompts, tmp_path / algorithm.__name__, 3)
        for algorithm in (PPO, NothingCarried)
    ]
    assert_same_weights(*runs)
    assert float(runs[0].callback_metrics["train/ratio_mean"]) == 1.0


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("nf4", "bfloat16"),
        ("int8", "float32"),
        pytest.param("nf4", "float32", marks=pytest.mark.slow),
        pytest.param("int8", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing_trains_to_the_same_weights(
    kind: str, dtype: str, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path
) -> None:
    runs = []
    for checkpointing in (False, True):
        module = make_ppo(gradient_checkpointing=checkpointing, **start(kind, dtype=dtype))
        runs.append(fit(module, prompts, tmp_path / str(checkpointing), 2))
    assert_same_weights(*runs)
    module, watch = runs[1].lightning_module, watched(runs[1])
    assert {p.dtype for p in module.backbone.parameters() if p.requires_grad} == {torch.float32}
    assert getattr(torch, dtype) in {value.dtype for value in watch.frozen[0].values()}
    assert torch.equal(watch.readings[-1]["reference"], watch.readings[0]["reference"])
    assert torch.equal(watch.experiences[0].log_probs, watch.experiences[0].ref_log_probs)


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 0.1)])
def test_accumulated_minibatches_train_as_one_does(
    kind: str, tolerance: float, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path
) -> None:
    runs = []
    for size in (8, 2):
        module = make_ppo(**{**start(kind), "minibatch_size": size, "inner_epochs": 1})
        runs.append(fit(module, prompts, tmp_path / str(size), 1, accumulate_grad_batches=8 // size))
    assert runs[0].global_step == runs[1].global_step == 1
    # The B matrices start at zero, so they are the update.
    whole, parts = (
        torch.cat([v.flatten() for n, v in run.lightning_module.state_dict().items() if "lora_B" in n]) for run in runs
    )
    assert whole.norm() > 0
    assert (parts - whole).norm() < tolerance * whole.norm()


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 2e-5), ("int8", INT8)])
def test_decoding_reads_the_quantized_policy(
    kind: str, tolerance: float, start: Any, fit: Fit, prompts: PromptData, tmp_path: Path
) -> None:
    """Log-probs of sampling equal those of a pass over the responses; a static cache gives the same."""
    for cache in ("dynamic", "static"):
        module = make_ppo(keep_log_probs=True, samples_per_prompt=2, engine=TransformersEngine(cache), **start(kind))
        watch = watched(fit(module, prompts, tmp_path / cache, 2))
        first, second = watch.experiences
        torch.testing.assert_close(first.log_probs, first.ref_log_probs, atol=tolerance, rtol=0)
        assert (second.log_probs - second.ref_log_probs).abs().max() > 0.1
        for difference in watch.differences:
            torch.testing.assert_close(difference, torch.zeros_like(difference), atol=tolerance, rtol=0)


@torch.no_grad()
def log_probs_of(language_model: Any, device: torch.device) -> Tensor:
    """Log-probs of the fixed batch's responses, by transformers alone."""
    tokens, *_ = fixed_batch(device)
    logits = language_model.to(device)(input_ids=tokens).logits[:, -RESPONSE - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[:, -RESPONSE:, None])[..., 0].cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_exports_of_a_run(
    kind: str, start: Any, fit: Fit, device: torch.device, model: str, prompts: PromptData, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The adapter is the policy on the base model quantized alike; merged, it is added to the plain weights."""
    monkeypatch.chdir(tmp_path)
    trained = watched(fit(make_ppo(**start(kind)), prompts, tmp_path, 3)).readings[-1]
    for name in ("peft", "merged"):
        main(["export", "last.ckpt", name, "--format", name])
        main(["generate", name, "--prompt+", "The plot", "--greedy", "true", "--out", f"{name}.jsonl"])
    assert Path("peft.jsonl").read_text() == Path("merged.jsonl").read_text()
    alike = PeftModel.from_pretrained(load_language_model(model, "float32", kind), "peft").eval()
    # Two stages' sets became one, whose sum is rounded in another order: int8 may then round an input the other way.
    tolerance = 2e-5 if kind == "nf4" else INT8
    torch.testing.assert_close(log_probs_of(alike, device), trained["actor"], atol=tolerance, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    plain = PeftModel.from_pretrained(load_language_model(model), "peft").eval()
    torch.testing.assert_close(log_probs_of(merged, device), log_probs_of(plain, device), atol=2e-5, rtol=0)
    # What the quantization of the trunk took away is less than what the stages taught.
    lost, learned = (log_probs_of(m, device) - trained["actor"] for m in (merged, load_language_model(model)))
    assert lost.abs().mean() < learned.abs().mean()
