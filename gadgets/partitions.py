"""Partitions that a converter counts as slices: instead of one slab each, together they are one volume."""

from __future__ import annotations

import ismrmrd
import numpy as np

from .geometry import Geometry, announced

AGREEING = 3  # slices whose counters agree; two slabs, in any order, give at most two


class Partitions:
    """Decides whether the slice counter is really the partition counter; called with a line, returns it with correct counters.

    By the header, slices are partitions if it has several partitions but no encoding steps for them, and as many slices;
    they are slabs if it has such steps and at most half as many slices. Otherwise the lines decide: slices are
    partitions if both counters always agree, for at least three slices.

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
        self.equal: set[int] = set()  # slices whose lines all have the same number as partition
        self.notes: list[str] = []

    def __call__(self, line: ismrmrd.Acquisition) -> ismrmrd.Acquisition:
        if not self.are_partitions(line.idx):
            return line
        self.notes = [f"the slice counter runs over the {self.count} partitions of the matrix: taken for kspace_encode_step_2"]
        out = ismrmrd.Acquisition(ismrmrd.AcquisitionHeader.from_buffer_copy(bytes(line.getHead())), line.data)  # a copy: the line belongs to the caller
        out.idx.kspace_encode_step_2, out.idx.slice = line.idx.slice, 0
        return out

    def are_partitions(self, idx: ismrmrd.EncodingCounters) -> bool:
        """Whether the slice counter of this imaging line is a partition."""
        if not self.decided and idx.slice != idx.kspace_encode_step_2:
            self.decided = True  # slabs
        elif not self.decided:
            self.equal.add(idx.slice)
            self.decided = self.are_slices = len(self.equal) >= min(AGREEING, self.count)
        return bool(idx.slice) and (self.are_slices or not self.decided)

    def flaw(self, counts: np.ndarray, slices) -> str:
        """Why k-space with line counts `counts` [z y] is not a volume, if each of several `slices` has a single partition."""
        if self.count == 1 or len(slices) < 2 or (counts > 0).any(axis=1).sum() != 1:
            return ""
        return f"each of the {len(slices)} slices has one of the matrix' {self.count} partitions: partitions are to be counted by kspace_encode_step_2"
