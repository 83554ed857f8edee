"""The command line: ``tune --arch A --op O`` tunes; ``tune show``, ``compare`` and ``doctor`` read."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tilewright import __version__, disks
from tilewright.errors import TilewrightError
from tilewright.tuner.signals import Signals

_COMMANDS = {
    "show": "what is known, for which device, how",
    "compare": "variants side by side",
    "measure": "prepared kernels raced on the GPU that is here, and plans made from that",
    "cost": "time and money per token of a model, from plans",
    "doctor": "whether this machine can build, measure and store",
    "pack": "one file with plans and their kernels, for deployment",
    "export": "every trial as Optuna studies, for optuna-dashboard",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a failure, 2 for bad usage, 128 + N when signal N ended it."""
    signals = Signals()
    with signals.heeded():
        return _main(arguments, signals)


def _main(arguments: Sequence[str] | None, signals: Signals) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    reads = words[:1] and words[0] in _COMMANDS and words[0] != "measure"
    try:
        code = _run(words, signals)
        if sys.stdout is not None:
            sys.stdout.flush()
    except TilewrightError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "" if reads else "; finished trials are kept, and --resume goes on from them"
        try:
            print(f"\ntune: {signals}{kept}", file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone
            _discard_output()
        return signals.exit_code
    except BrokenPipeError:
        # Whoever read our output went away; nobody is left to be told.
        _discard_output()
        return 1
    except OSError as error:
        if disks.meaning(error) is None:
            raise
        print(f"tune: {disks.sentence(error)}", file=sys.stderr)
        _discard_output()
        return 1
    except MemoryError:
        print("tune: there is not enough memory for that; free some, or give less to do", file=sys.stderr)
        return 1
    return code


def _discard_output() -> None:
    """Leave nothing that Python would try to write once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str], signals: Signals) -> int:
    if words and words[0] in _COMMANDS:
        return _run_command(words, signals)
    if words and not words[0].startswith("-"):
        raise TilewrightError(
            f"there is no command {words[0]!r}; there are {', '.join(_COMMANDS)}, and tune --arch A --op O"
        )
    parser = argparse.ArgumentParser(
        prog="tune",
        description="Generate, compile, check, measure and store kernels for one op on one arch.",
        epilog="other commands: " + "; ".join(f"tune {name}: {what}" for name, what in _COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"tilewright {__version__}")
    command = importlib.import_module("tilewright.tuner.commands.tune")
    command.add_arguments(parser)
    parsed = parser.parse_args(words)
    signals.begin()
    return int(command.run(parsed))


def _run_command(words: list[str], signals: Signals) -> int:
    """Only the command's own module is imported: ``tune show`` needs no compiler and no torch."""
    parser = argparse.ArgumentParser(prog="tune")
    subparsers = parser.add_subparsers(dest="command", required=True)
    command = importlib.import_module(f"tilewright.tuner.commands.{words[0]}")
    command.add_parser(subparsers)
    parsed = parser.parse_args(words)
    signals.begin()
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
