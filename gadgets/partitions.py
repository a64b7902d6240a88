"""Partitions that a converter counts as slices: what would be one slab to each of them is one volume."""

from __future__ import annotations

import ismrmrd
import numpy as np

from .geometry import Geometry, announced

AGREEING = 3  # slices; two slabs in any order have two


class Partitions:
    """Tells whether the slice counter of lines is the partition; called with a line, it gives that line as we understand it.

    By the header: they are if it has several partitions but no steps for them, and as many slices; they are slabs if it has
    steps and at most half as many slices. Otherwise by the lines, if both counters always agree, on three of them at least.

    Args:
        geometry: of the image.
        header: of the scan.
    """

    def __init__(self, geometry: Geometry, header: ismrmrd.xsd.ismrmrdHeader):
        self.count = geometry.shape[0]
        limit = getattr(header.encoding[0].encodingLimits, "kspace_encoding_step_2", None)
        steps = 0 if limit is None or limit.maximum is None else limit.maximum - (limit.minimum or 0)
        slices = announced(header).get("slice", 1)
        self.are_slices = self.count > 1 and steps == 0 and slices == self.count
        self.decided = self.are_slices or self.count == 1 or (steps > 0 and 1 < slices <= self.count / 2)
        self.equal: set[int] = set()  # slices all of whose lines have the same number as a partition
        self.notes: list[str] = []

    def __call__(self, line: ismrmrd.Acquisition) -> ismrmrd.Acquisition:
        if not self.are_partitions(line.idx):
            return line
        self.notes = [f"the slice counter runs over the {self.count} partitions of the matrix: taken for kspace_encode_step_2"]
        out = ismrmrd.Acquisition(ismrmrd.AcquisitionHeader.from_buffer_copy(bytes(line.getHead())), line.data)  # a copy: the line is its owner's
        out.idx.kspace_encode_step_2, out.idx.slice = line.idx.slice, 0
        return out

    def are_partitions(self, idx: ismrmrd.EncodingCounters) -> bool:
        """Whether these counters of a line that makes up the image have a partition for their slice."""
        if not self.decided and idx.slice != idx.kspace_encode_step_2:
            self.decided = True  # slabs
        elif not self.decided:
            self.equal.add(idx.slice)
            self.decided = self.are_slices = len(self.equal) >= min(AGREEING, self.count)
        return bool(idx.slice) and (self.are_slices or not self.decided)

    def flaw(self, counts: np.ndarray, slices) -> str:
        """Why k-space of which `counts` [z y] lines came is no volume, if each of several `slices` has a single partition."""
        if self.count == 1 or len(slices) < 2 or (counts > 0).any(axis=1).sum() != 1:
            return ""
        return f"each of the {len(slices)} slices has one of the matrix' {self.count} partitions: partitions are to be counted by kspace_encode_step_2"
