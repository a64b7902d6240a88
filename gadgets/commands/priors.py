"""`slicediff priors`: list the priors that are known by name."""

from __future__ import annotations

import argparse
import json


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument("--json", action="store_true", help="print the whole cards as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List them; 0 if at least one can be used."""
    from recon_core.prior import list_priors

    from ..failure import one_line

    cards = list_priors()
    if arguments.json:
        print(json.dumps(cards))
    for card in [] if arguments.json else cards:
        if "error" in card:
            print(one_line(f"{card['name']}: of no use: {card['error']}"))
            continue
        training = card.get("training", {})
        voxels = " to ".join(f"{mm:g}" for mm in dict.fromkeys(training.get("voxel_mm", ()))) or "unknown"
        facts = f"{card['parameters'] / 1e6:.1f} M parameters, voxels {voxels} mm"
        steps = training.get("steps_done", "unknown")
        print(one_line(f"{card['name']}: {facts}, {steps} steps, sha256 {card['sha256'][:12]}"))
    return 0 if any("error" not in card for card in cards) else 1
