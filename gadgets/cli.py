"""The `slicediff` command; each subcommand is a file in commands/."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from recon_core.ahead import end_at_once, end_if_left_behind

from .commands import bench, conform, demo, health, priors, recon, send, serve, simulate, train
from .failure import OneLine, one_line, sentence

COMMANDS = {
    demo: "run the whole chain on the shipped example and draw the result",
    simulate: "write a complete ISMRMRD 3D scan of a volume",
    recon: "reconstruct a scan file into an image file",
    serve: "run the MRD server",
    conform: "test a server with everything that goes wrong at a scanner",
    send: "stream a scan file to a server and write the images",
    health: "ask a server for its status; exit code 0 if it takes scans",
    priors: "list the shipped priors with their model cards",
    train: "train a prior on volumes",
}
INTERRUPTED = 130  # the exit code that shells expect


def command() -> None:
    """The `slicediff` program: `main`, then an exit that an abandoned solver thread cannot crash or block.

    Such a thread is left behind at a deadline, or by Ctrl-C.
    """
    if sys.stdout is not None:  # it is None where it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name in another encoding must end nothing
    try:
        code = _written(main())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatient users press it twice
        print("slicediff: interrupted", file=sys.stderr)
        end_at_once(INTERRUPTED)
    end_if_left_behind(code)
    sys.exit(code)


def _written(code: int) -> int:
    """The exit code; if what was printed cannot be written (a full disk), one sentence, and 1 instead of 0."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        print(f"slicediff: the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries it again
        return code or 1
    return code


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit code, or 1 after an exception, with one sentence on stderr."""
    arguments = build_parser().parse_args(argv)
    level = logging.INFO if arguments.verbose else logging.CRITICAL
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    try:
        return arguments.run(arguments) or 0
    except Exception as error:  # the boundary: one sentence; the traceback only with --verbose
        if arguments.verbose:
            logging.getLogger("slicediff").info("failure", exc_info=error)
        text = sentence(error) if not isinstance(error, OSError) else one_line(str(error))
        print(f"slicediff: {text}", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """Reports an error in one sentence, without printing the usage first, and of the subcommand that it is in."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but a subcommand reports what it does not know itself, and does not leave it to `slicediff`."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str):
        self.exit(2, f"slicediff: {message} (see {self.prog} --help)\n")


class Version(argparse.Action):
    """Looks up the version, which takes a while, only when asked for it."""

    def __init__(self, **settings):
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        from . import version

        print(f"slicediff {version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command-line parser."""
    description = "3D MRI reconstruction with a 2D diffusion prior, for Gadgetron, MRD streams and files."
    parser = Parser(prog="slicediff", description=description)
    parser.add_argument("--version", action=Version, help="show the version and exit")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, with tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, what in COMMANDS.items():
        command.add(commands.add_parser(command.__name__.split(".")[-1], help=what))
    bench.add(
        commands.add_parser("bench", help="methods side by side (in a checkout)", add_help=False, prefix_chars="\0")
    )
    return parser


if __name__ == "__main__":
    command()
