"""`slicediff send`: stream a scan file to a server and write its images to a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..display import Display
from .arguments import count, port


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument("scan", type=Path, help="ISMRMRD file")
    parser.add_argument("images", type=Path, help="HDF5 file to append the images to")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port, default=9002)
    parser.add_argument(
        "--config", default="default", metavar="NAME|FILE", help="a configuration of the server, or a chain XML to send"
    )
    parser.add_argument(
        "--input-group",
        metavar="NAME",
        help="HDF5 group of the scan (default: dataset, or the only one that holds a scan)",
    )
    parser.add_argument("--group", help="HDF5 group of the images (default: date and time)")
    parser.add_argument("--realtime", action="store_true", help="send each line at its time stamp, as the scanner did")
    parser.add_argument(
        "--expect",
        type=count,
        metavar="N",
        help="fail if fewer images come (default: the scan's volumes, in every series)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Send the scan; 0 if all expected images arrived."""
    from ..client import send_scan
    from ..failure import of_images
    from ..files import check_apart
    from ..image_files import ImageWriter
    from ..images import notes_of
    from ..scan_files import ScanFile

    check_apart(arguments.scan, arguments.images)
    display, writer = Display(), ImageWriter(arguments.images, arguments.group)
    try:
        with ScanFile(arguments.scan, arguments.input_group) as scan, display:
            total = len(scan)
            sent = lambda count: display.count("sent", count, total)
            server = (arguments.host, arguments.port, arguments.config)
            how = {"realtime": arguments.realtime, "expect": arguments.expect}
            for image in send_scan(scan, *server, display.say, sent, **how):
                writer.write(image)
                display.note(notes_of(image))
    finally:  # also show the notes when images are missing
        for note in display.facts["warnings"]:
            print(f"slicediff: note: {note}", file=sys.stderr)
        if writer.count:
            print(of_images(writer.count, "{images} written to ") + str(arguments.images))
    return 0
