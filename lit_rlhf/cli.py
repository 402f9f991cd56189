"""The ``lit-rlhf`` command line: light commands first, then LightningCLI."""

import importlib
import sys

LIGHT_COMMANDS = {
    "quickstart": "train and evaluate on a small real model, end to end",
    "generate": "sample responses from a checkpoint or an export",
    "export": "write a PEFT adapter folder or a merged model",
    "bench": "measure seconds and bytes of a training iteration; compare layouts and algorithms",
    "memory": "predict the memory of every layout, without a GPU",
}
TRAINER_COMMANDS = {
    "fit": "train (SFT, RewardModel, HydraSFT, PPO, or your own class path)",
    "validate": "held-out metrics of a checkpoint",
    "test": "like validate, logged under test/",
    "predict": "scores or responses",
}


def usage() -> str:
    """Return the overview of all commands."""
    rows = [f"  {name:<12}{text}" for name, text in {**LIGHT_COMMANDS, **TRAINER_COMMANDS}.items()]
    return "usage: lit-rlhf COMMAND [--help] ...\n\n" + "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None reads the process's own.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    command = args[0]
    if command in LIGHT_COMMANDS:
        importlib.import_module(f"lit_rlhf.commands.{command}").main(args[1:])
    elif command in TRAINER_COMMANDS or command.startswith("-"):
        importlib.import_module("lit_rlhf.commands.trainer").main(None if argv is None else args)
    else:
        print(f"lit-rlhf: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
