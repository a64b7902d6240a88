"""Methods side by side on the same scans: quality, seconds, memory.

    slicediff bench VOLUMES... [--raw FOLDER] [--methods diffusion wavelet ...] [--accelerations 4 8] [--voxel-mm 1 2 4]

Volumes are seen by simulated coils (k-space crops of each coil's own image, correlated noise, maps estimated from the
calibration lines); --raw adds the measured scans. PSNR and 3D SSIM of the magnitude inside the object after the
least-squares factor, complex NRMSE after the least-squares complex factor; of measured scans `unseen`, the relative
error of the lines left out as our coil maps predict them (complex images; BART's with its own maps), and `floor`, that
of the best fit to all lines. `bart` is BART's `pics -R W:7:0:lambda` with maps of its own ecalib, `sigpy` its
L1WaveletRecon with our maps; their lambda comes from --tune VOLUME (best of --lambdas there, per voxel size and R).
`bart-oracle` takes the best of --lambdas on the tested scan itself. --set METHOD.FIELD=VALUE changes a setting of one
of our methods. A volume coarser than --voxel-mm is scanned, and its rows are labelled, with the voxels it has (if these
are no cubes, with the side of a cube of the same volume). Every row is printed as it comes and kept in OUT/bench.csv,
pictures beside it; rows of an earlier run there stay, but for those of the same scan and method.
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import bart
import numpy as np
import sigpy_peer
import torch
from problems import Problem, measured, simulated
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gadgets.figure import draw_comparison
from recon_core.cg_sense import cg_sense
from recon_core.methods import METHODS
from recon_core.metrics import psnr, ssim
from recon_core.prior import PriorError, load_prior

PEERS = {"bart": bart, "bart-oracle": bart, "sigpy": sigpy_peer}
KEY = ("volume", "voxel_mm", "coils", "R", "snr", "acs", "seed", "matrix", "method")
COLUMNS = ("psnr", "ssim", "nrmse", "unseen", "seconds", "cpu_s", "peak_gib", "evaluations", "misfit")
# of settings, how to read them
KINDS = {
    bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def main() -> None:
    """Run all methods on all problems."""
    parser = argparse.ArgumentParser(
        prog="slicediff bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("volumes", type=Path, nargs="*")
    parser.add_argument("--raw", type=Path, help="folder of measured k-space")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["zero-filled", "cg", "tv", "wavelet", "bart", "diffusion"],
        choices=[*METHODS, *PEERS],
    )
    parser.add_argument(
        "--accelerations",
        type=float,
        nargs="+",
        help="default: 8 for volumes, all that a measured scan is undersampled at",
    )
    parser.add_argument("--voxel-mm", type=float, nargs="+", default=[2.0])
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--snr", type=float, default=30.0)
    parser.add_argument("--acs", type=int, default=20)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="of sampling and, for volumes, coils and noise: each scan once for each",
    )
    parser.add_argument(
        "--readout",
        type=int,
        help="only so many readout positions, in the middle of the volume (1 mm volumes in less time)",
    )
    parser.add_argument("--prior", default="auto", help="of all methods; auto is the one that suits each")
    parser.add_argument("--tune", type=Path, help="volume to choose the peers' lambda on; not one of the tested")
    parser.add_argument(
        "--lambdas",
        type=float,
        nargs="+",
        default=[0.001, 0.003, 0.005, 0.01, 0.02],
        help="of the peers, relative to their own scaling",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="METHOD.FIELD=VALUE", help="for example faithful.weight=0.05"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    if not arguments.volumes and arguments.raw is None:
        parser.error("nothing to reconstruct: give volumes, or a folder of measured k-space with --raw")
    missing = [m for m in arguments.methods if m in PEERS and not PEERS[m].available()]
    if missing:
        parser.error(f"{', '.join(missing)} is not installed; leave it out of --methods")
    try:
        configs = configured(arguments.set)
    except ValueError as error:
        parser.error(str(error))
    priors = {}
    for method in arguments.methods:
        if method in METHODS and METHODS[method].uses_prior:
            auto = arguments.prior == "auto"
            name = METHODS[method].suitable_prior(arguments.device) if auto else arguments.prior
            priors[method] = load_prior(name, arguments.device)
    try:
        for method, prior in priors.items():
            METHODS[method].check(prior)
    except PriorError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    tuned: dict[tuple, float] = {}
    rows, earlier = [], read(arguments.out / "bench.csv")
    for problem in problems(arguments):
        images = {}
        for method in arguments.methods:
            if method in PEERS:
                image, costs = run_peer(method, problem, arguments, tuned)
            else:
                image, costs = run(method, problem, priors.get(method), configs[method])
            images[method] = image
            unseen = costs.pop("unseen", None)
            row = {**problem.facts, "seed": problem.seed, "method": method, **costs, **quality(image, problem, unseen)}
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        save(arguments.out / "bench.csv", rows, earlier)
        draw(images, problem, rows[-len(images) :], arguments.out)
    if not rows:
        parser.exit(1, "slicediff bench: no scan could be made\n")
    Console(width=max(130, Console().width)).print(table(rows))


def problems(arguments) -> Iterator[Problem]:
    """All scans asked for, each once.

    Left out, and said, are a protocol whose calibration lines leave no room, and voxels that a volume does not have.
    """
    for seed in arguments.seeds:
        for path in arguments.volumes:
            yield from scans_of(path, seed, arguments)
        if arguments.raw:
            yield from measured(arguments.raw, arguments.accelerations, seed)


def scans_of(path: Path, seed: int, arguments) -> Iterator[Problem]:
    """A volume at all voxel sizes and accelerations."""
    made = set()
    for voxel_mm in arguments.voxel_mm:
        for acceleration in arguments.accelerations or [8.0]:
            try:
                protocol = (arguments.coils, acceleration, arguments.snr, arguments.acs)
                problem = simulated(path, voxel_mm, *protocol, seed, arguments.readout, arguments.device)
            except ValueError as error:
                print(f"{path.name} {voxel_mm:g} mm: {error}")
                continue
            size = problem.measurement.voxel_mm
            if problem.facts["voxel_mm"] != voxel_mm:
                voxel = " x ".join(f"{mm:.3g}" for mm in reversed(size))
                _note(
                    f"{path.name} has no voxels as small as {voxel_mm:g} mm: "
                    f"the scan at R = {acceleration:g} has {voxel} mm"
                )
            if (acceleration, size) in made:
                _note(
                    f"{path.name} at {voxel_mm:g} mm and R = {acceleration:g} is a scan that was reconstructed "
                    "already: it is left out"
                )
                continue
            made.add((acceleration, size))
            yield problem


def _note(text: str) -> None:
    print(f"slicediff: note: {text}", file=sys.stderr)


def configured(changes: list[str]) -> dict[str, object]:
    """Each method's settings, with changes given as METHOD.FIELD=VALUE.

    Raises:
        ValueError: for a method or a setting that does not exist, or a value of another type.
    """
    configs = {name: method.config for name, method in METHODS.items()}
    for change in changes:
        target, _, text = change.partition("=")
        name, _, field = target.partition(".")
        if name not in configs:
            raise ValueError(f"--set {change}: there is no method {name!r}; known are {', '.join(configs)}")
        settings = fields(configs[name]) if configs[name] else ()
        known = {f.name: value for f in settings if type(value := getattr(configs[name], f.name)) in KINDS}
        if field not in known:
            there = f"known are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"--set {change}: {name} has no setting {field!r}; {there}")
        read, kind = KINDS[type(known[field])]
        try:
            configs[name] = replace(configs[name], **{field: read(text)})
        except (KeyError, ValueError):
            raise ValueError(f"--set {change}: {field} must be {kind}, got {text!r}") from None
    return configs


def run(name: str, problem: Problem, prior, config) -> tuple[Tensor, dict]:
    """The last volume of one of our methods, CG-SENSE start included, and what it cost."""
    method, evaluations = METHODS[name], 0
    with Meter(problem.measurement.operator.device) as meter:
        start = problem.measurement.adjoint if name == "zero-filled" else cg_sense(problem.measurement)
        for state in method.run(problem.measurement, prior, start, config, 0):
            evaluations = state.network_evaluations
        volume = state.volume.cpu()
    misfit = round(problem.measurement.misfit(state.volume), 3)
    return volume, {**meter.costs, "evaluations": evaluations, "misfit": misfit, "lambda": ""}


def run_peer(name: str, problem: Problem, arguments, tuned: dict) -> tuple[Tensor, dict]:
    """A peer's magnitude and what it cost, BART's coil maps included; the oracle's costs are those of one lambda."""
    if name == "bart-oracle":
        strengths = arguments.lambdas
    else:
        strengths = [peer_strength(name, problem, arguments, tuned)]
    found = peer_images(name, problem, strengths)
    best = max(found, key=lambda s: psnr(found[s][0], problem.truth, problem.inside))
    image, costs = found[best]
    costs = {k: round(v, 4 if k == "unseen" else 2) for k, v in costs.items()}
    return image, {**costs, "evaluations": 0, "misfit": "", "lambda": best}


def peer_images(name: str, problem: Problem, strengths: list[float]) -> dict:
    """strength -> (image, costs)."""
    if name == "sigpy":
        return sigpy_peer.wavelet(problem.kspace, problem.measurement.operator.coil_maps(), strengths)
    return bart.wavelet(problem.kspace, strengths, problem.left_out)


def peer_strength(name: str, problem: Problem, arguments, tuned: dict) -> float:
    """The lambda that is best on the volume for tuning at this voxel size and acceleration; the middle one without.

    For a measured scan that volume is seen with its number of coils; --snr, --acs and --readout should be like the
    scan's.
    """
    voxel_mm, acceleration = problem.facts["voxel_mm"], float(round(problem.facts["R"]))
    coils = problem.facts["coils"]
    key = (name, voxel_mm, acceleration, coils)
    if arguments.tune is None:
        return arguments.lambdas[len(arguments.lambdas) // 2]
    if key not in tuned:
        protocol = (coils, acceleration, arguments.snr, arguments.acs)
        trial = simulated(arguments.tune, voxel_mm, *protocol, readout=arguments.readout)
        scores = {}
        for strength, (image, _) in peer_images(name, trial, arguments.lambdas).items():
            scores[strength] = psnr(image, trial.truth, trial.inside)
        shown = {s: round(v, 2) for s, v in scores.items()}
        print(name, "tuned on", arguments.tune.name, voxel_mm, acceleration, shown, flush=True)
        tuned[key] = max(scores, key=scores.get)
    return tuned[key]


def quality(image: Tensor, problem: Problem, unseen: float | None = None) -> dict[str, float | str]:
    """PSNR and SSIM of the magnitude inside the object.

    Of complex volumes also NRMSE there, or the error of lines left out (a peer's is `unseen`), as far as known.
    """
    truth, inside = problem.truth, problem.inside
    magnitude = image.abs()
    magnitude = magnitude * (magnitude * truth)[inside].sum() / magnitude[inside].square().sum()
    similarity = ssim(magnitude, truth, float(truth[inside].max()))
    out = {"psnr": round(psnr(image, truth, inside), 2), "ssim": round(float(similarity[inside].mean()), 4)}
    out |= {"nrmse": "", "unseen": "", "floor": ""}
    if problem.left_out is not None and (image.is_complex() or unseen is not None):
        out["unseen"] = round(problem.unseen(image), 4) if unseen is None else unseen
        out["floor"] = round(problem.floor, 4)
    if image.is_complex() and problem.phased is not None:
        image, phased = image[inside], problem.phased.cpu()[inside]
        factor = torch.vdot(image, phased) / torch.vdot(image, image)
        out["nrmse"] = round(float((factor * image - phased).norm() / phased.norm()), 4)
    return out


class Meter:
    """Wall and CPU seconds and the peak of memory above what was there before (on a GPU, its own memory)."""

    def __init__(self, device: torch.device):
        self.device, self.costs = device, {}

    def __enter__(self) -> Meter:
        self.began, self.cpu = time.monotonic(), time.process_time()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.before = self.peak = resident_bytes()
        self.done = threading.Event()
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.done.set()
        self.watch.join()
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self.peak - self.before
        self.costs = {
            "seconds": round(time.monotonic() - self.began, 2),
            "cpu_s": round(time.process_time() - self.cpu, 2),
            "peak_gib": round(peak / 2**30, 2),
        }

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def read(path: Path) -> list[dict]:
    """Rows of an earlier run, none if there was none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(path: Path, rows: list[dict], earlier: list[dict]) -> None:
    """Earlier rows that were not measured again and all rows so far as CSV, with the machine named."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}{gpu}"
    key = lambda row: tuple(str(row.get(k, 0)) for k in KEY)
    again = {key(row) for row in rows}
    kept = [row for row in earlier if key(row) not in again]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted([*kept, *({**row, "machine": machine} for row in rows)], key=lambda row: key(row)[:-1]))


def table(rows: list[dict]) -> Table:
    """The rows for a terminal; the best of each scan in bold."""
    out = Table("volume", "mm", "R", "method", *COLUMNS)
    best: dict[tuple, float] = {}
    for row in rows:
        key = (row["volume"], row["voxel_mm"], row["R"])
        best[key] = max(best.get(key, 0), row["psnr"])
    for row in rows:
        top = row["psnr"] == best[(row["volume"], row["voxel_mm"], row["R"])]
        cells = (row["volume"], row["voxel_mm"], row["R"], row["method"], *(row[c] for c in COLUMNS))
        out.add_row(*map(str, cells), style="bold" if top else None)
    return out


def draw(images: dict[str, Tensor], problem: Problem, rows: list[dict], out: Path) -> None:
    """Three orientations of every method with their errors."""
    truth = problem.truth
    shown = {}
    for name, image in images.items():
        magnitude = image.abs()
        shown[name] = (magnitude * (magnitude * truth).sum() / magnitude.square().sum()).numpy()
    matrix = np.diag([*reversed(problem.measurement.voxel_mm), 1.0])
    captions = {name: f"{row['psnr']} dB" for name, row in zip(images, rows)}
    name = "_".join(str(problem.facts[k]).replace(" ", "_") for k in ("volume", "voxel_mm", "R"))
    if problem.seed:
        name += f"_{problem.seed}"
    draw_comparison({**shown, "reference": truth.numpy()}, matrix, out / f"{name}.png", captions, "reference", errors=3)


if __name__ == "__main__":
    main()
