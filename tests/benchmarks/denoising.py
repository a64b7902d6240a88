"""How well the prior denoises: noise level x voxel size x orientation, on volumes left out of training.

    python tests/benchmarks/denoising.py VOLUMES... [--priors small other.safetensors] [--voxel-mm 1 2 4]
                                         [--sigmas 0.05 0.1 0.2 0.5] [--card CARD.json]

Beside the noisy slice stands the better of two classical denoisers that are told the noise level (non-local
means and cycle-spun wavelet shrinkage of scikit-image, real and imaginary part as channels). PSNR of the
complex slice: 20 log10(99.9th percentile of the volume / rms |error|).

Priors trained for one voxel size, to compare with, come from the same program with `voxel_mm: [2, 2]` and
`vary_sharpness: false`, beside one with `voxel_mm: [0.5, 4]` and the same number of steps:
    slicediff train VOLUMES... --config two_mm.yaml --steps 3500 --out fixed_2mm.safetensors
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from scans import save_table

from recon_core.prior import load_prior
from recon_core.scale import intensity_scale
from recon_core.simulate import smooth_phase
from recon_core.volumes import read_volume, to_voxel_mm

ORIENTATIONS = ("axial", "coronal", "sagittal")  # across z, y, x of a volume in RAS


def main() -> None:
    """Print the table and write it to results/denoising.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--priors", nargs="+", default=["small"])
    parser.add_argument("--voxel-mm", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--slices", type=int, default=2, help="per orientation")
    parser.add_argument("--card", type=Path, help="model card (.json) of the first prior to write the means into")
    parser.add_argument("--name", default="denoising", help="of the table under results/")
    arguments = parser.parse_args()
    priors, rows = {Path(name).stem: load_prior(name) for name in arguments.priors}, []
    if any(prior.in_function_space for prior in priors.values()):
        parser.error("a prior in function space does not know white noise; leave it out of --priors")
    for path in arguments.volumes:
        for voxel_mm in arguments.voxel_mm:
            volume, size = complex_volume(path, voxel_mm)
            peak = float(np.percentile(volume.abs(), 99.9))
            voxel = " x ".join(f"{v:.2g}" for v in size)
            facts = {"volume": path.name.split(".")[0], "voxel_mm": voxel_mm, "voxel": voxel}
            for axis, orientation in enumerate(ORIENTATIONS):
                n = volume.shape[axis]
                planes = volume.movedim(axis, 0)[np.linspace(0.35 * n, 0.65 * n, arguments.slices).astype(int)]
                for sigma in arguments.sigmas:
                    db = denoised_db(planes, sigma, peak, priors)
                    rows.append({**facts, "orientation": orientation, "sigma": sigma, **db})
        print(path.name, "done", flush=True)
    print(save_table(arguments.name, rows))
    means = averages(rows, ("noisy", "classical", *priors))
    for case, values in means.items():
        print(case, values)
    if arguments.card:
        card = json.loads(arguments.card.read_text())
        what = (
            "denoising, PSNR in dB, mean over volumes left out of training and three orientations "
            "(tests/benchmarks/denoising.py)"
        )
        card["measured"] = {
            "what": what,
            "volumes": sorted({row["volume"] for row in rows}),
            "psnr": {
                case: {"noisy": v["noisy"], "classical": v["classical"], "prior": v[next(iter(priors))]}
                for case, v in means.items()
            },
        }
        arguments.card.write_text(json.dumps(card, indent=2) + "\n")


def averages(rows: list[dict], columns: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Mean of each column per voxel size and noise level."""
    out = {}
    for voxel_mm, sigma in dict.fromkeys((row["voxel_mm"], row["sigma"]) for row in rows):
        of = [row for row in rows if (row["voxel_mm"], row["sigma"]) == (voxel_mm, sigma)]
        means = {k: round(float(np.mean([row[k] for row in of])), 2) for k in columns}
        out[f"{voxel_mm:g} mm, sigma {sigma:g}"] = means
    return out


def complex_volume(path: Path, voxel_mm: float):
    """Volume [z y x] of tissue brightness 1 with smooth phase, and its voxel size.

    It is resampled as near to voxel_mm as it allows.
    """
    data, size = read_volume(path)
    volume, size = to_voxel_mm(torch.from_numpy(np.asarray(data, np.float32)), size, [voxel_mm] * 3)
    return torch.polar(volume / intensity_scale(volume, size), smooth_phase(tuple(volume.shape), seed=1)), size


def denoised_db(planes: torch.Tensor, sigma: float, peak: float, priors: dict) -> dict[str, float]:
    """PSNR of the noisy planes [slices h w], the classical and each prior's result."""
    clean = torch.view_as_real(planes).permute(0, 3, 1, 2)
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    db = lambda image: round(20 * np.log10(peak / float((image - clean).square().sum(1).mean().sqrt())), 2)
    with torch.no_grad():
        learned = {name: db(prior(noisy, sigma)) for name, prior in priors.items()}
    told = max(db(classical(noisy, sigma, method)) for method in (nl_means, wavelet))
    return {"noisy": db(noisy), "classical": told, **learned}


def classical(noisy: torch.Tensor, sigma: float, method) -> torch.Tensor:
    """A classical method slice by slice; [slices 2 h w]."""
    planes = [method(image.permute(1, 2, 0).numpy(), sigma) for image in noisy]
    return torch.from_numpy(np.stack([plane.transpose(2, 0, 1) for plane in planes]))


def nl_means(image: np.ndarray, sigma: float) -> np.ndarray:
    """Non-local means of [h w 2]."""
    from skimage.restoration import denoise_nl_means  # here: other programs use this file without it

    return denoise_nl_means(
        image, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True, channel_axis=-1
    )


def wavelet(image: np.ndarray, sigma: float) -> np.ndarray:
    """BayesShrink of [h w 2], averaged over 16 shifts."""
    from skimage.restoration import denoise_wavelet

    total = np.zeros_like(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the levels of small slices
        for shift in np.ndindex(4, 4):
            shrunk = denoise_wavelet(np.roll(image, shift, (0, 1)), sigma=sigma, channel_axis=-1, rescale_sigma=False)
            total += np.roll(shrunk, [-s for s in shift], (0, 1)) / 16
    return total


if __name__ == "__main__":
    main()
