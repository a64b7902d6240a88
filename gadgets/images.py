"""Volumes to ISMRMRD images: matrix, geometry, pixel type and Meta attributes as a console wants them.

Convention: the header's position is the LPS place of pixel index n//2 on each axis, the centre of the
FFT grid, which is also where the acquisition headers put it.
"""

from __future__ import annotations

from collections.abc import Iterator

import ismrmrd
import numpy as np
import torch

from recon_core.fft import centre_crop_or_pad, kspace_crop

from .geometry import Geometry
from .volume import Scan
from .options import Options

SERIES = {"preview": 1, "final": 2}
FULL_SCALE = 4095


def to_recon_matrix(volume: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Cut [z y x] to the reconstructed field of view and interpolate it to the reconstructed matrix."""
    fovs = zip(volume.shape, reversed(geometry.recon_fov_mm), reversed(geometry.encoded_fov_mm))
    cut = [max(1, min(n, round(n * recon / encoded))) for n, recon, encoded in fovs]
    cut[2] = volume.shape[2]  # the readout was cut while gathering
    return kspace_crop(centre_crop_or_pad(volume, cut), tuple(reversed(geometry.recon_matrix)))


def make_images(volume: torch.Tensor, scan: Scan, options: Options, header, series: int, number: int, name: str, notes: list[str]) -> Iterator[ismrmrd.Image]:
    """Images of one reconstructed volume [z y x]: one 3D image, or one per partition with the same scale.

    Args:
        header: the scan's ISMRMRD header, for the protocol name.
        series: image_series_index.
        number: of the volume in the scan, for image_index.
        name: what the image is; goes into the series description.
        notes: what the user should know; goes into the comment.

    Raises:
        ValueError: if the volume is not finite.
    """
    volume = to_recon_matrix(volume, scan.geometry).cpu()
    if not bool(torch.isfinite(torch.view_as_real(volume)).all()):
        raise ValueError(f"the {name} image holds NaN or infinity and was not sent")
    pixels, scale = to_pixels(volume.numpy(), options.output)
    meta = make_meta(scan, pixels, scale, name, "; ".join([name, *notes]), protocol_name(header))
    if options.layout == "volume":
        yield _image(pixels, scan, 0, 1, series, number + 1, meta)
    else:
        for z in range(len(pixels)):
            yield _image(pixels[z : z + 1], scan, z, len(pixels), series, number * len(pixels) + z + 1, meta)


def protocol_name(header) -> str:
    """The measurement's protocol name, empty if the header has none."""
    return getattr(header.measurementInformation, "protocolName", None) or ""


def to_pixels(volume: np.ndarray, output: str) -> tuple[np.ndarray, float]:
    """Pixels of the wanted type and the factor they were multiplied by (12 bit: 99.9th percentile at 2/3)."""
    if output == "complex64":
        return np.ascontiguousarray(volume, np.complex64), 1.0
    magnitude = np.abs(volume).astype(np.float32)
    if output == "float32":
        return np.ascontiguousarray(magnitude), 1.0
    top = float(np.percentile(magnitude, 99.9)) or 1.0
    scale = FULL_SCALE * 2 / 3 / top
    return np.clip(np.rint(magnitude * scale), 0, FULL_SCALE).astype(np.uint16), scale


def make_meta(scan: Scan, pixels: np.ndarray, scale: float, name: str, comment: str, protocol: str) -> ismrmrd.Meta:
    """Meta attributes in Gadgetron's and in FIRE's words, ASCII only."""
    head, geometry = scan.head, scan.geometry
    top = float(np.percentile(np.abs(pixels), 99.5))
    window = {"Center": str(max(1, round(top / 2))), "Width": str(max(1, round(top)))}
    history = ["Gadgetron", "SliceDiffusion", name]
    directions = {k: [f"{v:.18f}" for v in getattr(head, k)] for k in ("read_dir", "phase_dir", "slice_dir")}
    series = _ascii(f"{protocol} {name}".strip())
    comment = _ascii(comment)
    return ismrmrd.Meta({
        "GADGETRON_DataRole": "Image", "DataRole": "Image",
        "GADGETRON_ImageProcessingHistory": history, "ImageProcessingHistory": history,
        "GADGETRON_ImageComment": comment, "ImageComments": comment, "ImageComment": comment,
        "GADGETRON_SeqDescription": f"_{_ascii(name)}", "SequenceDescriptionAdditional": _ascii(name),
        "SeriesDescription": series,
        "GADGETRON_WindowCenter": window["Center"], "WindowCenter": window["Center"],
        "GADGETRON_WindowWidth": window["Width"], "WindowWidth": window["Width"],
        "GADGETRON_ScaleRatio": f"{scale:.9g}", "RescaleSlope": f"{1 / scale:.9g}", "RescaleIntercept": "0",
        "ImageRowDir": directions["read_dir"], "ImageColumnDir": directions["phase_dir"], "ImageSliceNormDir": directions["slice_dir"],
        **directions,
        "Keep_image_geometry": "1",
        "encoded_matrix": [str(n) for n in geometry.encoded_matrix], "encoding_FOV": [f"{v:g}" for v in geometry.encoded_fov_mm],
        "recon_matrix": [str(n) for n in geometry.recon_matrix], "recon_FOV": [f"{v:g}" for v in geometry.recon_fov_mm],
    })


def _image(pixels: np.ndarray, scan: Scan, z: int, partitions: int, series: int, index: int, meta: ismrmrd.Meta) -> ismrmrd.Image:
    """One image from pixels [z y x]; partition z of `partitions` (1: the whole volume)."""
    head = scan.head
    fov = list(scan.geometry.recon_fov_mm)
    position = np.array(head.position, float)
    if partitions > 1 or len(pixels) == 1:
        spacing = fov[2] / partitions
        position = position + np.array(head.slice_dir, float) * (z - partitions // 2) * spacing
        fov[2] = spacing
    image = ismrmrd.Image.from_array(np.ascontiguousarray(pixels), transpose=False)
    out = image.getHead()
    for name in ("measurement_uid", "patient_table_position", "acquisition_time_stamp", "physiology_time_stamp", "read_dir", "phase_dir", "slice_dir", "user_int", "user_float"):
        setattr(out, name, getattr(head, name))
    for name in ("average", "slice", "contrast", "phase", "repetition", "set"):
        setattr(out, name, getattr(head.idx, name))
    out.version, out.position, out.field_of_view = 1, tuple(position), tuple(fov)
    out.image_type = ismrmrd.IMTYPE_COMPLEX if np.iscomplexobj(pixels) else ismrmrd.IMTYPE_MAGNITUDE
    out.image_series_index = series
    if partitions > 1:
        out.slice = z
    out.image_index = index
    image.meta = ismrmrd.Meta(meta)
    out.attribute_string_len = len(image.attribute_string.encode())
    image.setHead(out)
    return image


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()
