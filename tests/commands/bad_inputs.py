"""What users get wrong: a table of inputs, and the message that each must produce."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Files = dict[str, str | bytes | Callable[[Path], None]]

REWARDS = """
import time
NUMBER = 3
def rate(prompts, responses, **columns): return [len(response) / 10 for response in responses]
def fails(prompts, responses, **columns): raise KeyError("judge")
def too_few(prompts, responses, **columns): return [1.0]
def one_number(prompts, responses, **columns): return 1.0
def nothing(prompts, responses, **columns): return None
def nan(prompts, responses, **columns): return [1.0, float("nan")] * (len(responses) // 2)
def infinite(prompts, responses, **columns): return [float("inf")] * len(responses)
def text(prompts, responses, **columns): return ["good"] * len(responses)
def too_large(prompts, responses, **columns): return [1e300] * len(responses)
def narrow(prompts): return []
def hangs(prompts, responses, **columns): time.sleep(60)
"""


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Args:
        what: What is wrong.
        arguments: Of the command line; behind ``fit -c BASE.yaml`` where ``base`` names one.
        said: What the message must contain.
        base: ``ppo``, ``sft`` or ``reward``; None gives the arguments as they are.
        files: Name to content, or to a function that makes the file or folder.
        loads: True where only loaded weights can show it.
        status: 2 where a setting cannot be parsed, 1 where a value makes no sense.
    """

    what: str
    arguments: tuple[str, ...]
    said: str
    base: str | None = "ppo"
    files: Files = field(default_factory=dict)
    loads: bool = False
    status: int = 1


def typo(what: str, argument: str, said: str, **more: Any) -> Bad:
    return Bad(what, (argument,), said, status=2, **more)


def value(what: str, argument: str, said: str, **more: Any) -> Bad:
    return Bad(what, tuple(argument.split()), said, **more)


def rows(name: str, content: str | bytes, said: str, **more: Any) -> Bad:
    """A bad data file."""
    return Bad(f"data: {name}", (f"--data.train={name}",), said, files={name: content}, **more)


def command(what: str, arguments: str, said: str, **more: Any) -> Bad:
    return Bad(what, tuple(arguments.split()), said, base=None, **more)


def checkpoint(what: str, name: str, said: str, *arguments: str, **more: Any) -> Bad:
    """A bad checkpoint; ``{hydra}`` and the like stand for good ones."""
    return Bad(f"checkpoint: {what}", (f"--ckpt_path={name}", *arguments), said, **more)


def model_folder(*without: str, **config: Any) -> Callable[[Path], None]:
    """A copy of the tiny model's folder, lacking some files, its config changed."""

    def make(folder: Path) -> None:
        from lit_rlhf.backbone.loading import ASSETS

        folder.mkdir(exist_ok=True)
        for file in (ASSETS / "tiny").iterdir():
            if file.name not in without:
                (folder / file.name).write_bytes(file.read_bytes())
        settings = json.loads((ASSETS / "tiny" / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))

    return make


def with_weights(content: bytes | dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """A model folder with these weights."""

    def make(folder: Path) -> None:
        model_folder()(folder)
        if isinstance(content, bytes):
            (folder / "model.safetensors").write_bytes(content)
        else:
            save_file(content, folder / "model.safetensors", {"format": "pt"})

    return make


def with_tokenizer(**changed: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model_folder()(folder)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | changed
        file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return make


def adapter(**config: Any) -> Callable[[Path], None]:
    """A PEFT folder without weights."""

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))

    return make


def torn_adapter(folder: Path) -> None:
    adapter(base_model_name_or_path="random:tiny", target_modules=["q_proj"])(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"torn")


def text_of(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model_folder()(folder)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def model(what: str, made: Callable[[Path], None] | None, said: str, name: str = "./m", **more: Any) -> Bad:
    files: Files = {"m": made} if made is not None else {}
    return Bad(f"model: {what}", (f"--model.model={name}",), said, files=files, **more)


TYPOS = [
    typo("unknown setting", "--model.clipp=0.1", "'clipp' is not accepted"),
    typo("unknown lora setting", "--model.lora.rank=4", "rank"),
    typo("unknown sampling setting", "--model.sampling.temprature=1", "temprature"),
    typo("unknown trainer setting", "--trainer.epochs=4", "epochs"),
    typo("unknown data setting", "--data.trian=x", "trian"),
    typo("no number", "--model.rollout_size=many", "rollout_size: Expected a <class 'int'>. Got value: many"),
    typo("no choice", "--model.kl_estimator=k9", "kl_estimator: Expected a typing.Literal"),
    typo("no dtype", "--model.dtype=float23", "dtype: Expected a typing.Literal"),
    typo("no quantization", "--model.quantization=int2", "quantization"),
    typo("no precision", "--trainer.precision=17", "precision"),
    typo("no bool", "--model.gradient_checkpointing=maybe", "gradient_checkpointing: Expected a <class 'bool'>"),
    typo("no float", "--model.gamma=high", "gamma: Expected a <class 'float'>"),
    typo("list for a number", "--model.minibatch_size=[1, 2]", "minibatch_size: Expected a <class 'int'>"),
    typo("no seed", "--seed_everything=yesterday", "seed_everything"),
    typo("misspelt algorithm", "--model=PPOO", "unknown class 'PPOO'; did you mean PPO?"),
    typo("misspelt path", "--model=lit_rlhf.PPOO", "lit_rlhf.PPOO"),
    typo("missing module", "--model=my_modules.Best", "my_modules"),
    typo("misspelt data module", "--data=PromptDatta", "PromptDatta"),
    typo("misspelt reward", "--model.reward=FunctionRewrd", "FunctionRewrd"),
    typo("misspelt controller", "--model.kl=AdaptivKL", "AdaptivKL"),
    typo("misspelt optimizer", "--model.optimizer=torch.optim.AdamWW", "AdamWW"),
    typo("misspelt schedule", "--model.lr_scheduler=torch.optim.lr_scheduler.Cosin", "Cosin"),
    typo("misspelt logger", "--trainer.logger=CSVLoger", "CSVLoger"),
    typo("misspelt callback", "--trainer.callbacks=EarlyStoping", "EarlyStoping"),
    typo(
        "a class of another kind", "--model.kl=lit_rlhf.RoleReward", "does not correspond to a subclass of KLController"
    ),
    typo("unknown optimizer setting", "--model.optimizer.learning_rate=1", "learning_rate"),
    typo("shortened option", "--trainer.max_epoch=3", "unrecognized arguments: --trainer.max_epoch"),
    Bad(
        "option of a strategy's short name",
        ("--trainer.strategy=fsdp2", "--trainer.strategy.save_distributed_checkpoint=true"),
        "trainer.strategy: 'fsdp2' takes no options; put --trainer.strategy FSDP2Strategy before them",
        status=2,
    ),
    typo("learning rate in words", "--model.optimizer.lr=fast", "optimizer: lr: expected a number, not 'fast'"),
    typo("missing reward module", "--model.reward.function=no_module.rate", "no_module"),
    typo("missing reward function", "--model.reward.function=my_rewards.ratte", "ratte"),
    typo("reward that is not a function", "--model.reward.function=my_rewards.NUMBER", "NUMBER"),
]
"""Refused while the settings are read."""

VALUES = [
    value("minibatches do not divide the rollout", "--model.rollout_size=5", "rollout_size 5 must be a multiple of"),
    value("groups do not divide", "--model.samples_per_prompt=3", "must be a multiple of samples_per_prompt 3"),
    value(
        "accumulation does not divide", "--trainer.accumulate_grad_batches=3", "accumulate_grad_batches 3 must divide"
    ),
    value("no responses", "--model.rollout_size=0", "rollout_size must be positive, got 0"),
    value("negative minibatch", "--model.minibatch_size=-2", "minibatch_size must be positive, got -2"),
    value("no passes", "--model.inner_epochs=0", "inner_epochs must be positive"),
    value("negative clip", "--model.score_clip=-1", "score_clip must be positive"),
    value("discount above 1", "--model.gamma=1.5", "gamma must be in [0, 1], got 1.5"),
    value("discount no number", "--model.gamma=.nan", "gamma must be in [0, 1], got nan"),
    value("lambda", "--model.gae_lambda=-0.1", "gae_lambda must be in [0, 1]"),
    value("ratio clip", "--model.clip=0", "clip must be"),
    value("value weight", "--model.value_coef=-1", "value_coef must be at least 0"),
    value("critic's learning rate", "--model.critic_lr=0", "critic_lr must be positive"),
    value("learning rate", "--model.optimizer.lr=-1", "Invalid learning rate: -1"),
    value("cold", "--model.sampling.temperature=0", "sampling.temperature must be positive, got 0"),
    value("no tokens", "--model.sampling.max_new_tokens=0", "sampling.max_new_tokens must be at least 1"),
    value(
        "minimum above maximum", "--model.sampling.min_new_tokens=9", "sampling.min_new_tokens must be in 0..6, got 9"
    ),
    value("nucleus above 1", "--model.sampling.top_p=1.5", "sampling.top_p must be in (0, 1], got 1.5"),
    value("negative top_k", "--model.sampling.top_k=-1", "sampling.top_k must not be negative"),
    value("rank 0", "--model.lora.r=0", "lora.r must be at least 1, got 0"),
    value("negative alpha", "--model.lora.alpha=-1", "lora.alpha must be positive"),
    value("no targets", "--model.lora.target_modules=[]", "lora.target_modules is empty"),
    value("unknown set", "--model.lora.ranks.actress=4", "lora.ranks names 'actress'"),
    value(
        "target that is not there", "--model.lora.target_modules=[q_proj,qproj]", "no module is named 'qproj'; linear"
    ),
    value("pattern that matches nothing", "--model.lora.target_modules=.*attn$x", "no module path matches"),
    value("pattern that is none", "--model.lora.target_modules=(q_proj", "is not a regular expression"),
    value("embedding as target", "--model.lora.target_modules=[embed_tokens]", "embeddings cannot carry LoRA"),
    value("norm as target", "--model.lora.target_modules=[input_layernorm]", "input_layernorm"),
    value("unknown layout", "--model.layout=hydro", "layout must be one of full, lora"),
    value("missing layout module", "--model.layout=my_layouts.SPLIT", "no module named 'my_layouts'"),
    value("layout that is none", "--model.layout=my_rewards.NUMBER", "must be a Layout, got int"),
    value("negative KL", "--model.kl=FixedKL --model.kl.coefficient=-1", "coefficient must be finite and not negative"),
    value("KL horizon", "--model.kl=AdaptiveKL --model.kl.horizon=0.5", "horizon"),
    value("timeout", "--model.reward.timeout=0", "timeout must be positive"),
    value("16-bit everything", "--trainer.precision=bf16-true", "trainer.precision: 32-true with model.dtype"),
    value("unknown strategy", "--trainer.strategy=dpp", "invalid strategy name: `strategy='dpp'`"),
    value("unknown accelerator", "--trainer.accelerator=gpuu", "gpuu"),
    value("absent accelerator", "--trainer.accelerator=gpu", "gpu"),
    value("no devices", "--trainer.devices=0", "devices='0'"),
    value("unknown plugin", "--trainer.gradient_clip_algorithm=median", "median"),
    value(
        "checkpoints by steps",
        "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.every_n_train_steps=3",
        "by train steps",
    ),
    value(
        "checkpoints on exceptions",
        "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.save_on_exception=true",
        "save_on_exception",
    ),
    value(
        "monitor that is not logged",
        "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.monitor=val/scoore",
        "val/scoore",
        loads=True,
    ),
    value(
        "early stopping on what is not logged",
        "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val/scoore",
        "val/scoore` which is not available",
        loads=True,
    ),
    value(
        "validation less often than an iteration",
        "--trainer.val_check_interval=999",
        "`val_check_interval` (999) must be less",
        loads=True,
    ),
    value(
        "groups of one", "--model=RLOO --model.samples_per_prompt=1", "samples_per_prompt must be at least 2 for RLOO"
    ),
    value("two passes without a ratio", "--model=ReMax --model.inner_epochs=2", "inner_epochs must be 1 for ReMax"),
    value("int8 on this machine", "--model.quantization=int8", "quantization int8 needs"),
    value("nf4 on this machine", "--model.quantization=nf4", "quantization nf4 needs"),
    value("whole trunks in 4 bits", "--model.quantization=nf4 --model.layout=full", "needs frozen trunks"),
    value("no reward head", "--model.reward=RoleReward", "the reward role needs a trained reward head"),
    value("policy checkpoint without a policy", "--model.policy_checkpoint={reward_model}", "holds no policy"),
    value(
        "reward of another trunk",
        "--model.reward=RoleReward --model.reward_checkpoint={reward_model}",
        "another trunk than the one this layout uses",
    ),
    value(
        "pe without its LoRA reward model",
        "--model.reward=RoleReward --model.layout=pe --model.policy_checkpoint={hydra}",
        "uses the reward model as an adapter",
    ),
    value("missing policy checkpoint", "--model.policy_checkpoint=none.ckpt", "checkpoint none.ckpt does not exist"),
    value(
        "policy of another model",
        "--model.policy_checkpoint={hydra} --model.model=random:m",
        "was trained from model 'random:tiny', but model is 'random:m'. Set model.model to the checkpoint's",
        files={"m": model_folder()},
    ),
    value(
        "prompt and response beyond the context",
        "--model.sampling.max_new_tokens=600",
        "tokens and 600 sampled ones, but the model's context is 512",
    ),
    value("prompts of another module", "--data=PreferenceData --data.train=pairs.jsonl", "prompt_batch"),
    value(
        "prompts for a supervised stage",
        "--data=PromptData --data.train=prompts.jsonl",
        "SFT is trained on InstructionData, not on PromptData",
        base="sft",
    ),
    value(
        "pairs for SFT",
        "--data=PreferenceData --data.train=pairs.jsonl",
        "SFT is trained on InstructionData, not on PreferenceData",
        base="sft",
    ),
    value(
        "preference weight",
        "--model=HydraSFT --model.gamma=-1 --data=PreferenceData --data.train=pairs.jsonl",
        "gamma must be at least 0, got -1",
        base="sft",
    ),
    value(
        "DPO's beta",
        "--model=DPO --model.beta=0 --data=PreferenceData --data.train=pairs.jsonl",
        "beta must be positive",
        base="sft",
    ),
]

DATA = [
    value("missing file", "--data.train=none.jsonl", "none.jsonl: no such file or folder (looked for"),
    value("unknown kind", "--data.train=my_rewards.py", "unknown kind of file '.py'"),
    value(
        "folder",
        "--data.train=folder",
        "was not written by datasets' save_to_disk",
        files={"folder": lambda p: p.mkdir(exist_ok=True)},
    ),
    value("hub name", "--data.train=hub:imdb", "not a hub dataset name"),
    value("hub without network", "--data.train=hub:owner/name", "cannot be loaded from the hub"),
    rows("empty.jsonl", "", "empty.jsonl"),
    rows("blank.jsonl", "\n\n", "blank.jsonl"),
    rows("bad.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "bad.jsonl:2: broken JSON"),
    rows("binary.jsonl", bytes(range(256)), "binary.jsonl:1"),
    rows("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), "latin.jsonl:1: byte 13 is not UTF-8"),
    rows("list.jsonl", "[1, 2]\n", "list.jsonl:1: expected a JSON object, found list"),
    rows("column.jsonl", '{"question": "a"}\n', "column.jsonl:1: field 'prompt' is missing"),
    rows("number.jsonl", '{"prompt": 3}\n', "number.jsonl:1: field 'prompt' must be"),
    rows("void.jsonl", '{"prompt": " "}\n', "void.jsonl:1: field 'prompt'"),
    rows("one.json", '{"prompt": "a"', "one.json:1: broken JSON"),
    rows("array.json", '[{"prompt": "a"}, 7]', "array.json item 2: expected a JSON object, found int"),
    rows("torn.jsonl.gz", b"\x1f\x8b\x08\x00torn", "damaged"),
    rows("plain.jsonl.gz", b"no archive", "damaged"),
    rows("twice.csv", "prompt,prompt\na,b\n", "must name each column once"),
    rows("wide.csv", "prompt,topic\na,b,c\n", "wide.csv:2: 3 fields where the header names 2"),
    rows("quote.csv", 'prompt\n"a\n', "quote.csv:2: broken CSV"),
    rows("noise.parquet", b"PAR1 noise", "noise.parquet row 1: the file is damaged or not parquet"),
    rows("few.jsonl", '{"prompt": "a"}\n' * 1 + '{"prompt": "b"}\n{"prompt": "c"}\n', "leaves none to train on"),
    rows(
        "three.jsonl",
        "".join(f'{{"prompt": "{c}"}}\n' for c in "abcdefg"),
        "needs at least 4 training prompts; the data has 3",
    ),
    rows("same.jsonl", '{"prompt": "a"}\n' * 20, "all rows share one prompt"),
    rows(
        "prompts_of_pairs.jsonl", '{"prompt": "a", "chosen": "b"}\n' * 20, "field 'rejected' is missing", base="reward"
    ),
    value("published format", "--data.format=oasst", "prompts.jsonl:1"),
    value("unknown format", "--data.format=oast", "format", status=2),
    value("split of everything", "--data.validation_size=1.5", "is not a fraction below 1"),
    value("negative split", "--data.validation_size=-1", "validation_size must not be negative"),
    value("too large a split", "--data.validation_size=400", "splitting 400 validation rows off"),
    value("no rows wanted", "--data.limit=0", "limit must be at least 1 or None"),
    value("no batch", "--data.batch_size=0", "batch_size must be at least 1"),
    value("negative workers", "--data.num_workers=-1", "num_workers must not be negative"),
    value("no prompt tokens", "--data.max_prompt_length=0", "max_prompt_length must be at least 1"),
    value("no source", "--data.train=[]", "train must name at least one source"),
    value("all too long", "--data.max_prompt_length=1 --data.drop_overlong_prompts=true", "training rows is left"),
    value("missing validation file", "--data.validation=none.jsonl", "none.jsonl"),
]


MODELS = [
    model("missing folder", None, "model './none': not a model folder", "./none"),
    model("missing random folder", None, "none is not a folder; random:tiny ships", "random:none"),
    model("missing package", None, "package no_such_package is not installed", "package:no_such_package"),
    model("package without a model", None, "holds no .gguf file", "package:yaml"),
    model("missing GGUF file", None, "no such GGUF file", "none.gguf"),
    model("hub without network", None, "no-such/model", "no-such/model"),
    model("empty name", None, "model", ""),
    Bad("model: GGUF that is none", ("--model.model=bad.gguf",), "bad.gguf", files={"bad.gguf": b"GGUF noise"}),
    Bad("model: empty GGUF", ("--model.model=empty.gguf",), "empty.gguf", files={"empty.gguf": b""}),
    model("broken config", text_of("config.json", "{"), "config"),
    model("config that is a list", text_of("config.json", "[]"), "config"),
    model("config without a type", text_of("config.json", "{}"), "model_type"),
    model("unknown architecture", model_folder(model_type="lama"), "lama"),
    model("no decoder", model_folder(model_type="t5"), "t5", "random:m"),
    model("sizes that do not fit", model_folder(hidden_size=-64), "", "random:m"),
    model("no weights", model_folder(), "./m"),
    model("torn weights", with_weights(b"\x10\x00\x00\x00\x00\x00\x00\x00{torn"), "./m", loads=True),
    model("empty weights", with_weights(b""), "./m", loads=True),
    model("weights of another shape", with_weights({"model.norm.weight": torch.ones(3)}), "./m", loads=True),
    model("weights of another model", with_weights({"transformer.wte": torch.ones(3, 3)}), "./m", loads=True),
    model("no tokenizer", model_folder("tokenizer.json", "tokenizer_config.json"), "tokenizer", "random:m"),
    model("broken tokenizer", text_of("tokenizer.json", "{"), "tokenizer", "random:m"),
    model("tokenizer without EOS", with_tokenizer(eos_token=None), "has no EOS token", "random:m"),
    model(
        "tokenizer without EOS and pad", with_tokenizer(eos_token=None, pad_token=None), "has no EOS token", "random:m"
    ),
    model("small vocabulary", model_folder(vocab_size=512), "vocab", "random:m"),
    Bad("model: tokenizer elsewhere", ("--model.tokenizer=./none",), "./none"),
]

CHECKPOINTS = [
    checkpoint("missing", "none.ckpt", "none.ckpt does not exist"),
    checkpoint(
        "folder",
        "folder",
        "is incomplete or not a checkpoint: .metadata is missing",
        files={"folder": lambda p: p.mkdir(exist_ok=True)},
    ),
    checkpoint("empty", "empty.ckpt", "is empty", files={"empty.ckpt": b""}),
    checkpoint("torn", "torn.ckpt", "truncated", files={"torn.ckpt": b"PK\x03\x04 torn"}),
    checkpoint("text", "text.ckpt", "truncated", files={"text.ckpt": "version https://git-lfs"}),
    checkpoint(
        "of another program",
        "foreign.ckpt",
        "was not written by lit_rlhf",
        files={"foreign.ckpt": lambda p: torch.save({"state_dict": {}}, p)},
    ),
    checkpoint(
        "tensors alone",
        "tensors.ckpt",
        "holds no state_dict",
        files={"tensors.ckpt": lambda p: torch.save({"w": torch.ones(1)}, p)},
    ),
    checkpoint("pickle", "pickle.ckpt", "pickle.ckpt", files={"pickle.ckpt": pickle.dumps({"state_dict": {}})}),
    checkpoint("of another algorithm", "{hydra}", "the checkpoint's algorithm differs"),
    checkpoint(
        "of another layout",
        "{ppo}",
        "differs from the configuration's: hydra there, j_hydra here",
        "--model.layout=j_hydra",
    ),
    checkpoint("of a longer run", "{ppo}", "finished epochs, but trainer.max_epochs is 0", "--trainer.max_epochs=0"),
    checkpoint("of another rank", "{ppo}", "lora was", "--model.lora.r=8"),
    checkpoint("of another model", "{ppo}", "model was", "--model.model=random:m", files={"m": model_folder()}),
    checkpoint("of other targets", "{ppo}", "lora was", "--model.lora.target_modules=[q_proj]"),
    checkpoint("of another rollout", "{ppo}", "rollout_size was 4 and is now 8", "--model.rollout_size=8", loads=True),
    Bad("earlier stage: empty", ("--model.policy_checkpoint=empty.ckpt",), "is empty", files={"empty.ckpt": b""}),
    Bad(
        "earlier stage: pickle",
        ("--model.policy_checkpoint=pickle.ckpt",),
        "pickle.ckpt",
        files={"pickle.ckpt": pickle.dumps({"state_dict": {}})},
    ),
    Bad(
        "earlier stage: torn",
        ("--model.policy_checkpoint=torn.ckpt",),
        "truncated",
        files={"torn.ckpt": b"PK\x03\x04 torn"},
    ),
    Bad(
        "earlier stage: foreign",
        ("--model.policy_checkpoint=foreign.ckpt",),
        "foreign.ckpt was not written by",
        files={"foreign.ckpt": lambda p: torch.save({"state_dict": {}}, p)},
    ),
]


def reward(name: str, said: str, *more: str) -> Bad:
    return Bad(f"reward: {name}", (f"--model.reward.function=my_rewards.{name}", *more), said, loads=True)


def write_report(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")


REWARD_FUNCTIONS = [
    reward("fails", "reward function fails raised KeyError: 'judge'"),
    reward("too_few", "reward function too_few returned 1 numbers for 4 responses"),
    reward("one_number", "one_number returned 1.0, not one number per response"),
    reward("nothing", "nothing returned None, not one number per response"),
    reward("nan", "reward function nan returned nan for sample 1 (prompt 'The "),
    reward("infinite", "reward function infinite returned inf for sample 0 (prompt 'The "),
    reward("too_large", "reward function too_large returned 1e+300 for sample 0"),
    reward("text", "reward function text returned 'good' for sample 0"),
    reward("narrow", "reward function narrow raised TypeError"),
    reward(
        "hangs",
        "reward function hangs did not return within 0.2 s (a batch of 4; the first: prompt 'The ",
        "--model.reward.timeout=0.2",
    ),
]

COMMANDS = [
    command("no such command", "fitt", "unknown command 'fitt'", status=2),
    command("fit without anything", "fit", "model", status=2),
    command("missing YAML", "fit -c none.yaml", "none.yaml", status=2),
    command("broken YAML", "fit -c broken.yaml", "broken.yaml", status=2, files={"broken.yaml": "model: [\n"}),
    command("YAML that is a list", "fit -c list.yaml", "list.yaml", status=2, files={"list.yaml": "- 1\n"}),
    command(
        "YAML of code",
        "fit -c code.yaml",
        "code.yaml",
        status=2,
        files={"code.yaml": "model: !!python/object/apply:os.getcwd []\n"},
    ),
    command(
        "misspelt section", "fit -c ppo.yaml -c modle.yaml", "modle", status=2, files={"modle.yaml": "modle: {}\n"}
    ),
    command(
        "misspelt section with content",
        "fit -c ppo.yaml -c modle.yaml",
        "modle",
        status=2,
        files={"modle.yaml": "modle: {a: 1}\n"},
    ),
    command("unknown argument", "generate random:tiny --promt x", "promt", status=2),
    command("nothing to generate", "generate random:tiny", "give --prompt TEXT or --prompts FILE"),
    command("generate at 0", "generate random:tiny --prompt+ x --temperature 0", "temperature must be positive"),
    command(
        "generate nothing", "generate random:tiny --prompt+ x --max_new_tokens 0", "max_new_tokens must be at least 1"
    ),
    command("generate in no batch", "generate random:tiny --prompt+ x --batch_size 0", "batch_size must be"),
    command(
        "generate beyond the context", "generate random:tiny --prompt+ x --max_new_tokens 600", "512 tokens", loads=True
    ),
    command("generate from nothing", "generate none.ckpt --prompt+ x", "none.ckpt does not exist"),
    command(
        "generate from a pickle",
        "generate pickle.ckpt --prompt+ x",
        "pickle.ckpt",
        files={"pickle.ckpt": pickle.dumps([1])},
    ),
    command("generate from no folder", "generate ./none --prompt+ x", "./none"),
    command(
        "generate from a torn adapter",
        "generate ./a --prompt+ x",
        "adapter ./a could not be loaded",
        files={"a": torn_adapter},
        loads=True,
    ),
    command(
        "generate from an adapter of nothing",
        "generate ./a --prompt+ x",
        "adapter_config.json names no base model",
        files={"a": adapter()},
    ),
    command("generate an unknown role", "generate {hydra} --role critic --prompt+ x", "holds the roles"),
    command("generate from missing prompts", "generate random:tiny --prompts none.jsonl", "none.jsonl"),
    command(
        "generate from other rows",
        "generate random:tiny --prompts q.jsonl",
        "q.jsonl:1: field 'prompt' is missing",
        files={"q.jsonl": '{"q": 1}\n'},
    ),
    command(
        "generate from numbers",
        "generate random:tiny --prompts n.jsonl",
        "n.jsonl:1",
        files={"n.jsonl": '{"prompt": 1}\n'},
    ),
    command(
        "generate from broken rows",
        "generate random:tiny --prompts b.jsonl",
        "b.jsonl:1: broken JSON",
        files={"b.jsonl": "{\n"},
    ),
    command("export nothing", "export none.ckpt out", "none.ckpt does not exist"),
    command(
        "export over something",
        "export {hydra} there",
        "there exists already",
        files={"there": lambda p: p.mkdir(exist_ok=True)},
    ),
    command("export an unknown role", "export {hydra} out --role critic", "holds the roles"),
    command("export in an unknown form", "export {hydra} out --format onnx", "format", status=2),
    command(
        "export a foreign file",
        "export foreign.ckpt out",
        "was not written by",
        files={"foreign.ckpt": lambda p: torch.save({"state_dict": {}}, p)},
    ),
    command("memory of nothing", "memory", "give --model NAME"),
    command("memory of an unknown model", "memory --model llama-8t", "llama-8t"),
    command(
        "memory of no decoder",
        "memory --model random:m",
        "T5Config cannot be built",
        files={"m": model_folder(model_type="t5")},
    ),
    command("memory of an unknown layout", "memory --model gpt2 --layout hydro", "layout must be one of"),
    command("memory of an unknown algorithm", "memory --model gpt2 --algorithm pppo", "algorithm", status=2),
    command("memory of no batch", "memory --model gpt2 --batch_size 0", "batch_size must be"),
    command(
        "memory beyond the context", "memory --model gpt2 --prompt_length 2000", "the model's context is 1024 tokens"
    ),
    command("memory of an unknown size", "memory --model gpt2 --fit 24Gb1", "cannot be parsed; write 24GiB"),
    command("memory of no rank", "memory --model gpt2 --lora_rank 0", "must be at least 1"),
    command("bench of an unknown layout", "bench --model random:tiny --layout hydro", "layout must be one of"),
    command(
        "bench of an unknown algorithm",
        "bench --model random:tiny --algorithm PPPO",
        "'PPPO' is not an on-policy algorithm",
    ),
    command(
        "bench of a missing module",
        "bench --model random:tiny --algorithm no_such_module.Best",
        "algorithm 'no_such_module.Best': no module named 'no_such_module'",
    ),
    command("bench of nothing", "bench --model random:tiny --updates 0", "updates must be at least 1"),
    command("bench of an unknown model", "bench --model ./none", "./none"),
    command("bench beyond the context", "bench --model random:tiny --response_length 600", "512 tokens"),
    command("bench compare without rounds", "bench compare --rounds 0", "rounds must be at least 1"),
    command(
        "quickstart into an earlier one",
        "quickstart --out there",
        "there",
        files={"there/report.json": write_report},
    ),
]
