"""One simulated scan of a volume: zero-filled, CG-SENSE and slice diffusion beside BART's l1-wavelet.

    python tests/benchmarks/against_bart.py VOLUME OUT_FOLDER [--voxel-mm 2] [--acceleration 6] [--lambdas 0.003]

Everyone gets the same ISMRMRD scan and estimates coil maps from its calibration lines; BART gets it
gathered and whitened. PSNR of the magnitude against the noise-free reference, inside the object and
over the volume; seconds as the wall clock gives them, all threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import nibabel
import numpy as np
import torch
from scans import save_table

from gadgets.cli import main as slicediff
from gadgets.figure import draw_comparison
from gadgets.files import ScanFile, affine, read_images
from gadgets.gather import gather
from gadgets.header import parse_header
from recon_core.fft import fft
from recon_core.metrics import object_mask, psnr
from recon_core.noise import whitening_matrix


def main() -> None:
    """Run the comparison; table to results/against_bart.csv, picture to the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("volume", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--voxel-mm", default="2")
    parser.add_argument("--acceleration", default="6")
    parser.add_argument("--coils", default="8")
    parser.add_argument("--snr", default="30")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.003])
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    scan, reference = out / "scan.h5", out / "reference.nii.gz"
    run("simulate", arguments.volume, scan, "--voxel-mm", arguments.voxel_mm, "--acceleration", arguments.acceleration, "--coils", arguments.coils, "--snr", arguments.snr, "--reference", reference)
    truth = torch.from_numpy(np.asarray(nibabel.load(reference).dataobj).T.copy())
    images, seconds, matrix = {}, {}, None
    for method in ("zero-filled", "cg", "wavelet", "diffusion"):
        images[method], seconds[method], matrix = ours(scan, out, method)
    if shutil.which("bart"):
        for strength in arguments.lambdas:
            name = f"bart l1-wavelet {strength:g}"
            images[name], seconds[name] = bart(scan, out, strength)
    inside, rows, shown = object_mask(truth), [], {}
    for name, image in images.items():
        image = torch.from_numpy(np.array(image, np.float32))
        shown[name] = (image * (image * truth).sum() / (image * image).sum()).numpy()
        rows.append({"volume": arguments.volume.name.split(".")[0], "voxel_mm": arguments.voxel_mm, "R": arguments.acceleration, "coils": arguments.coils, "snr": arguments.snr, "method": name, "psnr_object": round(psnr(image, truth, inside), 2), "psnr_volume": round(psnr(image, truth), 2), "seconds": round(seconds[name], 1)})
    draw_comparison({**shown, "reference": truth.numpy()}, matrix, out / "comparison.png", {r["method"]: f"{r['psnr_object']} dB" for r in rows}, "reference")
    print(save_table(f"against_bart_{rows[0]['volume']}_{arguments.voxel_mm}mm_R{arguments.acceleration}", rows))


def run(*arguments) -> str:
    """Run a slicediff command and return what it printed."""
    text = StringIO()
    with redirect_stdout(text):
        assert slicediff([str(a) for a in arguments]) == 0
    return text.getvalue()


def ours(scan: Path, out: Path, method: str):
    """Final image [z y x], seconds, affine."""
    file = out / "images.h5"
    file.unlink(missing_ok=True)
    facts = json.loads(run("recon", scan, file, "--method", method, "--output", "float32", "--json").splitlines()[-1])
    image = read_images(file)[-1]
    return image.data[0], sum(facts["seconds"].values()), affine(image.getHead())


def bart(scan: Path, out: Path, strength: float):
    """l1-wavelet image [z y x] of BART with maps of its own, and its seconds."""
    with ScanFile(scan) as file:
        (gathered,) = gather(parse_header(file.header_xml), file.acquisitions())
    white = whitening_matrix(gathered.noise)
    kspace = fft((white @ gathered.kspace.flatten(1)).reshape(gathered.kspace.shape), (3,))
    write_cfl(out / "kspace", kspace.permute(3, 2, 1, 0).numpy())
    began = time.monotonic()
    subprocess.run(["bart", "ecalib", "-m", "1", "-r", "24", out / "kspace", out / "maps"], check=True, capture_output=True)
    subprocess.run(["bart", "pics", "-R", f"W:7:0:{strength:g}", "-i", "50", out / "kspace", out / "maps", out / "image"], check=True, capture_output=True)
    return np.abs(read_cfl(out / "image").squeeze().T), time.monotonic() - began


def write_cfl(path: Path, array: np.ndarray) -> None:
    """BART's file pair, first axis fastest."""
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, [*array.shape, *[1] * (16 - array.ndim)])) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> np.ndarray:
    """Array of BART's file pair."""
    dims = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(dims, order="F")


if __name__ == "__main__":
    main()
