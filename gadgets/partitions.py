"""Partitions that a converter counts as slices, and slices that it counts as partitions of the matrix."""

from __future__ import annotations

import ismrmrd
import numpy as np

from .geometry import Geometry, announced

AGREEING = 3  # slices whose counters agree; two slabs, in any order, give at most two
APART = 0.5  # times the thickness of a partition; partitions share the position of their volume
CLOSEST_SLABS = 0.6  # times their thickness; slices of one stack are nearer to each other than that of the whole stack


def slices_fill_matrix(geometry: Geometry, header: ismrmrd.xsd.ismrmrdHeader) -> bool:
    """Whether the header has several partitions but no encoding steps for them, and as many slices."""
    return geometry.shape[0] > 1 and _steps(header) == 0 and announced(header).get("slice", 1) == geometry.shape[0]


class Partitions:
    """Decides whether the slice counter is really the partition counter.

    Let it `see` each line; once it is no longer `unsure` of it, `recounted` gives the line with correct counters.

    Slices that lie apart along the slice direction are slices, whatever the matrix: `are_planes` if the header has no
    encoding steps for its partitions. Otherwise, by the header, slices are partitions if it has several partitions but
    no encoding steps for them, and as many slices; they are slabs if it has such steps and at most half as many slices.
    Otherwise the lines decide: slices are partitions if both counters always agree, for at least three slices.

    Args:
        geometry: of the image.
        header: of the scan.
    """

    def __init__(self, geometry: Geometry, header: ismrmrd.xsd.ismrmrdHeader):
        self.count, self.fov_mm = geometry.shape[0], geometry.encoded_fov_mm[2]
        steps, slices = _steps(header), announced(header).get("slice", 1)
        self.several = announced(header).get("slice", 2) > 1  # slices, unless the header announces one
        self.are_slices = slices_fill_matrix(geometry, header)
        self.decided = self.are_slices or self.count == 1 or (steps > 0 and 1 < slices <= self.count / 2)
        self.equal: set[int] = set()  # slices whose lines all have the same number as partition
        self.first: ismrmrd.AcquisitionHeader | None = None
        # Of the first two slices; 0 if they share a position, None as long as there is one.
        self.apart_mm: float | None = 0.0 if self.count == 1 else None
        self.closest_slabs_mm = np.inf if steps == 0 else CLOSEST_SLABS * self.fov_mm
        self.are_planes = False
        self.deep = False  # whether a volume had lines of several partitions
        self.notes: list[str] = []

    def see(self, line: ismrmrd.Acquisition) -> None:
        """Compare the positions of the first two slices; if they lie apart, this decides."""
        if self.apart_mm is not None or line.encoding_space_ref:
            return
        if self.first is None:
            self.first = line.getHead()
        elif line.idx.slice != self.first.idx.slice:
            normal = np.array(self.first.slice_dir, float)
            length = float(np.linalg.norm(normal))
            with np.errstate(invalid="ignore"):  # positions and directions may be infinite
                away = np.array(line.position, float) - np.array(self.first.position, float)
                found = abs(float(away @ normal)) / length if length > 0 else float(np.linalg.norm(away))
            self.apart_mm = found if np.isfinite(found) and found > APART * self.fov_mm / self.count else 0.0
            if self.apart_mm:
                self.are_planes, self.are_slices, self.decided = self.are_slices, False, True

    def unsure(self, line: ismrmrd.Acquisition) -> bool:
        """Whether it takes a line of another slice to know if this one is a slice or a partition."""
        return self.apart_mm is None and (self.are_slices or (not self.decided and line.idx.slice > 0))

    def await_another_slice(self, counts: list[np.ndarray]) -> bool:
        """Whether volumes with line counts `counts` [z y] may be slices that lie apart, which the next slice shows."""
        flat = all((one > 0).any(axis=1).sum() == 1 for one in counts)
        return self.apart_mm is None and self.several and flat

    def recounted(self, line: ismrmrd.Acquisition) -> ismrmrd.Acquisition:
        """The line with correct counters; while nothing is decided, its own may decide."""
        if not self.decided and not line.encoding_space_ref:  # other encodings have counters of their own
            self._decide(line.idx)
        if self.are_planes:
            has_partition = line.idx.kspace_encode_step_2 and not line.encoding_space_ref
            return _counted(line, line.idx.slice, 0) if has_partition else line
        if (self.decided and not self.are_slices) or not line.idx.slice:
            return line
        self.notes = [
            f"the slice counter runs over the {self.count} partitions of the matrix: taken for kspace_encode_step_2"
        ]
        return _counted(line, 0, line.idx.slice)

    def _decide(self, idx: ismrmrd.EncodingCounters) -> None:
        """Slabs if both counters differ; partitions once they have agreed for enough slices."""
        if idx.slice != idx.kspace_encode_step_2:
            self.decided = True
        else:
            self.equal.add(idx.slice)
            self.decided = self.are_slices = len(self.equal) >= min(AGREEING, self.count)

    def plane(self, geometry: Geometry) -> Geometry:
        """Geometry of a single slice, for slices that lie apart; notes that it is."""
        # Slices of one stack are less than its whole length apart.
        thick = self.fov_mm if self.apart_mm > 0.99 * self.fov_mm else self.fov_mm / self.count
        self.are_planes = self.decided = True
        note = (
            f"the slices lie apart along the slice direction: each is taken for a 2D image {thick:.3g} mm thick, "
            f"although the header's matrix has {self.count} partitions"
        )
        self.notes = [note]
        return geometry.plane(thick)

    def single(self, counts: list[np.ndarray], slices) -> bool:
        """Whether volumes with line counts `counts` [z y] are single slices.

        They are if there are several `slices`, closer together than slabs, and each volume has one partition.
        """
        self.deep |= any((one > 0).any(axis=1).sum() > 1 for one in counts)
        close = 0 < (self.apart_mm or 0) < self.closest_slabs_mm
        return not self.deep and not self.are_planes and len(slices) > 1 and close

    def flaw(self, counts: np.ndarray, slices) -> str:
        """Why k-space with line counts `counts` [z y] is not a volume, or "".

        It is not if each of several `slices` has a single partition.
        """
        if self.count == 1 or self.are_planes or len(slices) < 2 or (counts > 0).any(axis=1).sum() != 1:
            return ""
        return (
            f"each of the {len(slices)} slices has one of the matrix' {self.count} partitions: "
            "partitions are to be counted by kspace_encode_step_2"
        )


def _steps(header: ismrmrd.xsd.ismrmrdHeader) -> int:
    """Number of encoding steps along the partitions that the header announces, less one."""
    limit = getattr(header.encoding[0].encodingLimits, "kspace_encoding_step_2", None)
    return 0 if limit is None or limit.maximum is None else limit.maximum - (limit.minimum or 0)


def _counted(line: ismrmrd.Acquisition, slice_: int, step_2: int) -> ismrmrd.Acquisition:
    """A copy of a line, which belongs to the caller, with other counters."""
    out = ismrmrd.Acquisition(ismrmrd.AcquisitionHeader.from_buffer_copy(bytes(line.getHead())), line.data, line.traj)
    out.idx.slice, out.idx.kspace_encode_step_2 = slice_, step_2
    return out
