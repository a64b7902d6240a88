"""`slicediff train`: train a prior on volumes."""

from __future__ import annotations

import argparse
from pathlib import Path

from recon_core.train_options import TrainOptions


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument(
        "volumes",
        type=Path,
        nargs="+",
        help="NIfTI, .npy, HDF5 or ISMRMRD volumes, magnitude or complex, or folders of them",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help=".safetensors file to write; its .checkpoint is resumed from"
    )
    parser.add_argument(
        "--validate",
        type=Path,
        nargs="+",
        default=[],
        metavar="VOLUME",
        help="volumes to measure on; they are not trained on",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of training options; the options below win over it"
    )
    for name, field in TrainOptions.model_fields.items():
        pair = isinstance(field.default, tuple)
        default = ""
        if field.default is not None:
            default = f" (default: {' '.join(map(str, field.default)) if pair else field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs=2 if pair else None,
            metavar=("LOW", "HIGH") if pair else "VALUE",
            help=field.description + default,
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, or resume training."""
    from recon_core.train import check_out, train

    from ..figure import draw_denoising
    from ..files import FileError
    from ..training import find_volumes, load_volumes, make_train_options

    check_out(arguments.out)  # before reading the volumes, which may take minutes
    given = {n: v for n in TrainOptions.model_fields if (v := getattr(arguments, n)) is not None}
    options = make_train_options(arguments.config, given)
    held_out = find_volumes(arguments.validate)
    kept_apart = {volume.resolve() for volume in held_out}
    learned_from = [volume for volume in find_volumes(arguments.volumes) if volume.resolve() not in kept_apart]
    if not learned_from:
        raise FileError(
            "nothing is left to learn from: --validate holds out every volume given; "
            "give more volumes, or hold out fewer"
        )
    volumes = load_volumes(learned_from)
    picture = arguments.out.with_suffix(".png")
    train(
        volumes,
        arguments.out,
        options,
        lambda line: print(line, flush=True),
        load_volumes(held_out),
        lambda step, images: draw_denoising(images.numpy(), f"step {step}", picture),
    )
    return 0
