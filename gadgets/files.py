"""Common to all files: their error, and checks that a path can be read or written."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py

DAMAGE = (OSError, RuntimeError, KeyError, ValueError)  # what h5py raises where a file that could be opened is damaged


class FileError(Exception):
    """A file that is missing or is not what was expected; the message is one sentence."""


def open_hdf5(path: str | Path) -> h5py.File:
    """Open for reading.

    Raises:
        FileError: if it is not an HDF5 file, is truncated or may not be read, or another program is writing to it.
    """
    try:
        return h5py.File(path, "r")
    except BlockingIOError:
        raise FileError(
            f"{path} is in use by another program, which writes to it: wait until it has closed it"
        ) from None
    except PermissionError:
        raise FileError(f"{path} cannot be read: permission denied") from None
    except OSError as error:
        if cut := re.search(r"truncated file: eof = (\d+),.* stored_eof = (\d+)", str(error)):
            raise FileError(
                f"{path} is truncated ({cut[1]} of {cut[2]} bytes): its end was not copied or never written"
            ) from None
        raise FileError(f"{path} is not an HDF5 file: {error}") from None


@contextlib.contextmanager
def damage_told(path: str | Path) -> Iterator[None]:
    """FileError in place of what h5py raises where a file is damaged."""
    try:
        yield
    except DAMAGE as error:
        raise FileError(f"{path} is damaged: {error.args[0] if isinstance(error, KeyError) else error}") from error


def create_hdf5(path: str | Path) -> h5py.File:
    """Open for writing, empty; FileError if that cannot be done."""
    try:
        return h5py.File(path, "w")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}") from None


def check_apart(scan: Path, images: Path) -> None:
    """FileError if the images would go into the scan's own file, which is being read at the same time."""
    if scan.exists() and images.exists() and scan.samefile(images):
        raise FileError(f"{images} is the scan itself: its images need a file of their own")


def check_folder(path: Path) -> None:
    """FileError if `path` is not a writable folder and cannot be created as one."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileError(f"{path} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise FileError(f"nothing can be written into {path}: permission denied")


def check_picture(path: Path) -> None:
    """FileError if no picture can be written to `path`, or its suffix is not that of a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not above, as it takes seconds to load

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise FileError(f"{path} cannot be drawn: pictures end in .png (or one of {', '.join(sorted(known))})")
    check_place(path)


def check_place(path: Path) -> None:
    """FileError if a file cannot be written: it is a folder, there is none to hold it, or no permission."""
    if path.is_dir():
        raise FileError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FileError(f"{path} cannot be written: permission denied")


def check_replaceable(path: Path) -> None:
    """FileError if no HDF5 file can be written to `path`, or what is there is none, or another program has it open."""
    check_place(path)
    if not path.exists() or path.is_file() and not path.stat().st_size:
        return
    if not h5py.is_hdf5(path):
        raise FileError(f"{path} exists and is not an HDF5 file: it is not replaced")
    try:
        h5py.File(path, "r+").close()  # opened with "w", it would be emptied before HDF5 looks whether it is in use
    except BlockingIOError:
        raise FileError(
            f"{path} is in use by another program: wait until it has closed it, or write to another file"
        ) from None
    except OSError:  # damaged: no loss
        pass
