"""What becomes of small lesions, and how large a lesion the errors of an image would pass for.

    python tests/benchmarks/lesions.py VOLUMES... [--voxel-mm 2] [--acceleration 8] [--acs 20] [--snr 30]
                                       [--readout 64] [--methods cg tv wavelet diffusion]

Soft-edged spheres, brighter and darker than the tissue by --contrasts of its brightness, at random places inside the
object, 16 mm apart. Each scan is simulated with and without them, with the same lines and noise. `kept` is the contrast
of a lesion in the difference of the two images (against the difference of the two true ones, inside the sphere less
around it), its mean over all lesions of a size and contrast, `spread` its standard deviation. `false` is what the error
of the image without lesions looks like to the same measure: the contrast, in % of tissue brightness, that one place in
a thousand inside the object exceeds. A lesion whose contrast is below that cannot be told from an error. Magnitudes.
`voxel_mm` and `R` are those asked for. Picture of each volume in OUT, the table in results/.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from matplotlib.figure import Figure
from problems import Problem, simulated
from scans import read_table, save_table
from torch import Tensor

from gadgets.simulation.scan import load_object
from recon_core.cg_sense import cg_sense
from recon_core.methods import METHODS
from recon_core.prior import load_prior
from recon_core.scale import intensity_scale

APART_MM = 16.0
AROUND_MM = 4.0  # of the sphere, its background
DEEP = 0.5  # of tissue brightness in every voxel within the sphere and its background


@dataclass(frozen=True)
class Lesion:
    """A sphere at `place` (mm from the middle of the volume, z y x)."""

    place: tuple[float, float, float]
    diameter_mm: float
    contrast: float

    def profile(self, shape: tuple[int, ...], voxel_mm: tuple[float, ...], edge_mm: float) -> Tensor:
        """1 inside, 0 outside, linear over `edge_mm` [z y x]."""
        return ((self.diameter_mm / 2 - self.distance(shape, voxel_mm)) / edge_mm + 0.5).clamp(0, 1)

    def distance(self, shape: tuple[int, ...], voxel_mm: tuple[float, ...]) -> Tensor:
        """mm of each voxel from the place."""
        axes = [(torch.arange(n) - n // 2) * mm - at for n, mm, at in zip(shape, voxel_mm, self.place)]
        return sum(axis.square().reshape([-1 if i == j else 1 for j in range(3)]) for i, axis in enumerate(axes)).sqrt()


def main() -> None:
    """Run what the table does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--voxel-mm", type=float, default=2.0)
    parser.add_argument("--acceleration", type=float, default=8.0)
    parser.add_argument("--acs", type=int, default=20)
    parser.add_argument("--snr", type=float, default=30.0)
    parser.add_argument(
        "--readout",
        type=int,
        help="only so many readout positions, in the middle of the volume (1 mm volumes in less time)",
    )
    parser.add_argument("--diameters", type=float, nargs="+", default=[4.0, 6.0, 8.0], help="mm")
    parser.add_argument("--contrasts", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--layouts", type=int, default=3, help="scans of each volume, with lesions at other places")
    parser.add_argument("--methods", nargs="+", default=["cg", "tv", "wavelet", "diffusion"], choices=list(METHODS))
    parser.add_argument("--prior", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = read_table("lesions")
    for path in arguments.volumes:
        name = path.name.split(".")[0]
        known = {(row["volume"], row["voxel_mm"], row["R"], row["snr"], row["method"]) for row in rows}
        facts = {"volume": name, "voxel_mm": arguments.voxel_mm, "R": arguments.acceleration, "snr": arguments.snr}
        scan = tuple(map(str, facts.values()))
        wanted = [m for m in arguments.methods if (*scan, labelled(m, arguments.prior)) not in known]
        if wanted:
            rows += [{**facts, **row} for row in lesions_of(path, wanted, arguments)]
            save_table("lesions", rows, show=False)


def labelled(method: str, prior: str) -> str:
    """The name of a method with a prior that was asked for."""
    return f"{method}:{prior}" if prior != "auto" and METHODS[method].uses_prior else method


def lesions_of(path: Path, methods: list[str], arguments) -> list[dict]:
    """Rows of one volume, method by method."""
    data, voxel_mm, _, _ = load_object(path)
    data = data.abs()
    scan = dict(
        voxel_mm=arguments.voxel_mm,
        coils=8,
        acceleration=arguments.acceleration,
        snr=arguments.snr,
        acs=arguments.acs,
        readout=arguments.readout,
        device=arguments.device,
    )
    plain, found = simulated(path, **scan), {}
    images = {method: image_of(method, plain, arguments) for method in methods}
    for layout in range(arguments.layouts):
        reach_mm = float("inf")
        if arguments.readout:
            half_mm = plain.truth.shape[2] * plain.measurement.voxel_mm[2] / 2
            reach_mm = half_mm - max(arguments.diameters) / 2 - AROUND_MM
        lesions = placed(data, voxel_mm, arguments.diameters, arguments.contrasts, reach_mm, layout)
        with tempfile.TemporaryDirectory() as folder:
            problem = simulated(with_lesions(path, data, voxel_mm, lesions, Path(folder)), **scan)
        for method in methods:
            image = image_of(method, problem, arguments)
            for lesion in lesions:
                key = (method, lesion.diameter_mm, abs(lesion.contrast))
                found.setdefault(key, []).append(kept(lesion, plain, problem, images[method], image))
            if layout == 0:
                picture = arguments.out / f"lesions_{problem.facts['volume']}_{method}.png"
                draw(problem, {"reference": problem.truth, method: image}, lesions, picture)
    rows = []
    for (method, diameter, contrast), values in sorted(found.items()):
        values = torch.tensor(values)
        row = {
            "method": labelled(method, arguments.prior),
            "diameter_mm": diameter,
            "contrast": contrast,
            "lesions": len(values),
            "kept": round(float(values.mean()), 3),
            "spread": round(float(values.std()), 3),
            "false": round(100 * false_contrast(diameter, plain, images[method]), 1),
        }
        rows.append(row)
        print(path.name, "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def image_of(name: str, problem: Problem, arguments) -> Tensor:
    """|image| [z y x] of a method, scaled to the truth."""
    method, device = METHODS[name], problem.measurement.operator.device
    prior = None
    if method.uses_prior:
        prior = load_prior(method.suitable_prior(device) if arguments.prior == "auto" else arguments.prior, device)
    start = cg_sense(problem.measurement)
    for state in method.run(problem.measurement, prior, start, method.config, 0):
        pass
    image = state.volume.abs().cpu()
    return image * (image * problem.truth)[problem.inside].sum() / image[problem.inside].square().sum()


def placed(
    data: Tensor,
    voxel_mm: tuple[float, ...],
    diameters: list[float],
    contrasts: list[float],
    reach_mm: float,
    seed: int,
) -> list[Lesion]:
    """Lesions of all sizes and contrasts in turn, of both signs, at random places inside the object.

    They are APART_MM apart, along x not farther than `reach_mm` from the middle of the object.
    """
    random = torch.Generator().manual_seed(seed)
    bright = data > DEEP * intensity_scale(data, voxel_mm)
    # two thirds: folded sulci are inside too
    window = [2 * round((max(diameters) / 2 + AROUND_MM) / mm / 3) + 1 for mm in voxel_mm]
    deep = -torch.nn.functional.max_pool3d(-bright[None].float(), window, 1, [w // 2 for w in window])[0] > 0
    candidates = deep.nonzero()
    candidates = candidates[torch.randperm(len(candidates), generator=random)[:20000]]
    places, kinds = torch.empty(0, 3), [(d, sign * c) for d in diameters for c in contrasts for sign in (1, -1)]
    for place in (candidates - torch.tensor([n // 2 for n in data.shape])) * torch.tensor(voxel_mm):
        if abs(float(place[2])) > reach_mm:
            continue
        if not len(places) or float((places - place).norm(dim=1).min()) > APART_MM:
            places = torch.cat([places, place[None]])
    return [Lesion(tuple(place.tolist()), *kinds[(number + seed) % len(kinds)]) for number, place in enumerate(places)]


def with_lesions(path: Path, data: Tensor, voxel_mm: tuple[float, ...], lesions: list[Lesion], folder: Path) -> Path:
    """A file of the volume with lesions."""
    scale = intensity_scale(data, voxel_mm)
    data = data.clone()
    for lesion in lesions:
        data += lesion.contrast * scale * lesion.profile(data.shape, voxel_mm, min(voxel_mm))
    out = folder / path.name.replace(".nii.gz", ".nii")
    nibabel.save(nibabel.Nifti1Image(data.clamp_min(0).numpy().T, np.diag([*reversed(voxel_mm), 1.0])), out)
    return out


def template(lesion: Lesion, shape: tuple[int, ...], voxel_mm: tuple[float, ...]) -> Tensor:
    """Weights [z y x] whose sum with an image is the mean inside the sphere less that around it.

    They are matched to the sphere's profile.
    """
    inside = lesion.profile(shape, voxel_mm, max(voxel_mm))
    near = (lesion.distance(shape, voxel_mm) < lesion.diameter_mm / 2 + AROUND_MM).float()
    weights = near * (inside - (inside * near).sum() / near.sum())
    return weights / (weights * inside).sum()


def kept(lesion: Lesion, plain: Problem, problem: Problem, before: Tensor, after: Tensor) -> float:
    """The share of a lesion's contrast that the images' difference has."""
    weights = template(lesion, plain.truth.shape, plain.measurement.voxel_mm)
    return float((weights * (after - before)).sum() / (weights * (problem.truth - plain.truth)).sum())


def false_contrast(diameter_mm: float, plain: Problem, image: Tensor) -> float:
    """The contrast, of tissue brightness, that the error of the image shows to `template`.

    At one place in a thousand inside the object; elsewhere it is less.
    """
    shape, voxel_mm = plain.truth.shape, plain.measurement.voxel_mm
    weights = template(Lesion((0.0, 0.0, 0.0), diameter_mm, 1.0), shape, voxel_mm)
    error, shifted = image - plain.truth, torch.fft.ifftshift(weights)
    seen = torch.fft.ifftn(torch.fft.fftn(error) * torch.fft.fftn(shifted).conj()).real
    some = seen[plain.inside].abs()[:: 1 + int(plain.inside.sum()) // 1_000_000]
    return float(torch.quantile(some, 0.999)) / intensity_scale(plain.truth, voxel_mm)


def draw(problem: Problem, images: dict[str, Tensor], lesions: list[Lesion], path: Path) -> None:
    """Reference and image in the axial slice with most lesions, which are marked."""
    voxel_mm, shape = problem.measurement.voxel_mm, problem.truth.shape
    rows = [round(lesion.place[0] / voxel_mm[0]) + shape[0] // 2 for lesion in lesions]
    row = max(set(rows), key=lambda r: sum(abs(r - other) <= 1 for other in rows))
    top, aspect = 1.8 * intensity_scale(problem.truth, voxel_mm), voxel_mm[1] / voxel_mm[2]
    figure = Figure(figsize=(5 * len(images), 5.4))
    for ax, (name, image) in zip(figure.subplots(1, len(images)), images.items()):
        ax.imshow(image[row].flip(0).numpy(), cmap="gray", vmin=0, vmax=top, aspect=aspect)
        for lesion, at in zip(lesions, rows):
            if abs(at - row) <= 1:
                x, y = (lesion.place[a] / voxel_mm[a] + shape[a] // 2 for a in (2, 1))
                colour = "tab:red" if lesion.contrast > 0 else "tab:cyan"
                ax.plot(x, shape[1] - 1 - y, "o", ms=14, mfc="none", mec=colour, mew=0.8)
        ax.set_title(name)
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
