"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from ..options import Options


def port(text: str) -> int:
    """Parse a TCP port; ArgumentTypeError if it is not one."""
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """Parse a count of at least 1; ArgumentTypeError if it is not one."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add the reconstruction options of options.py, but for those in `without`."""
    group = parser.add_argument_group("reconstruction options")
    group.add_argument("--preset", metavar="NAME|FILE", help="shipped preset or YAML file of options")
    for name, field in Options.model_fields.items():
        if name in without:
            continue
        default = "none" if field.default is None else field.default
        description = f"{field.description} (default: {default})"
        group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=description)


def given_options(arguments: argparse.Namespace) -> dict[str, str]:
    """The reconstruction options given on the command line."""
    names = ("preset", *Options.model_fields)
    return {n: v for n in names if (v := getattr(arguments, n, None)) is not None}
