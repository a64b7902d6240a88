"""Measured raw scans through `slicediff recon`: pictures, and PSNR where there is a full reference.

    python tests/benchmarks/measured.py RAW_FOLDER OUT_FOLDER

The planes of 3D scans are the scan's own sub-problem: readout matrix 1. What was fully sampled is
undersampled by leaving lines out (of the low-field slices, whose z is transformed already, along ky
alone); the reference is the scan with all lines through the same chain (method cg), so that it has the
same coil weighting. It holds the noise of the measured lines, which an image that keeps those lines shares
with it: near full sampling that favours doing nothing.
"""

from __future__ import annotations

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from scans import save_table, to_kspace, write_scan

from gadgets.cli import main as slicediff
from gadgets.image_files import read_images
from recon_core.metrics import object_mask, psnr
from recon_core.simulate import sampling_mask

METHODS = ("zero-filled", "cg", "diffusion")


def cases(raw: Path, seed: int = 0):
    """(name, kspace, mask, voxel_mm, acceleration, unacquired partitions, has reference) of each case.

    `kspace` is [contrasts coils kz ky kx]; `seed` is that of the masks.
    """
    knee = np.load(raw / "knee_lowfield_3d.npy")[None]
    acquired = np.zeros(knee.shape[2:4], bool)
    acquired[:18] = True
    voxel_mm = (180 / 28, 160 / 120, 160 / 120)
    yield "knee_lowfield_3d", knee, acquired, voxel_mm, 1, 10, False
    for acceleration in (2, 3):
        mask = sampling_mask(knee.shape[2:4], acceleration, "poisson", 12, seed) & acquired
        yield "knee_lowfield_3d", knee, mask, voxel_mm, acceleration, 10, True
    plane = np.load(raw / "brain_8ch_plane.npy")[None, ..., None]
    vfa = np.load(raw / "brain_13ch_vfa_planes.npy")[..., None]
    z, y = np.indices(vfa.shape[2:4])
    vfa = vfa * np.where((z + y) % 2, -1, 1)[..., None].astype(np.float32)  # its image centre lies at the corner
    for name, planes in (("brain_8ch_plane", plane), ("brain_13ch_vfa_planes", vfa)):
        for acceleration in (4, 6, 8):
            mask = sampling_mask(planes.shape[2:4], acceleration, "poisson", 24, seed)
            yield name, planes, mask, (1.0, 1.0, 1.0), acceleration, 0, True
    for path in sorted(raw.glob("ulf_*.npy")):
        slices = to_kspace(np.load(path), 1)[None]
        along_ky = sampling_mask((1, slices.shape[3]), 2, "poisson", 16, seed)
        mask = np.repeat(along_ky, slices.shape[2], axis=0)
        yield path.stem, slices, mask, (5.0, 1.8, 1.8), 2, 0, True


def acquired_lines(kspace: np.ndarray) -> np.ndarray:
    """[kz ky] of kspace [contrasts coils kz ky kx]."""
    return (kspace != 0).any(axis=(0, 1, 4))


def main() -> None:
    """Run all cases; table to results/measured.csv, pictures to the second folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    raw, out = arguments.raw, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, kspace, mask, voxel_mm, acceleration, dropped, has_reference in cases(raw):
        scan = out / f"{name}_R{acceleration}.h5"
        write_scan(scan, kspace, mask, voxel_mm, dropped)
        whole = out / "whole.h5"
        write_scan(whole, kspace, acquired_lines(kspace), voxel_mm, dropped)
        references, _ = recon(whole, out, "cg")
        images, seconds = {}, {}
        for method in METHODS:
            images[method], seconds[method] = recon(scan, out, method)
        for contrast in range(len(kspace)):
            reference = torch.from_numpy(np.array(references[contrast].data[0]))
            volumes = {method: images[method][contrast].data[0] for method in METHODS}
            row = {"scan": name, "contrast": contrast, "coils": kspace.shape[1], "R": round(mask.size / mask.sum(), 2)}
            if has_reference:
                inside = object_mask(reference, 0.15)
                for method, volume in volumes.items():
                    row[method] = round(psnr(torch.from_numpy(np.array(volume)), reference, inside), 2)
            else:
                row |= dict.fromkeys(METHODS, "")
            rows.append({**row, "diffusion_s": seconds["diffusion"]})
            picture = out / f"{name}_R{acceleration}_{contrast}.png"
            draw(volumes, reference if has_reference else None, picture)
    print(save_table("measured", rows))


def recon(scan: Path, out: Path, method: str):
    """Images of the final series and the seconds of all stages."""
    text, file = StringIO(), out / "images.h5"
    file.unlink(missing_ok=True)
    with redirect_stdout(text):
        code = slicediff(["recon", str(scan), str(file), "--method", method, "--output", "float32", "--json"])
    assert code == 0, f"{scan} {method} failed"
    facts = json.loads(text.getvalue().splitlines()[-1])
    return [i for i in read_images(file) if i.image_series_index == 2], round(sum(facts["seconds"].values()), 1)


def draw(volumes: dict, reference, path: Path) -> None:
    """The plane with most pixels of each volume, and errors against the reference."""
    from matplotlib.figure import Figure

    shape = next(iter(volumes.values())).shape
    axis = int(np.argmin(shape))
    cut = lambda v: np.take(np.asarray(v), v.shape[axis] // 2, axis)
    columns = {name: cut(v) for name, v in volumes.items()}
    if reference is not None:
        truth = cut(reference.numpy())
        columns = {n: v * (v * truth).sum() / (v * v).sum() for n, v in columns.items()} | {"reference": truth}
    top = np.percentile(columns[list(columns)[-1]], 99.7)
    figure = Figure(figsize=(4 * len(columns), 8 if reference is not None else 4.3))
    axes = figure.subplots(2 if reference is not None else 1, len(columns), squeeze=False)
    for i, (name, plane) in enumerate(columns.items()):
        axes[0, i].imshow(plane, cmap="gray", vmin=0, vmax=top)
        axes[0, i].set_title(name)
        if reference is not None:
            axes[1, i].imshow(np.abs(plane - truth), cmap="magma", vmin=0, vmax=top / 5)
    for ax in axes.flat:
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    main()
