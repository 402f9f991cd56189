"""The commands that the files of ``experiments/`` name run in miniature, each once, and build at full size."""

import difflib
import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_runs import (
    COMMANDS,
    EXPERIMENTS,
    FILES,
    ROOT,
    Bench,
    Command,
    commands_of,
    distinct,
    header,
    kept_import_path,
    name,
    read,
    write_rows,
)
from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf import BackboneModule, OnPolicyModule, Reinforce, ReMax
from lit_rlhf.cli import main
from lit_rlhf.commands.trainer import CLI

READMES = sorted(EXPERIMENTS.rglob("README.md"))
HYDRA_STAGES = {
    "hydra_sft": ["hydra_sft"],
    "sft": ["sft"],
    "reward_model": ["reward_model"],
    "hydra_ppo": ["hydra_ppo"],
    **{f"{layout}_ppo": ["hydra_ppo", f"{layout}_ppo"] for layout in ("j_hydra", "dynamic_lora", "lora", "full")},
}


def each_file_once(commands: list[Command]) -> list[Any]:
    """Return the commands; those all of whose files stand in an earlier one are slow, and those on several ranks."""
    seen: set[Path] = set()
    cases = []
    for command in commands:
        known = seen.issuperset(command.files) or command.ranks > 1
        cases.append(pytest.param(command, id=str(command), marks=pytest.mark.slow if known else ()))
        seen.update(command.files)
    return cases


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    rows = write_rows(tmp_path_factory.mktemp("rows"))
    return Bench(tmp_path_factory.mktemp("runs"), rows)


class Caught(Exception):
    """Brings LightningCLI's parser out of it."""


@pytest.fixture(scope="session")
def parser() -> LightningArgumentParser:
    """The command line's own parser; building it anew for each command would take most of the time."""

    def catch(cli: CLI, parser: LightningArgumentParser, args: object) -> None:
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, kept_import_path():
        patch.setattr(CLI, "parse_arguments", catch)
        with pytest.raises(Caught) as caught:
            main(["fit"])
    return caught.value.args[0]


@pytest.fixture
def build(parser: LightningArgumentParser, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Any]:
    """Parse a command, build model and data at their full size (no weights are read), and check them."""

    def build(arguments: list[str]) -> Any:
        monkeypatch.syspath_prepend(str(Path(arguments[2]).parent))  # modules of a user's own lie beside the file
        built = parser.instantiate_classes(parser.parse_args(arguments)).fit
        check(built.model, built.trainer)
        return built

    return build


def test_there_are_experiments() -> None:
    assert len(distinct(COMMANDS)) >= 40
    assert {command.files[0].parent.name for command in COMMANDS} >= {"hydra_rlhf", "remax", "pe_rlhf", "own_pairs"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_first_lines_name_the_command(path: Path) -> None:
    assert f"-c experiments/{name(path)}" in header(path)
    assert any(path in command.files for command in commands_of(header(path)))


@pytest.mark.parametrize("command", each_file_once(distinct(COMMANDS)))
def test_every_command_runs_in_miniature(command: Command, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = bench.run(command)
    (checkpoint,) = (path for path in folder.rglob("last.ckpt") if not path.is_symlink())
    assert command.makes in (None, str(checkpoint.relative_to(folder)))
    other_logger = any(path.parent.name == "loggers" for path in command.files)
    assert len(list(folder.rglob("metrics.csv"))) == (0 if other_logger else 1)


@pytest.mark.parametrize("command", each_file_once(COMMANDS))
def test_every_command_builds_at_full_size(command: Command, build: Callable[[list[str]], Any]) -> None:
    build(command.arguments)


def check(module: BackboneModule, trainer: Any) -> None:
    """What the comments of the files promise, on what LightningCLI made of them."""
    if module.spec.lora is None:
        assert module.spec.dtype == "float32", "updates of a whole trunk would be rounded away in 16 bits"
    if "ZeroRedundancy" in str(module.optimizer):  # is built among the ranks only
        return
    optimizer = module.optimizer([torch.zeros(1, requires_grad=True)])
    assert 0 < optimizer.defaults["lr"] < 0.01
    if isinstance(module, OnPolicyModule) and module.lr_scheduler is not None:
        assert module.lr_scheduler(optimizer).T_max == trainer.max_epochs
    if isinstance(module, ReMax | Reinforce):
        assert trainer.accumulate_grad_batches * module.minibatch_size == module.rollout_size


def hydra_arguments(stage: str, model: str, dataset: str) -> list[str]:
    names = [*(f"hydra_rlhf/{file}" for file in HYDRA_STAGES[stage]), f"hydra_rlhf/{model}", f"datasets/{dataset}"]
    return ["fit", *(word for file in names for word in ("-c", str(EXPERIMENTS / f"{file}.yaml")))]


# Every stage and every model is built with TL;DR above; the rest of the product is slow.
@pytest.mark.parametrize("model", ["llama_7b", pytest.param("opt_1.3b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", HYDRA_STAGES)
def test_hydra_rlhf_composes_with_every_data_set(stage: str, model: str, build: Callable[[list[str]], Any]) -> None:
    for dataset in ("gpt4_llm", "oasst", "tldr", "stack_exchange"):
        built = build(hydra_arguments(stage, model, dataset))
        assert built.model.spec.model == read(EXPERIMENTS / f"hydra_rlhf/{model}.yaml")["model"]["init_args"]["model"]
        assert built.data.format == dataset


def test_the_ppo_runs_of_hydra_rlhf_differ_in_layout_and_checkpoints_only() -> None:
    allowed = {"layout", "policy_checkpoint", "reward_checkpoint"}
    for layout in ("j_hydra", "dynamic_lora", "lora"):
        arguments = read(EXPERIMENTS / f"hydra_rlhf/{layout}_ppo.yaml")["model"]
        assert set(arguments) == {"init_args"}
        assert set(arguments["init_args"]) <= allowed
    whole = read(EXPERIMENTS / "hydra_rlhf/full_ppo.yaml")["model"]["init_args"]
    assert set(whole) == allowed | {"dtype", "optimizer"}


def test_run_sh_gives_the_commands_of_all_stages(tmp_path: Path, build: Callable[[list[str]], Any]) -> None:
    fake = tmp_path / "bin" / "lit-rlhf"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$PWD" "$@" >> "$LOG"\n')
    fake.chmod(0o755)
    (tmp_path / "rows.json").write_text("")
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    script = [str(EXPERIMENTS / "hydra_rlhf" / "run.sh"), "opt_1.3b", "tldr", "rows.json", "--seed_everything", "7"]
    subprocess.run(["sh", *script], cwd=tmp_path, env=environment, check=True)
    commands = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert {folder for folder, *_ in commands} == {str(tmp_path / "opt_1.3b-tldr")}
    made: list[str | None] = []
    for _, *arguments in commands:
        files = [Path(file) for word, file in itertools.pairwise(arguments) if word == "-c"]
        command = Command(tuple(files), ())
        assert set(command.needs) <= set(made)
        made.append(command.makes)
        built = build(arguments)
        assert built.data.sources == [str(tmp_path / "rows.json")]
        on_policy = isinstance(built.model, OnPolicyModule)
        assert (built.model.sampling.max_new_tokens if on_policy else built.data.options.max_response_length) == 64
    assert made == [f"runs/hydra_rlhf/{stage}/last.ckpt" for stage in HYDRA_STAGES]


@pytest.mark.parametrize("path", READMES, ids=name)
def test_commands_of_readmes_are_those_of_the_files(path: Path) -> None:
    text = path.read_text()
    commands = [command for block in re.findall(r"```bash\n(.*?)```", text, re.S) for command in commands_of(block)]
    known = {command.files for command in COMMANDS}
    for command in commands:
        # The miniature may lie over any of them.
        assert tuple(file for file in command.files if file.parent.name != "miniature") in known, str(command)
    named = re.findall(r"(?:experiments/)[\w./-]+\.(?:yaml|sh|py|md)", text)
    assert not [file for file in named if not (ROOT / file).exists()]
    beside = re.findall(r"\]\(([\w./-]+)\)|`([\w/.]+\.(?:yaml|sh))`", text)
    assert not [link for link, _ in beside if link and not (path.parent / link).exists()]
    assert not [file for _, file in beside if file and not [*path.parent.glob(file), *path.parent.glob(f"*/{file}")]]


SWITCHES = [("full_ppo", "hydra_ppo", "layout"), ("hydra_ppo", "hydra_remax", "class_path")]


@pytest.mark.parametrize(("before", "after", "key"), SWITCHES)
def test_a_switch_is_one_line(before: str, after: str, key: str) -> None:
    folder = EXPERIMENTS / "switching"
    names = [f"experiments/switching/{file}.yaml" for file in (before, after)]
    texts = [(folder / f"{file}.yaml").read_text().splitlines() for file in (before, after)]
    diff = list(difflib.unified_diff(*texts, *names, lineterm=""))
    changed = [line for line in diff[2:] if line[0] in "+-"]
    assert [line[0] for line in changed] == ["-", "+"]
    assert all(line[1:].strip().startswith(f"{key}:") for line in changed)
    assert "\n".join(diff) in (folder / "README.md").read_text(), "\n".join(diff)


def test_a_switch_behind_a_run_is_one_line_too(parser: LightningArgumentParser, tmp_path: Path) -> None:
    switch = tmp_path / "remax.yaml"
    switch.write_text("model: {class_path: ReMax}\n")
    arguments = ["fit", "-c", str(EXPERIMENTS / "own_pairs" / "ppo.yaml"), "-c", str(switch)]
    module = parser.instantiate_classes(parser.parse_args(arguments)).fit.model
    assert type(module) is ReMax
    assert (module.rollout_size, module.kl.target) == (32, 8.0)


def test_the_ladder_of_shapes_reaches_from_0_1_to_100_billion() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {}
    for folder in sorted((EXPERIMENTS / "open_questions" / "scaling" / "shapes").iterdir()):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        sizes[folder.name] = sum(p.numel() for p in model.parameters()) / 1e9
    expected = {"opt_13b": 13, "opt_30b": 30, "opt_66b": 66, "opt_175b": 175}
    assert sizes == pytest.approx(expected, rel=0.02)
