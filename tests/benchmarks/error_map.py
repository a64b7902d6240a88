"""The estimated error against the true one, on scans that were simulated of volumes nobody trained on.

    python tests/benchmarks/error_map.py VOLUMES... [--voxel-mm 4 2 1] [--methods diffusion wavelet cg] [--snr 30]

Complex images: `error` and `estimate` are root mean squares inside the object in % of tissue brightness; `rank` is
Spearman's correlation over its voxels of the estimate and the true error, both over the neighbourhood that the estimate
is smoothed over; `within_1` and `within_2` the share of voxels whose own error is below once and twice the estimate
(complex Gaussian errors of that size: 63 % and 98 %). Of measured planes (--raw) magnitudes, against the image of all
lines, whose noise is in `error`. Made as the chain makes it: half the sweeps, nothing learned from the scan. A picture
of each scan in OUT, the table in results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from problems import Problem, measured, simulated
from scans import read_table, save_table
from scipy.stats import spearmanr
from torch import Tensor

from recon_core.cg_sense import cg_sense
from recon_core.jackknife import estimated_error, smoothed
from recon_core.methods import METHODS
from recon_core.prior import load_prior
from recon_core.scale import intensity_scale

# voxel size: acceleration, calibration lines, readout positions
PROTOCOLS = {4.0: (4.0, 12, None), 2.0: (8.0, 20, 48), 1.0: (8.0, 24, 24)}


def main() -> None:
    """Run what the table does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="*")
    parser.add_argument("--raw", type=Path, help="folder of measured k-space")
    parser.add_argument("--voxel-mm", type=float, nargs="+", default=[4.0, 2.0], choices=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="+", default=["diffusion"], choices=list(METHODS))
    parser.add_argument("--snr", type=float, default=30.0)
    parser.add_argument(
        "--prior-weight",
        type=float,
        help="of slice diffusion, to see what the estimate makes of a prior that pulls too hard",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    protocol = ("volume", "voxel_mm", "R", "snr")
    table = {tuple(row[k] for k in (*protocol, "method")): row for row in read_table("error_map")}
    for problem in problems(arguments):
        for name in arguments.methods:
            label = f"{name}, prior_weight {arguments.prior_weight:g}" if arguments.prior_weight else name
            key = (*(str(problem.facts[k]) for k in protocol), label)
            if key in table:
                continue
            maps = images(problem, name, arguments.prior_weight)
            table[key] = {**problem.facts, "method": label, **compare(problem, *maps)}
            print("  ".join(f"{k} {v}" for k, v in table[key].items()), flush=True)
            save_table("error_map", list(table.values()), show=False)
            if problem.phased is not None:
                draw(problem, *maps, arguments.out / f"{'_'.join(key)}.png")


def problems(arguments) -> Iterator[Problem]:
    """Simulated scans, and the measured planes of several coils (of one, error and noise cannot be told apart)."""
    for path in arguments.volumes:
        for voxel_mm in arguments.voxel_mm:
            acceleration, acs, readout = PROTOCOLS[voxel_mm]
            how = {"readout": readout, "device": arguments.device, "keep_lines": True}
            yield simulated(path, voxel_mm, 8, acceleration, arguments.snr, acs, **how)
    if arguments.raw:
        yield from (problem for problem in measured(arguments.raw) if problem.facts["coils"] > 1)


def images(problem: Problem, name: str, prior_weight: float | None) -> tuple[Tensor, Tensor]:
    """The image, and its estimated error [z y x]."""
    method, config, measurement = METHODS[name], METHODS[name].config, problem.measurement
    config = replace(config, prior_weight=prior_weight) if prior_weight else config
    device = measurement.operator.device
    prior = load_prior(method.suitable_prior(device), device) if method.uses_prior else None
    quick = replace(config, sweeps=config.sweeps // 2, adapt=0) if name == "diffusion" else config
    for final in method.run(measurement, prior, cg_sense(measurement), config, 0):
        pass
    for estimate in estimated_error(measurement, lambda part: method.run(part, prior, cg_sense(part), quick, 0)):
        pass
    return final.volume.cpu(), estimate.volume.real.cpu()


def compare(problem: Problem, image: Tensor, estimate: Tensor) -> dict[str, float]:
    """What the docstring above says."""
    inside, truth = problem.inside, problem.truth if problem.phased is None else problem.phased.cpu()
    if problem.phased is None:  # magnitudes, of which half the variance is an error
        factor = (image.abs() * truth)[inside].sum() / image[inside].abs().square().sum()
        image, estimate = factor * image.abs(), factor * estimate / 2**0.5
    error = (image - truth).abs()
    local, percent = smoothed(error.square(), inside).sqrt(), 100 / intensity_scale(truth, problem.measurement.voxel_mm)
    size = lambda values: round(percent * float(values[inside].square().mean().sqrt()), 2)
    within = {f"within_{n}": round(float((error < n * estimate)[inside].float().mean()), 3) for n in (1, 2)}
    rank = round(float(spearmanr(local[inside], estimate[inside])[0]), 3)
    return {"error": size(error), "estimate": size(estimate), "rank": rank, **within}


def draw(problem: Problem, image: Tensor, estimate: Tensor, path: Path) -> None:
    """Image, estimated and true error of the middle slices of three orientations."""
    scale = intensity_scale(problem.phased.cpu(), problem.measurement.voxel_mm)
    error = smoothed((image - problem.phased.cpu()).abs().square(), problem.inside).sqrt()
    shown = (
        (image.abs(), "slice diffusion", 1.8),
        (estimate * problem.inside, "estimated error, x 5", 0.36),
        (error, "true error, same smoothing, x 5", 0.36),
    )
    figure = Figure(figsize=(9, 3 * sum(image.shape[a] > 1 for a in range(3))))
    axes = figure.subplots(3, 3)
    for axis, row in enumerate(axes):
        for ax, (volume, title, top) in zip(row, shown):
            plane = volume.select(axis, volume.shape[axis] // 2).flip(0) / scale
            ax.imshow(plane.numpy(), cmap="gray" if title == "slice diffusion" else "inferno", vmin=0, vmax=top)
            ax.set_title(title if axis == 0 else "", fontsize=9)
            ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
