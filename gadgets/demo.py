"""The whole chain on the shipped example: simulate a scan, serve, send, reconstruct, compare."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch

from recon_core.methods import METHODS
from recon_core.metrics import object_mask, psnr

from .client import send_scan
from .figure import draw_comparison
from .header import parse_header
from .image_files import ImageWriter, affine, write_nifti
from .images import SERIES
from .options import make_options
from .recon import reconstruct
from .scan_files import ScanFile
from .server import Server
from .simulation.protocol import SimulateOptions
from .simulation.scan import simulate

EXAMPLE = Path(__file__).parent / "example" / "head_2mm.nii.gz"
# names in the results
KEYS = {method: {"cg": "cg_sense", "zero-filled": "zero_filled"}.get(method, method) for method in METHODS}
TITLES = {KEYS[name]: method.title for name, method in METHODS.items()}


def run_demo(out: Path, say: Callable[[str], None], settings: dict) -> dict:
    """Run the demo into folder `out`; returns {"psnr": {...}, "png": path, "seconds": s}.

    The PSNR is that of zero filling, of the preview (if the method has one) and of the method.

    Args:
        say: shows a line of progress.
        settings: reconstruction options that give whole volumes of float32 in the acquired orientation.

    Raises:
        OptionsError: before anything is written, for an invalid option.
    """
    began, options = time.monotonic(), make_options(settings)
    out.mkdir(parents=True, exist_ok=True)
    scan, images_path, reference_path = out / "scan.h5", out / "images.h5", out / "reference.nii.gz"
    images_path.unlink(missing_ok=True)
    say("simulating a scan: 8 coils, R = 8, SNR 30, partly correlated noise, oblique")
    facts = simulate(EXAMPLE, scan, SimulateOptions(oblique=True), reference_path)
    say(f"scan of {facts['lines']} lines, matrix {facts['matrix']}, voxels {facts['voxel_mm']} mm")
    writer, images = ImageWriter(images_path), {}
    with Server(("127.0.0.1", 0), settings) as server:
        server.warm_up()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with ScanFile(scan) as source:
            for image in send_scan(source, *server.server_address[:2], "default", on_text=say):
                writer.write(image)
                images[image.image_series_index] = image
        server.shutdown()
    final, key = images[SERIES["final"]], KEYS[options.method]
    write_nifti(final, out / f"{key}.nii.gz")
    volumes = {"zero_filled": _zero_filled(scan)}
    if SERIES["preview"] in images:
        volumes["cg_sense"] = images[SERIES["preview"]].data[0]
    volumes[key] = final.data[0]
    return compare(volumes, reference_path, affine(final.getHead()), out / "comparison.png", began)


def compare(volumes: dict[str, np.ndarray], reference_path: Path, matrix: np.ndarray, png: Path, began: float) -> dict:
    """PSNR of each volume inside the object, and the picture; volumes are scaled to the reference's brightness."""
    truth = torch.from_numpy(np.asarray(nibabel.load(reference_path).dataobj).T.copy())
    mask = object_mask(truth)
    quality, shown, captions = {}, {}, {}
    for name, volume in volumes.items():
        image = torch.from_numpy(np.array(volume, np.float32))
        quality[name] = round(psnr(image, truth, mask), 2)
        factor = float((image * truth).sum() / (image * image).sum())
        shown[TITLES[name]], captions[TITLES[name]] = factor * image.numpy(), f"{quality[name]:.2f} dB"
    draw_comparison({**shown, "reference": truth.numpy()}, matrix, png, captions, "reference")
    return {"psnr": quality, "png": str(png), "seconds": round(time.monotonic() - began, 1)}


def _zero_filled(scan: Path) -> np.ndarray:
    options = make_options({"method": "zero-filled", "output": "float32"})
    with ScanFile(scan) as source:
        (image,) = reconstruct(parse_header(source.header_xml), source.acquisitions(), None, options)
    return image.data[0]
