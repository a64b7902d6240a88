"""Chooses how the coil maps of a scan are made.

What its calibration lines allow decides, and whether its object fits into the field of view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .coils import MIN_ACS, folding, low_resolution_maps, maps_of, overlap, second_maps, signal_operators, too_few
from .low_resolution import object_support
from .measurement import Reference
from .sense import Sense
from .slices import MIN_SIDE, usable_axes

# Share of the object that lies over other parts of it: above the first, these get coil maps of their own and
# it is reported; above the second, with CAUTION.
WRAPS, WRAPS_BADLY = 0.05, 0.4
COILS_FOR_TWO = 4  # fewer tell two parts and the aliases of undersampling apart nowhere


@dataclass(frozen=True)
class Calibration:
    """Calibration lines of the virtual coils.

    `acs` [coils z y x] is from cut_acs, `size` (z, y) their number, `sigma` their noise per real part, and `loudest`
    that of the loudest coil.
    """

    acs: Tensor
    size: tuple[int, int]
    sigma: float
    loudest: float

    def to(self, device: str | torch.device) -> Calibration:
        """The same lines on `device`."""
        return replace(self, acs=self.acs.to(device))


@dataclass
class CoilMaps:
    """Coil maps `first` [coils z y x], where the object is (`support` [z y x]), and warnings for the user.

    `operators` are the signal_operators of which a second set is to be made, None if there is to be none.
    """

    first: Tensor
    support: Tensor
    warnings: list[str] = field(default_factory=list)
    operators: Tensor | None = None

    def sense(self, mask: Tensor, device: str | torch.device) -> Sense:
        """The operator with these maps and `mask` [z y] on `device`; `first` is used up."""
        operator = Sense(self.first.mul_(self.support), mask, device)
        del self.first  # before there are others
        return operator if self.operators is None else operator.with_second(*second_maps(self.operators, operator.maps))


def make_coil_maps(
    calibration: Calibration,
    shape: tuple[int, int, int],
    counts: Tensor,
    all_lines: Callable[[], Tensor],
    folded: int,
    least: float,
) -> CoilMaps:
    """Coil maps by the best method that the calibration allows.

    Args:
        shape: (z, y, x) of the volume.
        counts: [z y] number of lines of which the calibration is the centre; the maps are kept on its device.
        all_lines: the k-space of these lines [coils z y x], asked for only if the calibration has too few lines.
        folded: so many-fold the image would be aliased without coil maps.
        least: share of the object over other parts of it above which there is a second set (see least_overlap).
    """
    acs, home = calibration.acs, counts.device
    everywhere = torch.ones(shape, device=home)
    if len(acs) == 1:
        return CoilMaps(torch.ones((1, *shape), dtype=acs.dtype, device=home), everywhere)
    if too_few(calibration.size, shape):
        few = _few(calibration.size, folding(counts) > 1, folded)
        return CoilMaps(low_resolution_maps(all_lines(), counts), everywhere, few)
    # With less than `loudest`, noise of that coil would count as a second signal everywhere.
    operators = signal_operators(acs, shape, calibration.loudest)
    # Slabs of a few lines look the same whether their edges meet or lie over each other; a single one cannot.
    sides = [n for n in shape[:2] if n > 1]
    share = overlap(operators, acs) if sides and min(sides) >= MIN_SIDE else 0.0
    second = share > least and len(usable_axes(shape)) > 1 and len(acs) >= COILS_FOR_TWO
    first = maps_of(operators, shape, home)
    support = object_support(acs, shape, calibration.sigma).to(home)
    return CoilMaps(first, support, _wraps(share, second), operators if second else None)


def least_overlap(sets: int, reference: Reference | None) -> float:
    """Share of the object over other parts of it above which there is a second set of maps.

    `sets` is how many there may be; in a series, the first volume decides for all.
    """
    if sets == 1 or (reference is not None and reference.sets == 1):
        return math.inf
    return WRAPS if reference is None else -1.0


def _few(size: tuple[int, int], regular: bool, folded: int) -> list[str]:
    """Warnings about so few calibration lines, of a `regular` pattern or not."""
    warnings = [
        f"calibration lines cover only {size[0]} x {size[1]} (z x y) of the k-space centre, "
        f"{MIN_ACS} x {MIN_ACS} are wanted: coil maps were made from a smoothed image and may be poor"
    ]
    if folded > 1:
        none, fold = ("no calibration separates", "is") if regular else ("too few calibration lines separate", "may be")
        warnings.append(
            f"CAUTION: the undersampling is regular and {none} the coils: the image {fold} aliased {folded}-fold"
        )
    return warnings


def _wraps(share: float, second: bool) -> list[str]:
    """Warnings about an object of which a `share` lies over another part of it, with a `second` set of maps or not."""
    if share <= WRAPS:
        return []
    done = "one set of coil maps cannot describe both"
    if second:
        done = "two sets of coil maps separate the parts, and the image shows both"
    caution = "CAUTION: " if share > WRAPS_BADLY else ""
    return [
        f"{caution}about {share:.0%} of the object seems to lie over other parts of it: "
        f"it reaches to the edge of the field of view or beyond along a phase encode, and {done}"
    ]
