"""Kills runs at random moments, resumes them, and compares them with undisturbed runs.

    python experiments/reliability/kill_matrix.py --out experiments/reliability/results

Every run of the matrix (algorithm x layout x strategy, on ``random:tiny``) is trained once undisturbed, then again
while it is killed by SIGKILL, every process of it: at any moment, in a rollout, in training and around the writing of
a checkpoint, in random order. After each kill every checkpoint must be readable; the run then resumes with
``--ckpt_path``. In the end the metrics of every iteration and the last checkpoint (weights, optimizer, schedules,
controllers) must be bitwise those of the undisturbed run.

Processes are forked from one that has everything imported, with the environment that torchrun gives its workers.
"""

import argparse
import itertools
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from kill_runs import ITERATIONS, MATRIX, ON_POLICY, PHASES, SMALL, WATCH, Run, settings
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.checkpoints.folders import read_rest
from lit_rlhf.cli import main as lit_rlhf
from lit_rlhf.commands import trainer as _  # noqa: F401  (imported before the forks)

WINDOWS = {"any": (), "rollout": ("generation", "scoring"), "training": ("training",), "saving": ("saving",)}
TIMEOUT = 180.0


# ---- processes --------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One start of a run, in a folder: its forked processes and the page on which they show their phase."""

    folder: Path
    run: Run
    pids: list[int] = field(default_factory=list)

    def start(self) -> "Attempt":
        """Fork the processes."""
        page = self.folder / "watch"
        page.write_bytes(bytes(2))
        with page.open("r+b") as file:
            self.place = mmap.mmap(file.fileno(), 2)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.run.processes):
            if pid := os.fork():
                self.pids.append(pid)
            else:
                work(self.folder, rank, self.run.processes, port)
        return self

    @property
    def now(self) -> tuple[int, str]:
        """Iteration (from 1) and phase."""
        return self.place[0] + 1, PHASES[self.place[1]]

    def ended(self) -> bool:
        """Say whether all processes ended by themselves and without an error.

        Raises:
            RuntimeError: One of them failed.
        """
        for pid in list(self.pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.pids.remove(pid)
            if status:
                self.kill()
                raise RuntimeError(f"{self.folder}: a process failed\n{(self.folder / 'log').read_text()[-3000:]}")
        return not self.pids

    def wait(self) -> float:
        """Wait for the end and return the seconds."""
        began = time.monotonic()
        while not self.ended():
            if time.monotonic() - began > TIMEOUT:
                self.kill()
                raise RuntimeError(f"{self.folder}: not done after {TIMEOUT:g} s")
            time.sleep(0.005)
        return time.monotonic() - began

    def kill(self) -> None:
        """Kill every process, as a power failure would."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        self.pids = []


def work(folder: Path, rank: int, processes: int, port: int) -> None:
    """Run as one process of a run; never returns."""
    status = 1
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os.environ[WATCH] = str(folder / "watch")
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "kill_matrix",
            }  # fmt: skip
        written = Path("last.ckpt").exists() or Path(".last.ckpt.previous").exists()
        resume = ["--ckpt_path", "last.ckpt"] if written else []
        lit_rlhf(["fit", "-c", "run.yaml", *resume])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare(folder: Path, run: Run, stages: Path, seed: int) -> Path:
    """Make the folder of a run."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(run, stages, seed)))
    return folder


def train_stages(folder: Path, seed: int) -> None:
    """Write the data and train the two stages that on-policy runs start from."""
    folder.mkdir()
    things = itertools.product(("plot", "music", "cast", "end", "light"), ("film", "sequel", "show", "play"))
    openings = [f"The {thing} of the {work} was" for thing, work in things]
    said = {"chosen": " good and fine.", "rejected": " bad and dull, sadly."}
    for name, rows in (
        ("prompts", [{"prompt": text} for text in openings]),
        ("pairs", [{"prompt": text, **said} for text in openings]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for algorithm in ("HydraSFT", "RewardModel"):
        run = Run(algorithm, None, "single")
        config = settings(run, folder, seed)
        if algorithm == "RewardModel":
            config["model"]["init_args"]["policy_checkpoint"] = str(folder / "HydraSFT" / "last.ckpt")
        prepare(folder / algorithm, run, folder, seed)
        (folder / algorithm / "run.yaml").write_text(yaml.safe_dump(config))
        Attempt(folder / algorithm, run).start().wait()


# ---- kills ------------------------------------------------------------------------------------------------------


def kill_once(attempt: Attempt, window: str, seconds: float, chance: random.Random) -> dict[str, Any] | None:
    """Kill a starting run at a random moment of a window; None if it ended before.

    Args:
        attempt: Just started.
        window: One of ``WINDOWS``.
        seconds: How long the undisturbed run took.
        chance: Source of the moment.
    """
    began = time.monotonic()
    if window == "any":
        until = began + chance.uniform(0.0, 0.6 * seconds)
        while time.monotonic() < until:
            if attempt.ended():
                return None
            time.sleep(0.002)
    else:
        # So few iterations later that the run is not over before its last kill.
        skipped, seen, delay = chance.randrange(0, ITERATIONS // 4), -1, chance.uniform(0.0, 0.012)
        while skipped >= 0:
            if attempt.ended():
                return None
            iteration, phase = attempt.now
            if phase in WINDOWS[window] and iteration != seen:
                seen, skipped = iteration, skipped - 1
            time.sleep(0.0002)
        time.sleep(delay)
    iteration, phase = attempt.now
    after = time.monotonic() - began
    attempt.kill()
    return {"window": window, "seconds": round(after, 3), "iteration": iteration, "phase": phase}


def unreadable(folder: Path) -> list[str]:
    """Return what is wrong with the checkpoints of a folder."""
    found = []
    for path in folder.glob("*.ckpt"):
        try:
            read_rest(path) if path.is_dir() else AtomicCheckpointIO().load_checkpoint(path)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def metrics(folder: Path, differences: list[str]) -> dict[int, dict[str, Any]]:
    """Return the rows by iteration; an iteration that ran twice must have said the same twice."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the kill met this line; the resumed run writes the iteration again
            continue
        if rows.setdefault(row["epoch"], row) != row:
            differences.append(f"iteration {row['epoch'] + 1} was repeated with other metrics")
    return rows


def compare(whole: Path, killed: Path) -> list[str]:
    """Return the differences between two finished runs, none if they are identical bit for bit."""
    found: list[str] = []
    ours, theirs = (metrics(folder, found) for folder in (killed, whole))
    found += [f"metrics of iteration {epoch + 1} differ" for epoch in theirs if ours.get(epoch) != theirs[epoch]]
    ends = [content(folder / "last.ckpt") for folder in (killed, whole)]
    for key in ends[1]:
        # Callbacks hold paths and times; what matters of them is the buffer's.
        values = [end[key] if key != "callbacks" else end[key].get("RolloutBuffer") for end in ends]
        if key != "loops" and not same(*values):
            found.append(f"checkpoints differ in {key}")
    if leftovers := list(killed.glob(".last.ckpt.*")):
        found.append(f"left behind: {leftovers}")
    return found


def content(path: Path) -> dict[str, Any]:
    """Return all that a checkpoint holds."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    shards: dict[str, Any] = {}
    reader, planner = FileSystemReader(path), _EmptyStateDictLoadPlanner()
    _load_state_dict(shards, storage_reader=reader, planner=planner, no_dist=True)
    return read_rest(path) | shards


def same(first: Any, second: Any) -> bool:
    """Compare nested values bitwise."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


def try_run(run: Run, kills: int, folder: Path, stages: Path, seed: int) -> dict[str, Any]:
    """Train a run undisturbed and killed, and return its row."""
    chance = random.Random(f"{seed} {run.name}")
    whole = prepare(folder / f"{run.name}-whole", run, stages, seed)
    seconds = Attempt(whole, run).start().wait()
    killed = prepare(folder / f"{run.name}-killed", run, stages, seed)
    names = [name for name in WINDOWS if run.algorithm in ON_POLICY or name != "rollout"]
    windows = [names[index % len(names)] for index in range(kills)]
    chance.shuffle(windows)
    done, bad, attempts = [], [], 0
    for window in windows:
        kill = kill_once(Attempt(killed, run).start(), window, seconds, chance)
        attempts += 1
        bad += unreadable(killed)
        if kill is None:
            break
        done.append(kill)
    else:
        Attempt(killed, run).start().wait()
        attempts += 1
    return {
        "algorithm": run.algorithm, "layout": run.layout or "", "strategy": run.strategy, "seconds": round(seconds, 2),
        "kills": done, "starts": attempts, "unreadable": bad, "differences": compare(whole, killed),
    }  # fmt: skip


# ---- report -----------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| algorithm | layout | strategy | killed in (iteration: phase) | unreadable checkpoints | differences |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kills = ", ".join(f"{kill['iteration']}: {kill['phase']}" for kill in row["kills"])
        cells = [row["algorithm"], row["layout"], row["strategy"], kills, len(row["unreadable"])]
        lines.append("| " + " | ".join(map(str, [*cells, len(row["differences"])])) + " |")
    return "\n".join(lines) + "\n"


def report(rows: list[dict[str, Any]], out: Path, command: str, seed: int) -> int:
    """Write the table, print it, and return the number of things that went wrong."""
    wrong = sum(len(row["unreadable"]) + len(row["differences"]) for row in rows)
    kills = [kill for row in rows for kill in row["kills"]]
    phases = {phase: sum(kill["phase"] == phase for kill in kills) for phase in PHASES}
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    content = {
        "command": command, "commit": commit.stdout.strip(), "seed": seed, "torch": torch.__version__,
        "kills": len(kills), "by_phase": phases, "wrong": wrong, "rows": rows,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "kill_matrix.json").write_text(json.dumps(content, indent=1) + "\n")
    by_phase = ", ".join(f"{count} {phase}" for phase, count in phases.items() if count)
    head = f"`{command}`, commit {content['commit']}: {len(kills)} kills ({by_phase}), {wrong} things wrong.\n\n"
    (out / "kill_matrix.md").write_text(head + table(rows))
    print(head + table(rows))
    return wrong


def main() -> None:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of kill_matrix.json and kill_matrix.md")
    parser.add_argument("--kills", type=int, default=4, help="kills of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="four runs only: one process, DDP, FSDP2 and its folders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kill_matrix_") as folder:
        stages = Path(folder) / "stages"
        train_stages(stages, args.seed)
        for run in SMALL if args.small else MATRIX:
            rows.append(try_run(run, args.kills, Path(folder), stages, args.seed))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    command = " ".join(["python", "experiments/reliability/kill_matrix.py", *sys.argv[1:]])
    raise SystemExit(report(rows, args.out, command, args.seed) > 0)


if __name__ == "__main__":
    main()
