"""Cases of what scanners do: the tiny scan with its lines or header in other forms, and the positions of images."""

from __future__ import annotations

import re
import struct

import ismrmrd
import numpy as np

from ..header import parse_header
from . import peer as p
from .bench import Bench
from .buffers import recon_data
from .case import case, expect, same, told
from .point import SLABS, error_voxels, point_scan

NOISE = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)
BOTH = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING - 1)
NO_IMAGE = (
    ismrmrd.ACQ_IS_NAVIGATION_DATA,
    ismrmrd.ACQ_IS_PHASECORR_DATA,
    ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
    ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
    ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
    ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION,
)
PROTOCOLS = {
    "partial Fourier along both phase encodes": dict(partial_fourier=(0.75, 0.8)),
    "an asymmetric echo": dict(partial_echo=0.75),
    "no readout oversampling": dict(oversampling=1),
    "separate calibration": dict(calibration="separate"),
    "external calibration": dict(calibration="external"),
    "no noise lines": dict(noise_lines=0),
    "averages": dict(averages=2),
    "a regular lattice": dict(pattern="regular"),
    "a regular lattice with separate calibration": dict(pattern="regular", calibration="separate"),
}


def changed(line: ismrmrd.Acquisition, data: np.ndarray | None = None, **fields) -> ismrmrd.Acquisition:
    """A copy of a line with other samples [coils samples], header fields or counters."""
    head = ismrmrd.AcquisitionHeader.from_buffer_copy(bytes(line.getHead()))
    data = line.data if data is None else data
    head.active_channels, head.number_of_samples = data.shape
    for name, value in fields.items():
        setattr(head if hasattr(head, name) else head.idx, name, value)
    return ismrmrd.Acquisition(head, np.array(data, np.complex64))


def imaging(bench: Bench) -> list[ismrmrd.Acquisition]:
    """The lines of the tiny scan except noise lines."""
    return [line for line in bench.lines if not line.flags & NOISE]


def scan(bench: Bench, lines: list, header: bytes | None = None, **options) -> p.Answer:
    """The answer to a scan of these acquisitions."""
    return bench.scan([p.acquisition(line) for line in lines], header, **options)


def same_pixels(answer: p.Answer, bench: Bench, times: int = 1) -> str:
    """Expect the pixels of the correct scan, `times` times, and no complaint; returns the last image's comment."""
    expect(answer.closed and not answer.complaint, answer.complaint or "the connection ended without CLOSE")
    expect(
        [image[2] for image in answer.images] == [image[2] for image in bench.expected] * times,
        f"{len(answer.images)} images, not the pixels of the correct scan {times} times",
    )
    return comment(answer)


def comment(answer: p.Answer) -> str:
    """The comment of the last image."""
    return re.search(r"<name>ImageComments</name>\s*<value>([^<]*)", answer.comment()).group(1)


# lines in other forms


@case("navigators, dummies, feedback, phase correction, coil correction, stabilization and waveforms change nothing")
def lines_without_image(bench: Bench) -> str:
    lines = list(bench.messages)
    for number, flag in enumerate(NO_IMAGE):
        intruder = changed(imaging(bench)[number], np.full_like(bench.lines[-1].data, 1e6), flags=1 << (flag - 1))
        lines.insert(20 + 9 * number, p.acquisition(intruder))
    waveform = ismrmrd.Waveform.from_array(np.arange(20, dtype=np.uint32).reshape(2, 10))
    same(bench.scan([*lines[:30], struct.pack("<H", 1026) + waveform.to_bytes(), *lines[30:]]), bench)
    return f"{len(NO_IMAGE)} lines and a waveform left aside, same images"


@case("lines read backwards, and with samples to discard, are the same lines")
def reversed_and_discarded(bench: Bench) -> str:
    backwards = 1 << (ismrmrd.ACQ_IS_REVERSE - 1)
    turned, padded = [], []
    for line in imaging(bench):
        samples, centre = line.data[:, ::-1], line.number_of_samples - 1 - line.center_sample
        turned.append(changed(line, samples, center_sample=centre, flags=line.flags | backwards))
        samples = np.pad(samples, ((0, 0), (3, 5)), constant_values=1e6)
        padded.append(changed(turned[-1], samples, discard_pre=3, discard_post=5, center_sample=centre + 3))
    noise = [line for line in bench.lines if line.flags & NOISE]
    for lines in (turned, padded):
        same_pixels(scan(bench, [*noise, *lines]), bench)
    return "same pixels twice"


@case(
    "slabs, contrasts, sets, phases and repetitions are volumes of their own, interleaved repetitions too", limit_s=20
)
def volumes_apart(bench: Bench) -> str:
    noise = [line for line in bench.lines if line.flags & NOISE]
    for counter in ("slice", "contrast", "set", "phase", "repetition"):
        later = [changed(line, **{counter: 1}) for line in imaging(bench)]
        same_pixels(scan(bench, [*bench.lines, *later]), bench, times=2)
    plain = [changed(line, flags=line.flags & BOTH) for line in imaging(bench)]
    both = [line for first in plain for line in (first, changed(first, repetition=1))]
    same_pixels(scan(bench, [*noise, *both]), bench, times=2)
    return "4 images each, the same pixels twice"


@case("a repetition that is aborted: the ones before it whole, and its own image with a warning, or a sentence")
def aborted_repetition(bench: Bench) -> str:
    later = [changed(line, repetition=1) for line in imaging(bench)]
    answer = scan(bench, [*bench.lines, *later[: len(later) * 2 // 3]])
    expect(
        [image[2] for image in answer.images[:2]] == [image[2] for image in bench.expected],
        "the first repetition is not the same",
    )
    expect(
        len(answer.images) == 4 and "incomplete" in comment(answer),
        f"{len(answer.images)} images, and no word of what is missing",
    )
    return comment(answer)[:110]


@case("lines of another length or without channels change nothing but the comment, which counts them")
def odd_lines(bench: Bench) -> str:
    where, odd = len(bench.lines) // 2, imaging(bench)[5]
    strays = [
        changed(odd, np.full((len(odd.data), 2 * odd.data.shape[1]), 1e6), center_sample=odd.data.shape[1]),
        changed(odd, odd.data[:0]),
    ]
    answer = scan(bench, [*bench.lines[:where], *strays, *bench.lines[where:]])
    same_pixels(answer, bench)
    counted = ("1 line had a different number of channels or samples", "1 line without channels")
    expect(all(words in comment(answer) for words in counted), f"no count of them: {comment(answer)}")
    return "same pixels, the comment counts both"


@case("the lines at the centre of k-space get lost: images all the same, and the comment says what is wrong with them")
def lost_centre(bench: Bench) -> str:
    encoding = parse_header(bench.header).encoding[0].encodingLimits
    e1, e2 = encoding.kspace_encoding_step_1.center, encoding.kspace_encoding_step_2.center
    lost = lambda idx: abs(idx.kspace_encode_step_1 - e1) <= 1 and idx.kspace_encode_step_2 == e2
    answer = scan(bench, [line for line in bench.lines if line.flags & NOISE or not lost(line.idx)])
    expect(answer.closed and len(answer.images) == len(bench.expected), f"{len(answer.images)} images")
    said = comment(answer)
    expect("no line was received at the centre of k-space" in said, f"the comment does not say so: {said}")
    return said[:110]


@case("a contrast none of whose lines can be used: images of the other, and a sentence that names it")
def lost_contrast(bench: Bench) -> str:
    outside = [changed(line, contrast=1, kspace_encode_step_2=900) for line in imaging(bench)]
    answer = scan(bench, [*bench.lines, *outside])
    expect(
        [image[2] for image in answer.images] == [image[2] for image in bench.expected],
        "the first contrast is not the same",
    )
    return told(answer, r"contrast 1.*none of its lines could be used.*outside the encoded matrix")


@case("interleaved repetitions in segments of half a volume, without a flag for their last lines: whole ones")
def segments(bench: Bench) -> str:
    noise = [line for line in bench.lines if line.flags & NOISE]
    plain = [changed(line, flags=line.flags & BOTH) for line in imaging(bench)]
    halves = [plain[: len(plain) // 2], plain[len(plain) // 2 :]]
    mixed = [changed(line, repetition=number) for half in halves for number in (0, 1) for line in half]
    same_pixels(scan(bench, [*noise, *mixed]), bench, times=2)
    return "4 images, the same pixels twice"


@case("lines that come twice are averaged, and counted in the comment")
def lines_twice(bench: Bench) -> str:
    answer = scan(bench, [*bench.lines, *imaging(bench)[:20]])
    expect(
        answer.series == [1, 2] and "20 lines came more than once" in comment(answer),
        f"series {answer.series}, no count of them",
    )
    return "2 images; the comment counts them"


# protocols


@case("protocols a scanner may have give the object that was scanned", limit_s=30)
def protocols(bench: Bench) -> str:
    worst = ("", 1.0)
    for name, options in PROTOCOLS.items():
        header, lines, truth = bench.simulated(**options)
        answer = scan(bench, lines, header)
        expect(answer.series == [1, 2] and not answer.complaint, f"{name}: {answer.complaint or answer.series}")
        alike = min(np.corrcoef(np.frombuffer(pixels, "<u2"), truth.ravel())[0, 1] for _, _, pixels in answer.images)
        expect(alike > 0.95, f"{name}: correlation {alike:.3f} with the object")
        worst = min(worst, (name, alike), key=lambda pair: pair[1])
    return f"{len(PROTOCOLS)} protocols; correlation with the object at least {worst[1]:.3f} ({worst[0]})"


@case("a reconstructed matrix smaller or larger than the encoded one is what the images have")
def other_matrix(bench: Bench) -> str:
    for size in ((11, 12, 10), (33, 36, 31)):
        head, tail = bench.header.split(b"<reconSpace>")
        for axis, old, new in zip("xyz", (22, 24, 20), size):
            tail = tail.replace(f"<{axis}>{old}</{axis}>".encode(), f"<{axis}>{new}</{axis}>".encode(), 1)
        answer = bench.scan(header=head + b"<reconSpace>" + tail)
        expect(answer.series == [1, 2] and not answer.complaint, answer.complaint or f"series {answer.series}")
        found = struct.unpack_from("<3H3f", answer.images[1][0], 16)
        expect(found == (*size, 22.0, 24.0, 20.0), f"matrix and field of view {found}")
    return "11 x 12 x 10 and 33 x 36 x 31 of the same field of view"


# headers and lines that contradict each other


@case(
    "limits that are missing, or a centre or centre sample that cannot be: "
    "the same image, and the comment says what was assumed"
)
def contradictions(bench: Bench) -> str:
    missing = re.sub(rb"<encodingLimits>.*?</encodingLimits>", b"<encodingLimits/>", bench.header, flags=re.S)
    wrong = bench.header.replace(b"<center>12</center>", b"<center>0</center>")
    uncentred = [changed(line, center_sample=0) for line in bench.lines]
    for answer in (bench.scan(header=missing), bench.scan(header=wrong), scan(bench, uncentred)):
        said = same_pixels(answer, bench)
        expect("assumed" in said, f"the comment does not say so: {said}")
    return "same pixels three times, each time with the assumption"


@case(
    "what converters write: the middle for a centre they do not know, zeros for lines that never were, "
    "slices for partitions; the comment tells",
    limit_s=20,
)
def converters(bench: Bench) -> str:
    header, lines, _ = bench.simulated(partial_fourier=(0.6, 1.0))
    right = scan(bench, lines, header)
    moved = scan(bench, lines, header.replace(b"<center>2</center>", b"<center>7</center>"))
    expect(
        len(right.images) == 2 and [image[2] for image in moved.images] == [image[2] for image in right.images],
        "another centre, other pixels",
    )
    expect("5 lines before the header's centre 7" in comment(moved), f"the centre is not told: {comment(moved)}")
    there = {(line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2) for line in imaging(bench)}
    last = bench.lines[-1]
    zeros = np.zeros_like(last.data)
    empty = [
        changed(last, zeros, flags=0, kspace_encode_step_1=y, kspace_encode_step_2=z)
        for y in range(24)
        for z in range(20)
        if (y, z) not in there
    ]
    said = same_pixels(scan(bench, [*empty, *bench.lines]), bench)
    expect(f"{len(empty)} lines held only zeros" in said, "zeros are not told")
    slices = [changed(line, slice=line.idx.kspace_encode_step_2) for line in bench.lines]
    expect("taken for kspace_encode_step_2" in same_pixels(scan(bench, slices), bench), "slices are not told")
    return f"the same pixels three times; {len(empty)} lines of zeros"


@case("an image that cannot be is refused by its header")
def impossible_image(bench: Bench) -> str:
    head, tail = bench.header.split(b"<reconSpace>")
    impossible = (
        (b"<z>20</z>", b"<z>70000</z>", "at most 65535"),
        (b"<y>24.0</y>", b"<y>INF</y>", "finite field of view"),
        (b"<x>22</x>", b"<x>wide</x>", "cannot be read"),
    )
    for old, new, words in impossible:
        answer = bench.scan(header=head + b"<reconSpace>" + tail.replace(old, new, 1))
        refused = not answer.images and re.search(words, answer.complaint) is not None
        expect(refused, f"{len(answer.images)} images; said: {answer.complaint}")
    return "refused three times"


# the other kind of input


@case("Gadgetron's buffers (ReconData) give the images of the acquisitions in them")
def buffers(bench: Bench) -> str:
    lines = imaging(bench)
    expected = scan(bench, lines)
    payload = struct.pack("<H", 1023) + recon_data(parse_header(bench.header), lines)
    answer = bench.scan([payload], gadgetron=True)
    expect(answer.closed and not answer.complaint, answer.complaint or "no CLOSE")
    expect(
        answer.images == expected.images and len(answer.images) == 2,
        f"{len(answer.images)} images, not those of the acquisitions",
    )
    return f"{len(payload)} bytes, same images"


# positions of images


def _point(bench: Bench, **options) -> str:
    worst = 0.0
    for name, slab in SLABS.items():
        header, lines, voxel = point_scan(**slab)
        answer = scan(bench, lines, header.toXML().encode(), method="cg", **options)
        expect(bool(answer.images) and not answer.complaint, f"{name}: {answer.complaint}")
        error = error_voxels([(head, pixels) for head, _, pixels in answer.images], voxel)
        expect(error < 0.1, f"{name}: {error:.2f} voxels from its place")
        worst = max(worst, error)
    return f"{len(SLABS)} slabs, at most {worst:.3f} voxels from its place"


@case(
    "a point of an oblique slab lies where it is, within 0.1 voxel: odd, even, partial Fourier, cropped, interpolated",
    limit_s=30,
)
def point_in_volumes(bench: Bench) -> str:
    return _point(bench)


@case("the same in partitions, turned", limit_s=30)
def point_in_partitions(bench: Bench) -> str:
    return _point(bench, layout="partitions", orientation="transpose+flip_x+flip_z")
