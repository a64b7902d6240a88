"""`slicediff recon`: reconstruct a scan file into an image file."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import Display
from ..options import Options, make_options
from .arguments import add_options, given_options

if TYPE_CHECKING:
    import ismrmrd

    from ..image_files import ImageWriter


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument("scan", type=Path, help="ISMRMRD file")
    parser.add_argument("images", type=Path, help="HDF5 file to append the images to")
    parser.add_argument(
        "--input-group",
        metavar="NAME",
        help="HDF5 group of the scan (default: dataset, or the only one that holds a scan)",
    )
    parser.add_argument("--group", help="HDF5 group of the images (default: date and time)")
    parser.add_argument(
        "--nifti",
        type=Path,
        metavar="DIR",
        help="also write each volume as NIfTI into this folder, which may hold none of an earlier run",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the last volume in three orientations")
    parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    parser.set_defaults(run=run)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reconstruct; 0 when all images were written. If some cannot be made, the others are still written."""
    from ..failure import ReconError, of_images, sentence
    from ..image_files import ImageWriter

    options = make_options(given_options(arguments))
    _check_places(arguments)
    display, writer, images = Display(), ImageWriter(arguments.images, arguments.group), []
    try:
        for image in _reconstruct(arguments, options, display, writer):
            if arguments.nifti or arguments.png:
                images.append(image)
    except Exception as error:  # reported by cli.py, which does not know what was written before
        if not writer.count or isinstance(error, OSError):
            raise
        raise ReconError(f"{sentence(error)} ({of_images(writer.count, '{images} {were} written')})") from error
    finally:
        if writer.count:
            try:
                _write_copies(arguments, images)
            finally:  # last, as nobody may be there to read it
                _tell(arguments, display, writer.count)
    return 0


def _check_places(arguments: argparse.Namespace) -> None:
    """FileError for an output that could not be written, or told from an earlier run's.

    Raised now and not after the reconstruction.
    """
    from ..files import FileError, check_apart, check_folder, check_picture

    check_apart(arguments.scan, arguments.images)
    if arguments.nifti:
        check_folder(arguments.nifti)
        earlier = min(arguments.nifti.glob("series*_*.nii.gz"), default=None)
        if earlier:
            raise FileError(
                f"{earlier} is there from an earlier run, and its volumes could not be told from this one's: "
                "give another folder to --nifti, or empty it"
            )
    if arguments.png:
        check_picture(arguments.png)


def _reconstruct(
    arguments: argparse.Namespace, options: Options, display: Display, writer: ImageWriter
) -> Iterator[ismrmrd.Image]:
    """Reconstruct the scan and write its images one by one; each is yielded once it is written.

    Raises:
        FileError: if the file is damaged, after the images of its readable part.
    """
    from ..failure import sentence
    from ..files import FileError
    from ..geometry import announced, read_geometry
    from ..header import parse_header
    from ..images import SERIES, image_kind, notes_of
    from ..recon import reconstruct
    from ..scan_files import ScanFile, until_damaged
    from ..solve import load_prior_for

    with ScanFile(arguments.scan, arguments.input_group) as scan, display:
        header = parse_header(scan.header_xml)
        # Of several encodings, only the lines tell which is the image's; of several slices, whether they lie apart.
        if len(header.encoding) == 1 and announced(header).get("slice", 1) == 1:
            writer.check(SERIES["final"], *image_kind(read_geometry(header), options))
        prior = load_prior_for(options)
        display.stage("prior", {})
        damage: list[FileError] = []
        try:
            for image in reconstruct(header, until_damaged(scan.acquisitions(), damage), prior, options, display.stage):
                writer.write(image)
                display.note(notes_of(image))
                yield image
        except ValueError as error:  # volumes that failed, perhaps because of the data that the file has lost
            if not damage:
                raise
            raise FileError("; ".join(sentence(e) for e in (*damage, error))) from error
        for error in damage:
            raise error


def _write_copies(arguments: argparse.Namespace, images: list[ismrmrd.Image]) -> None:
    """Write NIfTI and PNG files, if requested."""
    from ..image_files import join_partitions, write_nifti, write_png
    from ..images import OF_THE_OBJECT

    volumes = join_partitions(images)
    if arguments.nifti:
        arguments.nifti.mkdir(parents=True, exist_ok=True)
        for image in volumes:
            write_nifti(image, arguments.nifti / f"series{image.image_series_index}_{image.image_index:03d}.nii.gz")
    if arguments.png:
        write_png([v for v in volumes if v.image_series_index in OF_THE_OBJECT][-1], arguments.png)


def _tell(arguments: argparse.Namespace, display: Display, count: int) -> None:
    """Print notes on stderr, and what was done on stdout."""
    from ..failure import of_images

    for note in display.facts["warnings"]:
        print(f"slicediff: note: {note}", file=sys.stderr)
    print(of_images(count, "{images} written to ") + str(arguments.images))
    if arguments.json:
        used = {"seconds": display.seconds, "peak_memory_mib": peak_memory_mib()}
        print(json.dumps({**display.facts, "images": count, **used}))


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
