"""Where a user's own code is found: the working directory, the folders of the YAML files, plugin packages."""

import itertools
import os
import sys
from importlib.metadata import entry_points


def config_files(args: list[str]) -> list[str]:
    """Return the YAML files that these arguments name."""
    files = [after for word, after in itertools.pairwise(args) if word in ("-c", "--config")]
    return files + [word.removeprefix("--config=") for word in args if word.startswith("--config=")]


def find_own_modules(args: list[str]) -> None:
    """Put the working directory on the module path, and after everything else the folders of the given YAML files.

    A console script has neither; users keep their modules there.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for folder in (os.path.dirname(os.path.abspath(file)) for file in config_files(args) if os.path.isfile(file)):
        if folder not in sys.path:
            sys.path.append(folder)


def load_plugins() -> None:
    """Import the packages of the entry-point group ``lit_rlhf.plugins``; one that fails is named and skipped."""
    for plugin in entry_points(group="lit_rlhf.plugins"):
        try:
            plugin.load()
        except Exception as error:  # one broken package must not stop runs that do not need it
            print(f"lit-rlhf: plugin {plugin.name} ({plugin.value}) not loaded: {error!r}", file=sys.stderr)
