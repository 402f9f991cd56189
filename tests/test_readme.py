"""README and notebooks: their code runs as it stands."""

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from helpers import make_trainer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lit_rlhf import PromptData

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONSTRAINTS = "-c .ci/constraints.txt"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_algorithm_in_40_lines_trains(prompts: PromptData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("python") if "OnPolicyModule" in block)
    assert len(code.splitlines()) <= 40
    assert code == (ROOT / "experiments" / "own_algorithm" / "my_algorithms.py").read_text()
    (tmp_path / "my_algorithms.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_algorithms", None)
    import my_algorithms
    from helpers import TINY, adamw, count_e

    from lit_rlhf import FunctionReward, Sampling

    module = my_algorithms.BestOfK(
        model=TINY,
        optimizer=adamw(1e-2),
        reward=FunctionReward(count_e),
        rollout_size=8,
        sampling=Sampling(max_new_tokens=6),
    )
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(module, prompts)
    assert trainer.global_step == 2
    assert float(trainer.callback_metrics["rollout/kl"]) != 0.0


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@[A-Z]+@|TODO", README)


def test_every_file_the_readme_names_exists() -> None:
    paths = re.findall(r"(?:\]\(|-c |`)((?:experiments|notebooks|tests|lit_rlhf)/[\w./-]+)", README)
    assert len(paths) > 5
    assert not [path for path in paths if not (ROOT / path).exists()]


# --- the versions that were tested ----------------------------------------------------


@pytest.fixture
def constraints() -> ModuleType:
    """The script that makes ``.ci/constraints.txt``."""
    spec = importlib.util.spec_from_file_location("constraints", ROOT / ".ci" / "constraints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pip_installs(text: str) -> list[str]:
    return re.findall(r"pip install [^&\n]+", text)


def declared() -> list[Requirement]:
    """Every requirement of pyproject.toml, extras and all, but for those on this project's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def test_both_commands_and_ci_install_versions_that_were_tested() -> None:
    main_job, tests = (next(b for b in blocks("bash") if words in b) for words in ("quickstart", "pytest"))
    assert [len(pip_installs(command)) for command in (main_job, tests)] == [2, 1]
    ci = pip_installs((ROOT / ".ci" / "run").read_text())
    assert ci
    for command in [*pip_installs(main_job), *pip_installs(tests), *ci]:
        assert CONSTRAINTS in command, command


def test_constraints_pin_every_requirement_within_its_bounds(constraints: ModuleType) -> None:
    pins = constraints.read_pins(constraints.FILE.read_text())
    for requirement in declared():
        assert canonicalize_name(requirement.name) in pins, requirement
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert list(pins) == sorted(pins)
    assert {name: str(Version(version)) for name, version in pins.items()} == pins
    assert constraints.portable(pins) == pins  # no platform's packages, no local builds


def test_the_constraints_script_drops_what_is_not_portable_and_says_what_moved(constraints: ModuleType) -> None:
    found = {"torch": "2.14.0+cpu", "nvidia-nccl-cu13": "2.30", "lit-rlhf": "0.1.0", "numpy": "2.4.6", "new": "1.0"}
    assert constraints.portable(found) == {"new": "1.0", "numpy": "2.4.6", "torch": "2.14.0"}
    pins = constraints.read_pins("# made by\nnumpy==2.4.6\nruff==0.17.6\ntorch==2.13.0\n")
    rows = constraints.differences(pins, found)
    assert rows == [("new", "-", "1.0"), ("torch", "2.13.0", "2.14.0")]
    assert constraints.table(rows).splitlines() == [
        "package  constrained  newest",
        "new      -            1.0",
        "torch    2.13.0       2.14.0",
    ]
    for text in ("numpy>=2\n", "numpy==2\nNumPy==2\n"):
        with pytest.raises(ValueError, match="is not an exact pin"):
            constraints.read_pins(text)


def test_the_newest_leg_finds_what_it_changes_in_the_readmes_command() -> None:
    (command,) = (block for block in blocks("bash") if "pytest" in block and "pip install" in block)
    install, _, tests = command.strip().partition(" && ")
    assert install.count(CONSTRAINTS) == 1
    assert tests.startswith("python -m pytest")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text())["cells"]
    scope: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), scope)
