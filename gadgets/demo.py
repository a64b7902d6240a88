"""The whole chain on the shipped example: simulate a scan, serve, send, reconstruct, compare."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from recon_core.metrics import object_mask, psnr

from .client import send_scan
from .figure import draw_comparison
from .image_files import ImageWriter, affine, write_nifti
from .scan_files import ScanFile
from .header import parse_header
from .options import make_options
from .simulation.protocol import SimulateOptions
from .recon import reconstruct
from .server import Server
from .simulation.scan import simulate

EXAMPLE = Path(__file__).parent / "example" / "head_2mm.nii.gz"


def run_demo(out: Path, say: Callable[[str], None], overrides: dict | None = None) -> dict:
    """Run the demo into folder `out`; returns {"psnr": {...}, "png": path, "seconds": s}.

    Args:
        say: shows a line of progress.
        overrides: reconstruction options.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    scan, images_path, reference_path = out / "scan.h5", out / "images.h5", out / "reference.nii.gz"
    images_path.unlink(missing_ok=True)
    say("simulating a scan: 8 coils, R = 8, SNR 30, partly correlated noise, oblique")
    facts = simulate(EXAMPLE, scan, SimulateOptions(oblique=True), reference_path)
    say(f"scan of {facts['lines']} lines, matrix {facts['matrix']}, voxels {facts['voxel_mm']} mm")
    writer, images = ImageWriter(images_path), []
    with Server(("127.0.0.1", 0), {"output": "float32", **(overrides or {})}) as server:
        server.warm_up()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with ScanFile(scan) as source:
            for image in send_scan(source, *server.server_address[:2], "default", on_text=say):
                writer.write(image)
                images.append(image)
        server.shutdown()
    preview, final = images
    write_nifti(final, out / "diffusion.nii.gz")
    volumes = {"zero_filled": _zero_filled(scan), "cg_sense": preview.data[0], "diffusion": final.data[0]}
    return compare(volumes, reference_path, affine(final.getHead()), out / "comparison.png", began)


def compare(volumes: dict[str, np.ndarray], reference_path: Path, matrix: np.ndarray, png: Path, began: float) -> dict:
    """PSNR of each volume inside the object, and the picture; volumes are scaled to the reference's brightness."""
    import nibabel

    truth = torch.from_numpy(np.asarray(nibabel.load(reference_path).dataobj).T.copy())
    mask = object_mask(truth)
    quality, shown, captions = {}, {}, {}
    titles = {"zero_filled": "zero-filled", "cg_sense": "CG-SENSE", "diffusion": "slice diffusion"}
    for name, volume in volumes.items():
        image = torch.from_numpy(np.array(volume, np.float32))
        quality[name] = round(psnr(image, truth, mask), 2)
        factor = float((image * truth).sum() / (image * image).sum())
        shown[titles[name]], captions[titles[name]] = factor * image.numpy(), f"{quality[name]:.2f} dB"
    draw_comparison({**shown, "reference": truth.numpy()}, matrix, png, captions, "reference")
    return {"psnr": quality, "png": str(png), "seconds": round(time.monotonic() - began, 1)}


def _zero_filled(scan: Path) -> np.ndarray:
    options = make_options({"method": "zero-filled", "output": "float32"})
    with ScanFile(scan) as source:
        (image,) = reconstruct(parse_header(source.header_xml), source.acquisitions(), None, options)
    return image.data[0]
