"""The commands that the first lines of experiment files name, and running them in miniature, each once."""

import contextlib
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helpers import OPENINGS, write_jsonl

from lit_rlhf.cli import main

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
FILES = sorted(EXPERIMENTS.rglob("*.yaml"))
Config = dict[str, Any]


def name(path: Path) -> str:
    return str(path.relative_to(EXPERIMENTS))


@cache
def read(path: Path) -> Config:
    return yaml.safe_load(path.read_text())


def merged(*configs: Config) -> Config:
    """What LightningCLI makes of several files: later values win, dicts are merged, lists are replaced."""
    result: Config = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


@dataclass(frozen=True)
class Command:
    """A ``lit-rlhf fit`` command: its files, and its options as they stand."""

    files: tuple[Path, ...]
    options: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "Command":
        words = shlex.split(line)
        assert words[:2] == ["lit-rlhf", "fit"], line
        files, options, rest = [], [], iter(words[2:])
        for word in rest:
            if word == "-c":
                assert not options, f"a file behind options overrides them: {line}"
                files.append(ROOT / next(rest))
            else:
                options.append(word)
        return cls(tuple(files), tuple(options))

    @property
    def arguments(self) -> list[str]:
        return ["fit", *(word for path in self.files for word in ("-c", str(path))), *self.options]

    @property
    def config(self) -> Config:
        return merged(*map(read, self.files))

    @property
    def miniature(self) -> Path:
        on_policy = self.config["data"]["class_path"] == "PromptData"
        return EXPERIMENTS / "miniature" / ("on_policy.yaml" if on_policy else "supervised.yaml")

    @property
    def in_miniature(self) -> Config:
        config = merged(self.config, read(self.miniature))
        config["data"]["init_args"].pop("train", None)
        return config

    @property
    def ranks(self) -> int:
        return 1 if self.config["trainer"].get("strategy", "auto") == "auto" else 2

    @property
    def format(self) -> str:
        return self.config["data"]["init_args"].get("format", "auto")

    @property
    def needs(self) -> list[str]:
        arguments = self.config["model"]["init_args"]
        paths = (arguments.get("policy_checkpoint"), arguments.get("reward_checkpoint"))
        return [path for path in paths if path]

    @property
    def makes(self) -> str | None:
        for callback in self.config["trainer"].get("callbacks", []):
            if callback["class_path"] == "ModelCheckpoint":
                return f"{callback['init_args']['dirpath']}/{callback['init_args']['filename']}.ckpt"
        return None

    def __str__(self) -> str:
        return "+".join(name(path).removesuffix(".yaml") for path in self.files)


def commands_of(text: str) -> list[Command]:
    """The fit commands of a text, one a line; a backslash continues a line."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [Command.parse(line) for line in lines if line.startswith("lit-rlhf fit ")]


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))


COMMANDS = list(dict.fromkeys(command for path in FILES for command in commands_of(header(path))))


def distinct(commands: list[Command]) -> list[Command]:
    """One command of those that are the same run in miniature, such as those that differ in the model only."""
    first: dict[str, Command] = {}
    for command in commands:
        first.setdefault(json.dumps(command.in_miniature, sort_keys=True), command)
    return list(first.values())


def maker(path: str) -> Command:
    """The simplest command that makes a checkpoint."""
    makers = [command for command in COMMANDS if command.makes == path]
    assert makers, f"no command makes {path}"
    return min(makers, key=lambda command: (len(command.files), str(command)))


class Bench:
    """Runs commands in miniature on made-up rows, each in a folder of its own, and each once.

    Args:
        folder: Where the runs' folders are made.
        rows: Files of rows by data format.
    """

    def __init__(self, folder: Path, rows: dict[str, str]) -> None:
        self.folder, self.rows = folder, rows
        self._done: dict[str, Path] = {}

    def run(self, command: Command) -> Path:
        """Run a command, and before it those that make its checkpoints; return its folder."""
        key = json.dumps(command.in_miniature, sort_keys=True)
        if key not in self._done:
            folder = self.folder / f"{len(list(self.folder.iterdir())):03d}"
            folder.mkdir()
            for path in command.needs:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).symlink_to(self.run(maker(path)) / path)
            train = f"--data.train={self.rows[command.format]}"
            arguments = [*command.arguments, "-c", str(command.miniature), train]
            if command.ranks > 1:
                several = ["--trainer.devices", str(command.ranks), "--trainer.num_nodes", "1"]
                whole = [sys.executable, "-m", "lit_rlhf", *arguments, *several]
                done = subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
                assert done.returncode == 0, done.stderr[-3000:]
            else:
                with contextlib.chdir(folder), kept_import_path():
                    main(arguments)
            self._done[key] = folder
        return self._done[key]


@contextlib.contextmanager
def kept_import_path() -> Iterator[None]:
    """Undo that the command line puts the working directory on the import path."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def write_rows(folder: Path) -> dict[str, str]:
    """Files with made-up rows, by data format, in the shapes of ``tests/data``."""
    spec = importlib.util.spec_from_file_location("public_helpers", ROOT / "tests" / "data" / "public_helpers.py")
    assert spec is not None
    assert spec.loader is not None
    public: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(public)
    good, bad = " A kind answer.", " Rude."
    rows = {
        "auto": [{"prompt": text, "chosen": good, "rejected": bad} for text in OPENINGS],
        "hh": [
            {key: f"\n\nHuman: {text}?\n\nAssistant:{end}" for key, end in (("chosen", good), ("rejected", bad))}
            for text in OPENINGS
        ],
        "gpt4_llm": [public.scored(text, (good, 9), (bad, 2)) for text in OPENINGS],
        "oasst": [
            public.tree(
                public.message(
                    f"{index}",
                    "prompter",
                    text,
                    public.message(f"{index}a", "assistant", bad, rank=1),
                    public.message(f"{index}b", "assistant", good, rank=0),
                )
            )
            for index, text in enumerate(OPENINGS)
        ],
        "tldr": [public.comparison(1, bad, good, id=f"t3_{text}", post=text) for text in OPENINGS],
        "stack_exchange": [{**public.PAIRED, "question": t, "response_j": good, "response_k": bad} for t in OPENINGS],
        "shp": [public.post(1, good, bad, history=text) for text in OPENINGS],
    }
    return {format: write_jsonl(folder / f"{format}.jsonl", content) for format, content in rows.items()}
