"""The memory that the k-space of one connection may use, and whether what came of a scan is worth an image."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

from recon_core.measure import WORK_ARRAYS

from .failure import ScanError
from .geometry import announced, read_geometry
from .partitions import slices_fill_matrix
from .volume import GatheredVolume

CENTRE = 8  # lines along each phase-encode axis
FEWEST = 0.02  # of all lines: R = 16, aborted after a third


def to_compute(coils: int, shape: tuple[int, ...], virtual: int) -> int:
    """Bytes needed to reconstruct a volume on a CPU, besides its k-space.

    These are three arrays over the virtual coils and a few single images. Added are 8 MiB per coil for the calibration
    of all coils, and 128 MiB for a denoiser's batch of slices.
    """
    return 8 * WORK_ARRAYS * (min(coils, virtual) + 3) * math.prod(shape) + (coils << 23) + (128 << 20)


def has_room(nbytes: float) -> bool:
    """Whether so much memory is free, as far as known."""
    free = free_memory()
    return free is None or nbytes <= free


def check_memory(nbytes: int, what: str) -> None:
    """ScanError if the machine, or this container's or service's limit, lacks the memory.

    The kernel would kill this process with all its scans.
    """
    free = free_memory()
    if free is not None and nbytes > free:
        raise ScanError(
            f"{what} {nbytes / 2**30:.2g} GiB, and {free / 2**30:.2g} GiB of this machine's memory are free now: "
            "send it again later"
        )


class Budget:
    """Keeps the k-space of one connection, and each of its images, below `max_gib`.

    Args:
        virtual: number of virtual coils if the reconstruction uses host memory, on a CPU; 0 on a GPU.

    Raises:
        ScanError: at once, from the header alone; by `check`, if the lines turn out to need more than the header
            announced.
    """

    def __init__(self, header, max_gib: float, virtual: int = 0):
        self.geometry, self.max_bytes = read_geometry(header), max_gib * 2**30
        self.volumes = _announced_volumes(header, slices_fill_matrix(self.geometry, header))
        system = header.acquisitionSystemInformation
        coils = getattr(system, "receiverChannels", None) or 1
        self.check(coils, self.volumes)
        self._check_image()
        work = to_compute(coils, self.geometry.shape, virtual) if virtual else 0
        what = "the scan's k-space and image need" if work else "the scan's k-space needs"
        check_memory(self.nbytes(coils) * self.volumes + work, what)

    def _check_image(self) -> None:
        x, y, z = self.geometry.recon_matrix
        if 8 * x * y * z > self.max_bytes:
            raise ScanError(
                f"an image of {x} x {y} x {z} voxels needs {8 * x * y * z / 2**30:.2g} GiB "
                f"and this server takes {self.max_bytes / 2**30:.2g} GiB: start it with a larger --max-gib"
            )

    def check(self, coils: int, volumes: int) -> None:
        """ScanError if so many volumes of k-space, gathered at once, would not fit."""
        if self.nbytes(coils) * volumes > self.max_bytes:
            gib = self.nbytes(coils) * volumes / 2**30
            z, y, x = self.geometry.shape
            raise ScanError(
                f"the scan's k-space needs {gib:.2g} GiB "
                f"({volumes} volume{'s at once' * (volumes > 1)} of {coils} coils, matrix {x} x {y} x {z}) "
                f"and this server takes {self.max_bytes / 2**30:.2g} GiB: start it with a larger --max-gib"
            )

    def nbytes(self, coils: int) -> int:
        """Bytes of one volume's k-space."""
        return 8 * coils * math.prod(self.geometry.shape)


def _announced_volumes(header, in_one: bool) -> int:
    """Number of volumes gathered at once, by the header's limits; `in_one` if the slices fill one of them together."""
    found = announced(header)
    return math.prod(max(1, found.get(name, 1)) for name in ("slice", "contrast", "set", "phase")[in_one:])


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory available without swapping; None if unknown (not Linux).

    Within the limits of the machine and of this container or service.
    """
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text())
    except OSError:
        return None
    return min([1024 * int(found[1]), *_left_to_groups(root)]) if found else None


def _left_to_groups(root: Path) -> Iterator[int]:
    """Memory left by the control groups of this process (a container's or service's limit).

    Cache that can be dropped counts as free.
    """
    listed = root / "proc/self/cgroup"
    own = re.findall(r"^(?:0:|\d+:memory):/*(.*)$", listed.read_text(), re.MULTILINE) if listed.exists() else []
    # each is within its parents; inside a container, its own is the mount's root
    groups = {Path(), *(group for path in own for group in (Path(path), *Path(path).parents))}
    for place, limit, used, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in groups:
            folder = root / "sys/fs/cgroup" / place / group
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                droppable = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                yield max(0, most - now + int(droppable[1] if droppable else 0))


def worth_an_image(gathered: GatheredVolume) -> bool:
    """Whether a volume of an aborted scan has enough lines for an image.

    That is, some in each quadrant of the k-space centre, and not too few in all.
    """
    there = gathered.counts > 0
    if gathered.calibration is not None:
        there = there | (gathered.calibration[1] > 0)
    quadrants = [there[z][:, y] for z in _halves(there.shape[0]) for y in _halves(there.shape[1])]
    return all(bool(q.any()) for q in quadrants) and float((gathered.counts > 0).float().mean()) >= FEWEST


def _halves(n: int) -> list[slice]:
    """The two halves of the central part of an axis; if it is a single line, that line."""
    middle, reach = n // 2, min(CENTRE, n) // 2
    return [slice(middle - reach, middle), slice(middle, middle + reach)] if reach else [slice(0, 1)]
