"""Measured scans, through the command as a user would run it; undersampled by leaving lines out."""

from dataclasses import replace

import numpy as np
import torch
from benchmarks.scans import to_kspace, write_scan
from conftest import DATA

from gadgets.cli import main
from gadgets.image_files import read_images
from recon_core.cg_sense import cg_sense
from recon_core.fft import fft, ifft
from recon_core.measure import measure
from recon_core.methods import METHODS
from recon_core.metrics import object_mask, psnr
from recon_core.prior import load_prior
from recon_core.simulate import sampling_mask


def images(tmp_path, kspace, mask, voxel_mm):
    """Magnitudes of zero-filled, CG-SENSE and diffusion, and the reference from all lines."""
    out = {}
    write_scan(tmp_path / "scan.h5", kspace, mask, voxel_mm)
    write_scan(tmp_path / "whole.h5", kspace, np.ones_like(mask), voxel_mm)
    runs = (
        ("reference", "whole", "cg"),
        ("zero-filled", "scan", "zero-filled"),
        ("cg", "scan", "cg"),
        ("diffusion", "scan", "diffusion"),
    )
    options = "--output float32 --device cpu --adapt 4".split()
    for name, scan, method in runs:
        path = tmp_path / f"{name}.h5"
        assert main(["recon", str(tmp_path / f"{scan}.h5"), str(path), "--method", method, *options]) == 0
        out[name] = torch.from_numpy(np.array(read_images(path)[-1].data[0]))
    return out


def quality(found):
    inside = object_mask(found["reference"], 0.15)
    return {name: psnr(image, found["reference"], inside) for name, image in found.items() if name != "reference"}


def test_a_measured_plane_of_13_coils(tmp_path):
    """Matrix 1 along the readout: the sub-problem that every 3D scan falls into."""
    kspace = np.load(DATA / "brain_13ch_plane.npy")[None, ..., None]
    mask = sampling_mask(kspace.shape[2:4], 4, "poisson", 24)
    db = quality(images(tmp_path, kspace, mask, (1.75, 1.75, 1.75)))
    assert db["cg"] > db["zero-filled"] + 2
    assert db["diffusion"] > db["cg"] + 0.5


def test_measured_slices_of_one_coil_at_low_field(tmp_path):
    """0.055 T, one coil, no noise lines: far from what the prior was trained on."""
    kspace = to_kspace(np.load(DATA / "ulf_fse.npy"), 1)[None]
    mask = np.repeat(sampling_mask((1, kspace.shape[3]), 2, "poisson", 16), kspace.shape[2], axis=0)
    db = quality(images(tmp_path, kspace, mask, (5.0, 1.8, 1.8)))
    assert db["diffusion"] > db["cg"] + 2


def test_lines_left_out_are_predicted_best_by_slice_diffusion():
    """Their noise is in no method's data: the fairest comparison a measured scan without clean reference allows."""
    whole = ifft(torch.from_numpy(np.load(DATA / "brain_13ch_plane.npy"))[..., None], (3,))
    mask = torch.from_numpy(sampling_mask(tuple(whole.shape[1:3]), 4, "poisson", 24))
    measurement = measure(whole * mask[..., None], mask.float(), (1.75, 1.75, 1.75))
    prior, start = load_prior("small"), cg_sense(measurement)
    left_out = torch.tensordot(measurement.mixing, whole, dims=1)[:, ~mask]
    errors = {}
    for name in ("cg", "wavelet", "tv", "diffusion", "adapted"):
        method = METHODS["diffusion" if name == "adapted" else name]
        config = replace(method.config, adapt=8 if name == "adapted" else 0) if method.uses_prior else method.config
        *_, state = method.run(measurement, prior, start, config, 0)
        predicted = fft(measurement.operator.coil_maps() * state.volume, (1, 2))[:, ~mask]
        errors[name] = float((predicted - left_out).norm() / left_out.norm())
    assert errors["adapted"] < errors["diffusion"] - 0.001 < min(errors["tv"], errors["wavelet"]) < errors["cg"]
