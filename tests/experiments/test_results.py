"""The results study: its task, its cells, what it writes, and that a stopped run goes on."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_rlhf.evaluation import mean_ci95

SCRIPTS = Path(__file__).parents[2] / "experiments" / "results"
MODULES = ("run", "cells", "task")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the study's scripts importable, and leave no module of so plain a name behind."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_all_cells_are_six_layouts_with_a_critic_and_five_without() -> None:
    from cells import VARIANTS, make_cells

    cells = make_cells(None, None, variants=True)
    count = {name: sum(c.algorithm == name and not c.variant for c in cells) for name in {c.algorithm for c in cells}}
    assert count == {"PPO": 6, "Reinforce": 6, "ReMax": 5, "RLOO": 5, "GRPO": 5, "ReinforcePlusPlus": 5, "DPO": 2}
    assert len({cell.name for cell in cells}) == len(cells)
    assert {c.variant for c in VARIANTS if c.layout == "j_hydra"} >= {"value gradient 0", "balanced losses"}
    with pytest.raises(ValueError, match="layouts: 'hydra2' is not one of full, lora"):
        make_cells(None, ["hydra2"], variants=False)


def test_the_task_repeats_itself_and_keeps_its_openings_apart(tmp_path: Path) -> None:
    from task import WORDS, make_openings, write_task

    def gold(responses: list[str]) -> list[float]:
        return [sum(r.count(w) for w in WORDS[1]) - sum(r.count(w) for w in WORDS[-1]) for r in responses]

    for name in ("a", "b"):
        write_task(tmp_path / name, gold)
    files = {f.name for f in (tmp_path / "a").iterdir()}
    assert files == {"pairs.jsonl", "prompts_train.jsonl", "prompts_heldout.jsonl"}
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    read = {f: [json.loads(line) for line in (tmp_path / "a" / f).read_text().splitlines()] for f in files}
    held_out = {row["prompt"] for row in read["prompts_heldout.jsonl"]}
    trained = {row["prompt"] for row in read["prompts_train.jsonl"]}
    assert held_out | trained == set(make_openings())
    assert not held_out & (trained | {row["prompt"] for row in read["pairs.jsonl"]})
    # Noisy, but pointing the right way.
    agree = [gold([row["chosen"]])[0] >= gold([row["rejected"]])[0] for row in read["pairs.jsonl"]]
    assert 0.8 < sum(agree) / len(agree) < 1.0


def test_a_run_writes_its_table_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run
    from cells import PHASES

    monkeypatch.setattr(run, "STAGE_STEPS", 3)
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--layouts", "hydra", "--algorithms", "ReMax", "PPO", "--no-variants"]
    arguments += ["--seeds", "2", "--iterations", "2"]
    run.main(arguments)
    content = json.loads((out / "results.json").read_text())
    assert [(row["algorithm"], row["layout"], row["seeds"]) for row in content["rows"]] == [
        ("ReMax", "hydra", 2), ("PPO", "hydra", 2),
    ]  # fmt: skip
    done = [json.loads((out / "runs" / f"PPO-hydra-seed{seed}.json").read_text()) for seed in (0, 1)]
    gains = [one["gold_after"] - one["gold_before"] for one in done]
    row = content["rows"][1]
    assert row["gain"] == pytest.approx(sum(gains) / 2)
    assert row["gain_ci95"] == pytest.approx(list(mean_ci95(gains).ci95))
    assert set(done[0]["seconds_per_sample"]) == set(PHASES)
    # No critic: less memory at its peak.
    assert content["rows"][0]["peak_bytes"] < row["peak_bytes"]
    assert "ReMax" in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")

    before = (out / "runs" / "ReMax-hydra-seed0.json").stat().st_mtime_ns
    (out / "runs" / "PPO-hydra-seed1.json").unlink()
    capsys.readouterr()
    run.main(arguments)
    assert "1 runs to go" in capsys.readouterr().out
    assert (out / "runs" / "ReMax-hydra-seed0.json").stat().st_mtime_ns == before
    again = json.loads((out / "runs" / "PPO-hydra-seed1.json").read_text())
    assert {**again, "seconds_per_sample": 0} == {**done[1], "seconds_per_sample": 0}

    with pytest.raises(SystemExit):
        run.main([*arguments[:-2], "--iterations", "3"])
    assert "holds runs made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--algorithms", "PPPO"], "'PPPO' is not one of"),
        (["--layouts", "hydro"], "'hydro' is not one of"),
        (["--seeds", "1"], "seeds >= 2"),
    ],
)
def test_a_bad_input_gets_its_message(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
