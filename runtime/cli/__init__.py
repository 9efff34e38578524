"""The ``latentrt`` command.

Commands are looked up by name and imported when they run: ``latentrt --help`` and ``latentrt generate`` load nothing
of the exporter. That table is the one place where this layer names a higher one, as text.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from latentrt.engines.errors import InvalidRequestError, LatentRTError

DONE, FAILED, MISUSED = 0, 1, 2
"""Exit statuses: done; the work failed; the command line was wrong."""


class Command(Protocol):
    """The module of a command."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work; returns the exit status."""


@dataclass(frozen=True)
class Entry:
    """A command in the table: its module, one line of help, and the extra that its packages come with."""

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "build-engine": Entry(
        "latentrt.exporter.cli.build", "export a model and compile its engines into a bundle", "export"
    ),
    "generate": Entry("latentrt.runtime.cli.generate", "draw images with a bundle"),
    "inspect": Entry("latentrt.runtime.cli.inspect", "show what a bundle holds"),
    "verify": Entry("latentrt.exporter.cli.verify", "compare a bundle with the model it was built from", "export"),
    "bench": Entry("latentrt.benchmarks.cli", "measure time, memory and quality, beside other runtimes", "bench"),
    "doctor": Entry("latentrt.runtime.cli.doctor", "show what can run here, and what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes the process's.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names and prompts may hold what it cannot encode
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("latentrt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        return FAILED
    except (LatentRTError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        message = str(error) or type(error).__name__
        print(f"latentrt: {' '.join(message.split())}", file=sys.stderr)
        return MISUSED if isinstance(error, InvalidRequestError) else FAILED
    finally:
        _give_up_unwritten()


def _give_up_unwritten() -> None:
    """Drop output that cannot be written: Python would try once more at exit, and report it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported, in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InvalidRequestError(f"{message}; see: {self.prog} --help")


class _Version(argparse.Action):
    """Prints the installed version, which is looked up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"latentrt {__version__}")
        parser.exit()


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(
        prog="latentrt", description="Build and run optimised engines of latent-diffusion models.", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the chosen command's module is loaded; the others are a name and a line of help.
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    command: Command | None = None
    for name, entry in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=entry.help, description=_sentence(entry.help), allow_abbrev=False)
        subparser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        if name == chosen:
            command = _load(entry)
            command.add_arguments(subparser)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or DONE)
    assert command is not None, "argparse lets no unknown command through"
    return command.run(parsed)


def _load(entry: Entry) -> Command:
    try:
        module: Command = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        if entry.extra is None or (error.name or "").startswith("latentrt"):
            raise
        raise LatentRTError(
            f"{error.name} is not installed, which this command needs; "
            f'install it with: pip install "latentrt[{entry.extra}]"'
        ) from error
    return module


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
