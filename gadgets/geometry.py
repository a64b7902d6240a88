"""What the ISMRMRD header says about one encoding: matrix, field of view and limits.

Where it is silent, its geometry notes what was assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import ismrmrd

from .failure import ScanError

MAX_MATRIX = 65535  # what an image header can hold
MAX_IMAGE_BYTES = 64 << 30
SMALLEST_MM = 0.02  # voxels of images; MR microscopy of rodents comes near
HALVED = 1.5  # readout samples for each voxel, over the same field of view: half the resolution seems unwanted
LEAST_SIDE = 16  # at least 1/16 of the matrix lies on either side of k = 0 in any partial Fourier scan
SHOWN = 0.5  # of the encoded slab; cropping leaves more
FINER = 1 / 3  # of the encoded thickness; interpolation to thinner partitions is not usual
OF_PARTITIONS = "partitions of"  # in notes on them
STEPS = ("kspace_encoding_step_1", "kspace_encoding_step_2")


@dataclass(frozen=True)
class Geometry:
    """Matrix and field of view as x, y, z; `centre` is the position of k = 0 among the encoding steps (E1, E2).

    `readout` is the length of a gathered line, without oversampling; `acceleration` is along E1, E2;
    `calibration` is the header's calibration mode, empty if it states none. `fitting` is an alternative centre (E1, E2)
    that would put all announced steps inside the matrix, where the header's puts some outside (else None): the lines
    will decide (see `beyond`).
    """

    encoded_matrix: tuple[int, int, int]
    encoded_fov_mm: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    recon_fov_mm: tuple[float, float, float]
    centre: tuple[int, int]
    limits: tuple[tuple[int, int], tuple[int, int]]
    readout: int
    warnings: tuple[str, ...] = ()
    acceleration: tuple[int, int] = (1, 1)
    calibration: str = ""
    fitting: tuple[int | None, int | None] = (None, None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Gathered matrix z, y, x: phase-encode axes as encoded, readout without oversampling."""
        return (self.encoded_matrix[2], self.encoded_matrix[1], self.readout)

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Voxel size of the gathered matrix along z, y, x."""
        x, y, z = (fov / n for fov, n in zip(self.encoded_fov_mm, self.encoded_matrix))
        return (z, y, x)

    def place(self, step_1: int, step_2: int) -> tuple[int, int]:
        """Place z, y of encoding steps E1, E2 in the gathered matrix; k = 0 lies at n//2."""
        (cy, cz), (_, ny, nz) = self.centre, self.encoded_matrix
        return step_2 + nz // 2 - cz, step_1 + ny // 2 - cy

    def shift_to(self, other: Geometry) -> tuple[int, int]:
        """Shift (z, y) of gathered lines to the k-space centre of `other`."""
        return tuple(before - after for before, after in zip(self.centre[::-1], other.centre[::-1]))

    def beyond(self, steps: tuple[int, int]) -> tuple[bool, bool]:
        """Along which of E1, E2 a line supports the alternative centre.

        Its step is announced, but outside the matrix with the header's centre.
        """
        axes = zip(self.fitting, self.limits, steps, self.encoded_matrix[1:], self.centre)
        return tuple(
            fitting is not None and low <= step <= high and not 0 <= step + n // 2 - stated < n
            for fitting, (low, high), step, n, stated in axes
        )

    def refitted(self, axes: tuple[bool, bool]) -> Geometry:
        """With the alternative centre along those `axes` (E1, E2) where lines have supported it."""
        centre, fitting, notes = list(self.centre), list(self.fitting), list(self.warnings)
        for axis in (axis for axis in (0, 1) if axes[axis] and fitting[axis] is not None):
            notes.append(f"{self._doubt(axis)}: {fitting[axis]} assumed")
            centre[axis], fitting[axis] = fitting[axis], None
        return replace(self, centre=tuple(centre), fitting=tuple(fitting), warnings=tuple(notes))

    def recentred(self, offset: tuple[int, int]) -> Geometry:
        """With k = 0 moved by `offset` lines (z, y)."""
        centre = tuple(stated + by for stated, by in zip(self.centre, offset[::-1]))
        limits = tuple(
            (max(low, at - n // 2), min(high, at + (n - 1) // 2))
            for (low, high), at, n in zip(self.limits, centre, self.encoded_matrix[1:])
        )
        notes = []
        for by, stated, name, at in zip(offset[::-1], self.centre, STEPS, centre):
            if by:
                side = "beyond" if by > 0 else "before"
                notes.append(
                    f"the strongest lines lie {abs(by)} lines {side} the header's centre {stated} of {name}: "
                    f"{at} assumed"
                )
        return replace(self, centre=centre, limits=limits, warnings=(*self.warnings, *notes))

    def plane(self, thick_mm: float) -> Geometry:
        """With a single partition of that thickness, whatever the header says of partitions."""
        (x, y, _), (fov_x, fov_y, _) = self.encoded_matrix, self.encoded_fov_mm
        (recon_x, recon_y, _), (wide, high, _) = self.recon_matrix, self.recon_fov_mm
        return replace(
            self,
            encoded_matrix=(x, y, 1),
            encoded_fov_mm=(fov_x, fov_y, thick_mm),
            recon_matrix=(recon_x, recon_y, 1),
            recon_fov_mm=(wide, high, thick_mm),
            centre=(self.centre[0], 0),
            limits=(self.limits[0], (0, 0)),
            acceleration=(self.acceleration[0], 1),
            fitting=(self.fitting[0], None),
            warnings=tuple(note for note in self.warnings if STEPS[1] not in note and OF_PARTITIONS not in note),
        )

    def settled(self) -> Geometry:
        """With the header's centre where still in doubt, and only the steps inside the matrix.

        Partial Fourier scans often announce those of all of it.
        """
        if self.fitting == (None, None):
            return self
        limits, notes = list(self.limits), list(self.warnings)
        for axis in (axis for axis in (0, 1) if self.fitting[axis] is not None):
            (low, high), stated, n = limits[axis], self.centre[axis], self.encoded_matrix[1 + axis]
            limits[axis] = max(low, stated - n // 2), min(high, stated + (n - 1) // 2)
            notes.append(f"{self._doubt(axis)}: it was kept, as those did not come")
        return replace(self, limits=tuple(limits), warnings=tuple(notes), fitting=(None, None))

    def _doubt(self, axis: int) -> str:
        (low, high), stated, n = self.limits[axis], self.centre[axis], self.encoded_matrix[1 + axis]
        return (
            f"the header's centre {stated} of {STEPS[axis]} would put {_lost(low, high, stated, n)} "
            f"of the steps {low} to {high} outside of its matrix {n}"
        )


def read_geometry(header: ismrmrd.xsd.ismrmrdHeader, number: int = 0) -> Geometry:
    """Geometry of one encoding.

    Raises:
        ScanError: if there is no encoding, the matrix is impossible or the trajectory is not Cartesian.
    """
    if not header.encoding:
        raise ScanError("the header has no encoding: matrix and field of view are unknown")
    encoding = header.encoding[number]
    kind = getattr(encoding.trajectory, "value", encoding.trajectory)
    if str(kind or "cartesian").lower() != "cartesian":
        raise ScanError(f"expected a cartesian trajectory, the header says {kind!r}")
    if encoding.encodedSpace is None or encoding.reconSpace is None:
        raise ScanError("the header lacks encodedSpace or reconSpace")
    encoded, recon = _matrix(encoding.encodedSpace), _matrix(encoding.reconSpace)
    encoded_fov, recon_fov = _fov(encoding.encodedSpace), _fov(encoding.reconSpace)
    recon_fov, odd = _slab(encoded, encoded_fov, recon, recon_fov) if number == 0 else (recon_fov, [])
    _check_image(encoded_fov, recon, recon_fov)
    limits, centre, fitting, told = zip(*(_limits(encoding, name, size) for name, size in zip(STEPS, encoded[1:])))
    doubts = (*_halved(encoded, encoded_fov, recon, recon_fov), *_tiny(recon, recon_fov), *_multiband(encoding))
    notes = (*told[0], *told[1], *odd, *doubts)
    readout = max(1, min(encoded[0], round(encoded[0] * recon_fov[0] / encoded_fov[0])))
    acceleration, calibration = _parallel(encoding)
    return Geometry(
        encoded, encoded_fov, recon, recon_fov, centre, limits, readout, notes, acceleration, calibration, fitting
    )


def readouts(header: ismrmrd.xsd.ismrmrdHeader) -> list[tuple[int, int]]:
    """For each encoding, the samples of a whole readout and of one without oversampling; (0, 0) if it is unusable."""
    found = []
    for number in range(len(header.encoding)):
        try:
            own = read_geometry(header, number)
            found.append((own.encoded_matrix[0], own.readout))
        except ScanError:  # told where the encoding is needed
            found.append((0, 0))
    return found


def announced(header: ismrmrd.xsd.ismrmrdHeader) -> dict[str, int]:
    """How many averages, slices, contrasts, phases, repetitions and sets the header announces; only those it states."""
    limits = header.encoding[0].encodingLimits if header.encoding else None
    found = {}
    for name in ("average", "slice", "contrast", "phase", "repetition", "set"):
        limit = getattr(limits, name, None)
        if limit is not None and limit.maximum is not None:
            found[name] = limit.maximum - (limit.minimum or 0) + 1
    return found


def _limits(encoding, name: str, size: int) -> tuple[tuple[int, int], int, int | None, list[str]]:
    """First and last step, that of k = 0, an alternative that would fit better (or None), notes on what was assumed."""
    limit = getattr(encoding.encodingLimits, name, None) if encoding.encodingLimits else None
    if limit is None or limit.maximum is None:
        note = f"the header has no limits for {name}: centre {size // 2} assumed"
        return (0, size - 1), size // 2, None, [note] if size > 1 else []  # a single step needs none
    low, high, centre = limit.minimum or 0, limit.maximum, limit.center
    if high < low or high == low < size - 1:
        note = (
            f"the header's limits of {name} run from {low} to {high}: 0 to {size - 1} with centre {size // 2} assumed"
        )
        return (0, size - 1), size // 2, None, [note] if size > 1 else []  # a single step needs none
    notes = []
    if centre is None or not low <= centre <= high:
        middle = (low + high + 1) // 2
        notes.append(f"the header's centre {centre} of {name} lies outside {low} to {high}: {middle} assumed")
        centre = middle
    after = (size - 1) // 2
    lost = _lost(low, high, centre, size)
    if lost == 1 and high - low + 1 == size:  # the writer rounded (high - low) / 2 down
        centre, lost = low + size // 2, 0
    if lost > size // 10 and high - low < size:
        fitting = min(max(centre, high - after), low + size // 2)
        if min(centre - low, high - centre) >= size / LEAST_SIDE:
            return (low, high), centre, fitting, notes
        notes.append(
            f"the header's centre {centre} of {name} would put {lost} of the steps {low} to {high} outside of its "
            f"matrix {size}: {fitting} assumed"
        )
        centre = fitting
    elif lost:
        notes.append(
            f"the header's limits {low} to {high} of {name} with centre {centre} exceed its matrix {size}: "
            "lines outside the matrix are left out"
        )
    return (max(low, centre - size // 2), min(high, centre + after)), centre, None, notes


def _lost(low: int, high: int, centre: int, size: int) -> int:
    """Number of steps that a centre puts outside the matrix."""
    return max(0, centre - size // 2 - low) + max(0, high - centre - (size - 1) // 2)


def _slab(encoded, encoded_fov, recon, recon_fov) -> tuple[tuple[float, float, float], list[str]]:
    """The field of view to reconstruct, and a note where the header's contradicts its partitions.

    Some writers state the thickness of one.
    """
    (wide, high, deep), slab, count = recon_fov, encoded_fov[2], recon[2]
    if encoded[2] == 1 or deep >= SHOWN * slab and count > 1:
        return recon_fov, []
    encoded_as = f"{encoded[2]} {OF_PARTITIONS} {slab / encoded[2]:.3g} mm"
    if count == 1:
        note = (
            f"CAUTION: the header says that {encoded_as} were encoded, but wants a single one of {deep:.3g} mm: "
            "is the z of its reconSpace right?"
        )
        return recon_fov, [note]
    if deep / count <= FINER * slab / encoded[2] and SHOWN * slab <= deep * count <= 1.05 * slab:
        note = (
            f"the header wants {count} {OF_PARTITIONS} {deep / count:.2g} mm where {encoded_as} were encoded: "
            f"its field of view of {deep:.3g} mm was taken for the thickness of one"
        )
        return (wide, high, deep * count), [note]
    note = (
        f"CAUTION: the header wants only the central {deep:.3g} mm of the {slab:.4g} mm that were encoded "
        f"({encoded_as}): is the z of its reconSpace right?"
    )
    return recon_fov, [note]


def _halved(encoded, encoded_fov, recon, recon_fov) -> list[str]:
    """A note if the header asks for half the readout resolution.

    More often, the encoded field of view was written without the oversampling.
    """
    if encoded[0] < HALVED * recon[0] or abs(encoded_fov[0] / recon_fov[0] - 1) > 0.01:
        return []
    note = (
        f"the header wants {recon[0]} voxels of {encoded[0]} along the readout over the same field of view of "
        f"{recon_fov[0]:g} mm: if the image looks too narrow, the header's encoded field of view lacks the oversampling"
    )
    return [note]


def _tiny(recon, recon_fov) -> list[str]:
    """A note on voxels that no scanner can have."""
    size = min(mm / n for mm, n in zip(recon_fov, recon))
    if size >= SMALLEST_MM:
        return []
    return [f"the header's voxels are of {size:.2g} mm: was its field of view written in metres? Its unit is mm"]


def _multiband(encoding) -> list[str]:
    """A note on slices that were excited together."""
    factor = getattr(getattr(encoding.parallelImaging, "multiband", None), "multiband_factor", None)
    if not isinstance(factor, int) or factor <= 1:
        return []
    note = (
        f"CAUTION: the header says that {factor} slices were excited at once (multiband): "
        "they lie over each other, as this server does not separate them"
    )
    return [note]


def _parallel(encoding) -> tuple[tuple[int, int], str]:
    parallel = encoding.parallelImaging
    if parallel is None:
        return (1, 1), ""
    factor = parallel.accelerationFactor
    steps = (factor.kspace_encoding_step_1, factor.kspace_encoding_step_2) if factor is not None else (1, 1)
    mode = parallel.calibrationMode
    return (max(1, steps[0] or 1), max(1, steps[1] or 1)), str(getattr(mode, "value", mode) or "")


def _matrix(space) -> tuple[int, int, int]:
    m = space.matrixSize
    if not 1 <= min(m.x, m.y, m.z) <= max(m.x, m.y, m.z) <= MAX_MATRIX:
        raise ScanError(
            f"expected a matrix of at least 1 and at most {MAX_MATRIX} in each direction, "
            f"the header says {m.x} x {m.y} x {m.z}"
        )
    return (m.x, m.y, m.z)


def _fov(space) -> tuple[float, float, float]:
    f = space.fieldOfView_mm
    if not all(0 < mm < math.inf for mm in (f.x, f.y, f.z)):
        raise ScanError(f"expected a positive, finite field of view, the header says {f.x} x {f.y} x {f.z} mm")
    return (f.x, f.y, f.z)


def _check_image(encoded_fov_mm, recon_matrix, recon_fov_mm) -> None:
    """ScanError for implausible image sizes, which would use up all memory before anyone sees why."""
    if 8 * math.prod(recon_matrix) > MAX_IMAGE_BYTES:
        x, y, z = recon_matrix
        raise ScanError(
            f"the header asks for an image of {x} x {y} x {z} voxels; "
            f"the limit is {MAX_IMAGE_BYTES >> 30} GiB of complex numbers"
        )
    for axis, encoded, recon in zip("xyz", encoded_fov_mm, recon_fov_mm):
        if not 0.01 <= recon / encoded <= 10:
            raise ScanError(
                f"the header's field of view along {axis} is {encoded:g} mm as encoded and {recon:g} mm as "
                "reconstructed, which cannot both be"
            )
