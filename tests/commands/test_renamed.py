"""Settings under their old names: accepted with a warning in Python, YAML and on the command line."""

import contextlib
import io
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lit_rlhf import GRPO, Trunk
from lit_rlhf.backbone.spec import read_layout
from lit_rlhf.cli import main
from lit_rlhf.renamed import RENAMED, rename_words

OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}


class Wider(GRPO):
    """A subclass of a user's own."""


def parsed(folder: Path, settings: dict[str, object], *words: str) -> dict[str, object]:
    """Return the model's arguments, as ``fit --print_config`` shows them for this YAML and these words."""
    content = {
        "model": {"class_path": "GRPO", "init_args": {"model": "random:tiny", "optimizer": OPTIMIZER, **settings}},
        "data": {"class_path": "PromptData", "init_args": {"train": "prompts.jsonl"}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["fit", "-c", str(folder / "run.yaml"), *words, "--print_config"])
    return yaml.safe_load(printed.getvalue())["model"]["init_args"]


def test_yaml_under_the_old_name(tmp_path):
    with pytest.warns(DeprecationWarning, match="normalise_by_std is now called normalize_by_std"):
        settings = parsed(tmp_path, {"normalise_by_std": False})
    assert settings["normalize_by_std"] is False
    assert "normalise_by_std" not in settings


@pytest.mark.parametrize(
    "words",
    [
        ["--model.normalise_by_std", "false"],
        ["--model.normalise_by_std=false"],
        ["--model.init_args.normalise_by_std=false"],
    ],
)
def test_the_command_line_under_the_old_name(tmp_path, words):
    with pytest.warns(DeprecationWarning, match="normalise_by_std is now called normalize_by_std"):
        assert parsed(tmp_path, {}, *words)["normalize_by_std"] is False


def test_new_names_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is now called.*")
        assert parsed(tmp_path, {}, "--model.normalize_by_std", "false")["normalize_by_std"] is False
        module = GRPO(model="random:tiny", optimizer=torch.optim.AdamW, normalize_by_std=False)
        assert Trunk(artifact="reward") == Trunk("reward")
    assert module.normalize_by_std is False


@pytest.mark.parametrize("kind", [GRPO, Wider])
def test_constructor_and_attribute_under_the_old_name(kind):
    with pytest.warns(DeprecationWarning, match="normalise_by_std") as caught:
        module = kind(model="random:tiny", optimizer=torch.optim.AdamW, normalise_by_std=False)
    assert module.normalize_by_std is False
    assert kind is Wider or caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert module.normalise_by_std is False
    with pytest.warns(DeprecationWarning, match="is now called"):
        module.normalise_by_std = True
    assert module.normalize_by_std is True


def test_a_trunk_under_the_old_name():
    with pytest.warns(DeprecationWarning, match="artefact is now called artifact"):
        trunk = Trunk(artefact="reward")
    assert trunk == Trunk("reward")
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert trunk.artefact == "reward"


def test_records_of_checkpoints_hold_no_names_of_fields():
    record = {
        "roles": {"actor": ["a", None, "lm"]},
        "trunks": {"a": ["policy", False]},
        "trained_heads": [],
        "loaded_adapters": [],
    }
    assert read_layout(record).trunks == {"a": Trunk(artifact="policy", trained=False)}


def test_other_words_stay_as_they_are():
    words = ["fit", "-c", "normalise_by_std.yaml", "--data.train", "--model.x=normalise_by_std", "normalise_by_std"]
    assert rename_words(words) == words
    assert set(RENAMED) == {"normalise_by_std", "artefact"}
