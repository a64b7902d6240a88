"""Volumes to ISMRMRD images: matrix, geometry, pixel type and Meta attributes as a console expects them.

Convention: the header's position is the LPS position of pixel index n//2 on each axis, the centre of the
FFT grid, as in the acquisition headers.
"""

from __future__ import annotations

from collections.abc import Iterator

import ismrmrd
import numpy as np
import torch

from recon_core.fft import resample
from recon_core.scale import evenly
from recon_core.trust import finite

from .geometry import Geometry, announced
from .options import Options
from .orientation import Frame, orient, parse_orientation
from .volume import GatheredVolume

SERIES = {"preview": 1, "final": 2, "error": 3}
OF_THE_OBJECT = (SERIES["preview"], SERIES["final"])  # these show it, an error map does not
FULL_SCALE = 4095
# Of a volume's voxels: what contrast agent in vessels may cut off rather than change the scale of a series.
CLIPPED = 0.01
SAMPLED = 1_000_000  # voxels, for percentiles: sorting a whole large volume takes longer than converting it to pixels
BETWEEN_NOTES = "; "
RIGHT_ANGLE = 1e-2  # tolerance of the directions' dot products against those of orthonormal vectors


def make_images(
    volume: torch.Tensor,
    gathered: GatheredVolume,
    options: Options,
    header,
    series: int,
    number: int,
    name: str,
    notes: list[str],
) -> Iterator[ismrmrd.Image]:
    """Images of one reconstructed volume [z y x]: one 3D image, or one per partition.

    Args:
        header: the scan's ISMRMRD header, for the protocol name and timing.
        series: image_series_index.
        number: index of the volume in the scan, for image_index.
        name: what the image is; goes into the series description.
        notes: what the user should know; goes into the comment.

    Raises:
        ValueError: if the volume is not finite.
    """
    volume = to_recon_matrix(volume, gathered.geometry)
    if gathered.echo_offset and series in OF_THE_OBJECT:
        volume = with_echo_phase(volume, gathered)
    if not finite(volume):
        raise ValueError(f"the {name} image holds NaN or infinity and was not sent")
    pixels, scale, on_scale = _pixels_on_scale(volume, gathered, options.output, series)
    frame, assumed = frame_of(gathered)
    pixels, frame = orient(pixels, frame, options.orientation)
    comment = BETWEEN_NOTES.join([name, *notes, *on_scale, *assumed])
    meta = make_meta(gathered, frame, pixels, scale, name, comment, header)
    parts = [(0, pixels)] if options.layout == "volume" else [(z, pixels[z : z + 1]) for z in range(len(pixels))]
    partitions = len(pixels) if options.layout == "partitions" else 1
    for z, part in parts:
        index = number * len(parts) + z + 1
        yield _image(part, gathered.head, frame, z, partitions, series, index, meta)


def to_recon_matrix(volume: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Crop [z y x] to the reconstructed field of view and interpolate it to the reconstructed matrix."""
    gathered_fov = [n * mm for n, mm in zip(volume.shape, geometry.voxel_mm)]
    extent = [recon / fov for recon, fov in zip(reversed(geometry.recon_fov_mm), gathered_fov)]
    # the readout, with its oversampling
    cut_out = [2] if geometry.readout < geometry.encoded_matrix[0] else []
    return resample(volume, tuple(reversed(geometry.recon_matrix)), extent, cut_out)


def with_echo_phase(volume: torch.Tensor, gathered: GatheredVolume) -> torch.Tensor:
    """`volume` [z y x] of the reconstructed matrix with the linear phase along x that centring the echo has removed.

    A field gradient gives it to late echoes; without it, phases of contrasts could not be compared.
    """
    n, geometry = volume.shape[-1], gathered.geometry
    readout_mm = geometry.readout * geometry.voxel_mm[2]
    cycles = gathered.echo_offset * geometry.recon_fov_mm[0] / readout_mm  # over the image
    x = (torch.arange(n, device=volume.device, dtype=torch.float64) - n // 2) / n
    return volume * torch.exp(2j * torch.pi * cycles * x).to(volume.dtype)


def _pixels_on_scale(
    volume: torch.Tensor, gathered: GatheredVolume, output: str, series: int
) -> tuple[np.ndarray, float, list[str]]:
    """Pixels [z y x] on the scale of their series, that scale, and notes on what it does to them.

    Images of a series with the same contrast and set share one scale: the first of their volumes fixes it, because
    the later ones are not known when it is sent, and individual scales would hide changes over time. Only where more
    than CLIPPED of a volume would be cut off (the first one was an empty slice or a preparation) a new scale begins.
    Each contrast or set has its own scale: a dark first one (MP2RAGE) would leave no headroom for the others.
    """
    notes, alike = [], (series, gathered.head.idx.contrast, gathered.head.idx.set)
    earlier = gathered.shared.scales.get(alike)
    pixels, scale, saturated = to_pixels(volume, output, earlier)
    if saturated > CLIPPED * pixels.size and earlier is not None:
        pixels, scale, saturated = to_pixels(volume, output)
        notes.append(
            "CAUTION: much brighter than the earlier images of its series: from here on, equal pixels mean "
            f"{earlier / scale:.3g} times the signal (divide pixels by GADGETRON_ScaleRatio)"
        )
    if pixels.any():
        gathered.shared.scales[alike] = scale
    if saturated:
        voxels_are, were = ("voxel is", "was") if saturated == 1 else ("voxels are", "were")
        notes.append(
            f"{saturated} {voxels_are} brighter than {FULL_SCALE} and {were} clipped: "
            "the first volume of a contrast sets its scale"
        )
    return pixels, scale, notes


def to_pixels(volume: torch.Tensor, output: str, scale: float | None = None) -> tuple[np.ndarray, float, int]:
    """Pixels of the requested type, the factor they were multiplied by, and the number of clipped voxels.

    uint16 (12 bit): the factor given, else the one that puts the 99.9th percentile at 2/3 of full scale, which leaves
    50 % headroom for later volumes; less if this one would be clipped (small bright objects in much air).
    Computed on the volume's device; only pixels leave the GPU.
    """
    if output == "complex64":
        return volume.to(torch.complex64).cpu().numpy(), 1.0, 0
    magnitude = volume.abs()
    if output == "float32":
        return magnitude.cpu().numpy(), 1.0, 0
    if scale is None:
        usual, most = float(np.percentile(evenly(magnitude, SAMPLED).cpu(), 99.9)), float(magnitude.max())
        scale = FULL_SCALE / (max(1.5 * usual, most) or 1.5)
    scaled = magnitude.mul_(scale).round_()
    saturated = int((scaled > FULL_SCALE).sum())
    return scaled.clamp_(max=FULL_SCALE).to(torch.int16).cpu().numpy().view(np.uint16), scale, saturated


def frame_of(gathered: GatheredVolume) -> tuple[Frame, list[str]]:
    """Position and orientation of the volume by its lines, and notes on what was assumed.

    The lines' directions may have any length; something is assumed if, for example, they are not orthogonal.
    """
    head, notes = gathered.head, []
    given = np.array([head.read_dir, head.phase_dir, head.slice_dir], float)
    directions = _of_unit_length(given) if np.isfinite(given).all() else np.zeros((3, 3))
    lacks = [name for name, direction in zip(("read", "phase", "slice"), given) if not direction.any()]
    if np.allclose(directions @ directions.T, np.eye(3), rtol=0, atol=RIGHT_ANGLE):
        if lacks:
            notes.append(
                f"the lines have no {lacks[0]} direction: "
                "the one at right angles to the others, right-handed, was assumed"
            )
        elif not np.allclose(given, directions, rtol=0, atol=RIGHT_ANGLE):
            notes.append("the lines' directions are not all of length 1: they were normalised")
    else:
        what = "contradicting" if given.any() else "no"
        notes.append(
            f"the lines have {what} directions: "
            "read, phase and slice were assumed to point to the patient's left, posterior and superior"
        )
        directions = np.eye(3)
    position = np.array(head.position, float)
    if not np.isfinite(position).all():
        notes.append("the lines have no finite position: the centre of the magnet was assumed")
        position = np.zeros(3)
    return Frame(directions, gathered.geometry.recon_fov_mm, position), notes


def _of_unit_length(directions: np.ndarray) -> np.ndarray:
    """Three directions (rows) normalised to length 1.

    A single zero direction becomes perpendicular to the others, right-handed.
    """
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    out = np.divide(directions, lengths, out=np.zeros_like(directions), where=lengths > 0)
    missing = np.flatnonzero(lengths[:, 0] == 0)
    if len(missing) == 1:
        out[missing[0]] = np.cross(out[(missing[0] + 1) % 3], out[(missing[0] + 2) % 3])
    return out


def make_meta(
    gathered: GatheredVolume, frame: Frame, pixels: np.ndarray, scale: float, name: str, comment: str, header
) -> dict:
    """Meta attributes under Gadgetron's and FIRE's names, ASCII only."""
    geometry, protocol = gathered.geometry, getattr(header.measurementInformation, "protocolName", None) or ""
    centre, width = _window(pixels)
    history = ["Gadgetron", "SliceDiffusion", _ascii(name)]
    read, phase, slices = ([f"{v:.18f}" for v in row] for row in frame.directions)
    comment = _ascii(comment)
    return {
        "GADGETRON_DataRole": "Image", "DataRole": "Image",
        "GADGETRON_ImageProcessingHistory": history, "ImageProcessingHistory": history,
        "GADGETRON_ImageComment": comment, "ImageComments": comment, "ImageComment": comment,
        "GADGETRON_SeqDescription": f"_{_ascii(name)}", "SequenceDescriptionAdditional": _ascii(name),
        "SeriesDescription": _ascii(f"{protocol} {name}".strip()),
        "GADGETRON_WindowCenter": centre, "WindowCenter": centre,
        "GADGETRON_WindowWidth": width, "WindowWidth": width,
        # No RescaleSlope: a console would apply the window to the rescaled pixels.
        "GADGETRON_ScaleRatio": f"{scale:.9g}", "GADGETRON_ScaleOffset": "0",
        "ImageRowDir": read, "ImageColumnDir": phase, "ImageSliceNormDir": slices,
        "read_dir": read, "phase_dir": phase, "slice_dir": slices,
        "Keep_image_geometry": "1",
        "encoded_matrix": [str(n) for n in geometry.encoded_matrix],
        "encoding_FOV": [f"{v:g}" for v in geometry.encoded_fov_mm],
        "recon_matrix": [str(n) for n in geometry.recon_matrix],
        "recon_FOV": [f"{v:g}" for v in geometry.recon_fov_mm],
        **_about_the_scan(gathered, header),
    }  # fmt: skip


def _window(pixels: np.ndarray) -> tuple[str, str]:
    """Centre and width of the window for a console: whole numbers for whole pixels, of any size for floats."""
    top = float(np.percentile(np.abs(evenly(pixels, SAMPLED)), 99.5))
    top = top or float(np.abs(pixels).max())  # a few bright voxels in nothing
    if pixels.dtype.kind == "u":
        return str(max(1, round(top / 2))), str(max(1, round(top)))
    top = top or 1.0
    return f"{top / 2:.9g}", f"{top:.9g}"  # an exponent, which some readers cut off, only from 1e9 on


def _about_the_scan(gathered: GatheredVolume, header) -> dict:
    """Protocol and timing (ms) from the header, under the names of both conventions."""
    information, sequence = header.measurementInformation, header.sequenceParameters
    names = {"measurementID": "measurementID", "protocolName": "protocolName", "patientPosition": "patient_position"}
    out = {}
    for ours, theirs in names.items():
        value = getattr(information, ours, None)
        if value:
            out[theirs] = _ascii(str(getattr(value, "value", value)))
    idx = gathered.head.idx
    several_sets = idx.set or announced(header).get("set", 1) > 1  # contrasts are then echoes
    inversion = idx.set if several_sets else idx.contrast
    timing = (
        ("TE", ("GADGETRON_TE", "EchoTime"), idx.contrast),
        ("TI", ("GADGETRON_TI", "InversionTime"), inversion),
    )
    for ours, theirs, number in timing:
        times = list(getattr(sequence, ours, None) or [])
        if len(times) == 1 or number < len(times):  # none rather than another image's
            out |= dict.fromkeys(theirs, f"{times[number if number < len(times) else 0]:g}")
    return out


def _image(
    pixels: np.ndarray, head, frame: Frame, z: int, partitions: int, series: int, index: int, meta: dict
) -> ismrmrd.Image:
    """One image from pixels [z y x]; partition z of `partitions` (1: the whole volume)."""
    fov, position = list(frame.fov_mm), frame.position
    if partitions > 1:
        fov[2] /= partitions
        position = position + frame.directions[2] * (z - partitions // 2) * fov[2]
    image = ismrmrd.Image.from_array(np.ascontiguousarray(pixels), transpose=False)
    out = image.getHead()
    origin = ("measurement_uid", "patient_table_position", "acquisition_time_stamp", "physiology_time_stamp")
    for name in (*origin, "user_int", "user_float"):
        setattr(out, name, getattr(head, name))
    for name in ("average", "slice", "contrast", "phase", "repetition", "set"):
        setattr(out, name, getattr(head.idx, name))
    out.read_dir, out.phase_dir, out.slice_dir = (tuple(row) for row in frame.directions)
    out.version, out.position, out.field_of_view = 1, tuple(position), tuple(fov)
    out.image_type = ismrmrd.IMTYPE_COMPLEX if np.iscomplexobj(pixels) else ismrmrd.IMTYPE_MAGNITUDE
    out.image_series_index, out.image_index = series, index
    if partitions > 1:
        out.slice = head.idx.slice * partitions + z
    place = [f"{v:.6f}" for v in position]  # Gadgetron calls it PatientPosition
    image.meta = ismrmrd.Meta({**meta, "GADGETRON_ImageNumber": str(index), "PatientPosition": place})
    out.attribute_string_len = len(image.attribute_string.encode())
    image.setHead(out)
    return image


def image_kind(geometry: Geometry, options: Options) -> tuple[np.dtype, tuple[int, int, int, int]]:
    """Pixel type and size [channels z y x] of the images that `make_images` will make."""
    x, y, z = geometry.recon_matrix
    if "transpose" in parse_orientation(options.orientation):
        x, y = y, x
    return np.dtype(options.output), (1, z if options.layout == "volume" else 1, y, x)


def notes_of(image: ismrmrd.Image) -> list[str]:
    """Notes for the user in an image's comment, without its name; empty if it has none, as from another server."""
    comment = image.meta.get("ImageComment", "")
    return (comment if isinstance(comment, str) else BETWEEN_NOTES.join(comment)).split(BETWEEN_NOTES)[1:]


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()
