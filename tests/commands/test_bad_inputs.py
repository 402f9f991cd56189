"""What users get wrong is reported in one message that says what, where and what to do, before any weights load."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_inputs as table
import pytest
import torch
import yaml
from bad_inputs import REWARDS, Bad
from helpers import OPENINGS, write_jsonl
from transformers import AutoModelForCausalLM

from lit_rlhf.cli import main

EVERY = [
    *table.TYPOS,
    *table.VALUES,
    *table.DATA,
    *table.MODELS,
    *table.CHECKPOINTS,
    *table.REWARD_FUNCTIONS,
    *table.COMMANDS,
]
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
BASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "ppo": (
        "PPO",
        {
            "layout": "hydra",
            "lora": {"r": 4},
            "rollout_size": 4,
            "minibatch_size": 2,
            "sampling": {"max_new_tokens": 6},
            "reward": {"class_path": "FunctionReward", "init_args": {"function": "my_rewards.rate"}},
        },
        "PromptData",
        "prompts.jsonl",
    ),
    "sft": ("SFT", {}, "InstructionData", "pairs.jsonl"),
    "reward": ("RewardModel", {}, "PreferenceData", "pairs.jsonl"),
}


@pytest.fixture(scope="module")
def ppo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    write_folder(folder)
    with contextlib.chdir(folder):
        sys.path.insert(0, str(folder))
        main(["fit", "-c", "ppo.yaml"])
        sys.path.remove(str(folder))
        sys.modules.pop("my_rewards")
    return folder / "checkpoints" / "last.ckpt"


def write_folder(folder: Path) -> None:
    """Write what the runs of the table share: prompts, pairs, rewards and one YAML for each base."""
    write_jsonl(folder / "prompts.jsonl", [{"prompt": text, "topic": index} for index, text in enumerate(OPENINGS)])
    pairs = [{"prompt": p, "chosen": " good and fine.", "rejected": " bad and dull, sadly."} for p in OPENINGS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "my_rewards.py").write_text(REWARDS)
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "logger": False}
    trainer["enable_model_summary"] = False
    for name, (algorithm, arguments, data, rows) in BASES.items():
        model = {"class_path": algorithm, "init_args": {"model": "random:tiny", "optimizer": OPTIMIZER, **arguments}}
        source = {"class_path": data, "init_args": {"train": rows, "validation_size": 4}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": source}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    sys.modules.pop("my_rewards", None)
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that ended in a model with weights."""
    done: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(AutoModelForCausalLM, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            model = made[0] if isinstance(made, tuple) else made
            if next(model.parameters()).device != torch.device("meta"):
                done.append(name)
            return made

        return call

    for name in ("from_config", "from_pretrained"):
        monkeypatch.setattr(AutoModelForCausalLM, name, counted(name))
    return done


def place(files: table.Files) -> None:
    for name, content in files.items():
        if callable(content):
            content(Path(name))
        else:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def some_slow(bad: Bad) -> Any:
    """Every fourth runs among the quick tests."""
    return pytest.param(bad, marks=[] if EVERY.index(bad) % 4 == 0 else pytest.mark.slow, id=bad.what.replace(" ", "-"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bad", [some_slow(bad) for bad in EVERY])
def test_a_bad_input_gets_its_message_and_loads_no_weights(
    bad: Bad, folder: Path, loads: list[str], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    fixtures = {"{hydra}": "hydra_checkpoint", "{reward_model}": "full_reward_checkpoint", "{ppo}": "ppo_checkpoint"}
    arguments = list(bad.arguments)
    for mark, fixture in fixtures.items():
        if any(mark in word for word in arguments):
            path = str(request.getfixturevalue(fixture))
            arguments = [word.replace(mark, path) for word in arguments]
    loads.clear()
    place(bad.files)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*(["fit", "-c", f"{bad.base}.yaml"] if bad.base else []), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == bad.status, error
    assert bad.said in error
    assert "Traceback" not in error
    *_, message = error.partition("lit-rlhf")
    assert len(message.splitlines()) <= 8 or "fitt" in arguments, message
    assert bool(loads) <= bad.loads
    assert not [path for path in Path().rglob("*.partial") if path.is_file()]
    assert not Path("checkpoints").exists() or bad.loads


def test_there_are_many_of_them_and_each_is_named_once() -> None:
    assert len({bad.what for bad in EVERY}) == len(EVERY) >= 150


def test_an_error_that_is_nobodys_message_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_rlhf.rollout import RolloutBuffer

    def broken(self: RolloutBuffer, iteration: int) -> list[int]:
        return [number for number, _ in zip(range(3), range(4), strict=True)]

    monkeypatch.setattr(RolloutBuffer, "prompt_indices", broken)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        main(["fit", "-c", "ppo.yaml"])


def test_a_bug_in_a_light_command_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_rlhf.commands import inference

    def broken(*args: Any, **kwargs: Any) -> list[str]:
        raise ValueError("a bug")

    monkeypatch.setattr(inference, "complete", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["generate", "random:tiny", "--prompt+", "x"])


def test_a_file_that_cannot_be_written_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["generate", "random:tiny", "--prompt+", "x", "--max_new_tokens", "1", "--out", "file/out.jsonl"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lit-rlhf generate: [Errno")


def test_what_is_asked_for_by_name_shows_the_whole_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="bf16-true would cast"):
        main(["fit", "-c", "ppo.yaml", "--trainer.precision=bf16-true"])


def test_a_tokenizer_without_a_pad_token_pads_with_eos(folder: Path) -> None:
    table.with_tokenizer(pad_token=None)(Path("m"))
    main(["fit", "-c", "ppo.yaml", "--model.model=random:m"])
    assert Path("checkpoints/last.ckpt").is_file()


def test_a_checkpoint_with_the_same_vocabulary_elsewhere_is_taken(folder: Path, hydra_checkpoint: Path) -> None:
    table.model_folder()(Path("same"))
    table.model_folder()(Path("other"))
    text = Path("other/tokenizer.json").read_text()
    assert '"Ġfilm"' in text
    Path("other/tokenizer.json").write_text(text.replace('"Ġfilm"', '"Ġmilf"'))
    arguments = ["fit", "-c", "ppo.yaml", f"--model.policy_checkpoint={hydra_checkpoint}"]
    main([*arguments, "--model.tokenizer=./same"])
    shutil.rmtree("checkpoints")
    with pytest.raises(SystemExit):
        main([*arguments, "--model.tokenizer=./other"])
    assert not Path("checkpoints").exists()
