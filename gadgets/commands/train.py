"""`slicediff train`: train a prior on volumes."""

from __future__ import annotations

import argparse
from pathlib import Path


OPTIONS = {  # those of recon_core/train.py that the command line offers; that module is imported only when needed
    "architecture": "small (for CPUs too, the default), base, or operator (in function space)",
    "steps": "of training (default: 12000); may be changed when a run is resumed",
    "batch": "slices per step, of all processes together (default: 16)",
    "seed": "of everything random (default: 0)",
    "device": "auto (a GPU per process if there is one, the default), cpu or cuda",
    "workers": "threads that draw volumes ahead of the network (default: up to 4 beside a GPU, none on CPUs)",
    "scan_workers": "processes that simulate scans for --own-states (default: up to 10 beside a GPU, none on CPUs)",
    "own_states": "weight of lessons from the solver's own states beside denoising (default: 0, none)",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument("volumes", type=Path, nargs="+", help="NIfTI, .npy, HDF5 or ISMRMRD volumes, magnitude or complex, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write; its .checkpoint is resumed from")
    parser.add_argument("--validate", type=Path, nargs="+", default=[], metavar="VOLUME", help="volumes to measure on; they are not trained on")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of training options; the options below win over it")
    parser.add_argument("--start-from", metavar="NAME|PATH", help="go on from these weights, for example to add a site's own volumes")
    for name, what in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=what)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, or resume training."""
    from recon_core.train import check_out, train

    from ..figure import draw_denoising
    from ..training import find_volumes, load_volumes, make_train_options

    check_out(arguments.out)  # before reading the volumes, which may take minutes
    names = ("start_from", *OPTIONS)
    options = make_train_options(arguments.config, {n: v for n in names if (v := getattr(arguments, n)) is not None})
    held_out = find_volumes(arguments.validate)
    volumes = load_volumes(v for v in find_volumes(arguments.volumes) if v not in held_out)
    picture = arguments.out.with_suffix(".png")
    train(volumes, arguments.out, options, lambda line: print(line, flush=True), load_volumes(held_out), lambda step, images: draw_denoising(images.numpy(), f"step {step}", picture))
    return 0
