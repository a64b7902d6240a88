"""Objects, coils, phase and sampling patterns for simulated scans; deterministic given a seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .fft import centre_block


def phantom(shape: tuple[int, int, int] = (64, 80, 64)) -> Tensor:
    """Head-like phantom [z y x] of ellipsoids with different brightness, off-centre details included."""
    parts = [  # brightness added, centre (z y x), half axes (z y x), in units of half the matrix
        (1.0, (0, 0, 0), (0.80, 0.85, 0.70)),
        (-0.7, (0, 0, 0), (0.74, 0.79, 0.64)),
        (0.5, (0, -0.02, 0), (0.70, 0.74, 0.60)),
        (-0.4, (0.1, -0.1, 0.18), (0.25, 0.30, 0.10)),
        (-0.4, (0.1, -0.1, -0.18), (0.25, 0.30, 0.10)),
        (0.3, (-0.2, 0.35, 0.0), (0.20, 0.18, 0.25)),
        (0.4, (0.30, 0.40, 0.30), (0.06, 0.06, 0.06)),
        (0.4, (-0.35, -0.45, 0.20), (0.04, 0.08, 0.04)),
    ]
    axes = [(torch.arange(n) - n // 2) / (n / 2) for n in shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    out = torch.zeros(shape)
    for value, centre, half in parts:
        distance = sum(((g - c) / h) ** 2 for g, c, h in zip(grid, centre, half)).sqrt()
        edge = 2.0 / min(shape)
        out += value * torch.sigmoid((1 - distance) / edge * 2)
    return out.clamp_min(0)


def random_phantom(rng: np.random.Generator, shape: tuple[int, int, int] = (128, 144, 120)) -> Tensor:
    """Random object [z y x] in the style of physical phantoms.

    A filled body with uniform inserts, rows of rods and empty chambers.
    """
    z, y, x = torch.meshgrid(*(torch.arange(n) - n / 2 for n in shape), indexing="ij")
    # distance outside the edge, in voxels, at which an eighth of the brightness is left
    blunt = rng.uniform(1.0, 3.0) / 2
    out = torch.zeros(shape)

    def part(centre, half: np.ndarray, kind: str, value: float) -> None:
        near = [slice(max(0, int(n / 2 + c - h - 4)), int(n / 2 + c + h + 5)) for n, c, h in zip(shape, centre, half)]
        away = [(g[tuple(near)] - c).abs() / h for g, c, h in zip((z, y, x), centre, half)]
        if kind == "box":
            distance = torch.stack(away).amax(0)
        elif kind == "rod":
            distance = torch.maximum((away[1].square() + away[2].square()).sqrt(), away[0])
        else:
            distance = sum(a.square() for a in away).sqrt()
        share = torch.sigmoid((1 - distance) * float(half.min()) / blunt * 2)
        out[tuple(near)] += share * (value - out[tuple(near)])

    body = np.array(shape) * rng.uniform(0.3, 0.46, 3)
    part((0, 0, 0), body, str(rng.choice(["rod", "ellipsoid", "box"])), 1.0)
    for _ in range(int(rng.integers(3, 14))):
        half = np.exp(rng.uniform(math.log(2), math.log(0.4 * body.min()), 3 if rng.random() < 0.7 else 1)) * np.ones(3)
        centre, kind = rng.uniform(-0.7, 0.7, 3) * body, str(rng.choice(["rod", "ellipsoid", "box"]))
        part(centre, half, kind, float(rng.uniform(0, 1.6)))
    for _ in range(int(rng.integers(0, 3))):
        radius, corner = float(rng.uniform(1, 5)), rng.uniform(-0.6, 0.3, 3) * body
        value = float(rng.choice([0.0, 1.8]))
        for row, column in np.ndindex(*rng.integers(2, 7, 2)):
            place = corner + (0, 4 * radius * row, 4 * radius * column)
            part(np.clip(place, -0.8 * body, 0.8 * body), np.array([0.3 * body[0], radius, radius]), "rod", value)
    return out


def coil_sensitivity(coil: int, coils: int, shape: tuple[int, int, int]) -> Tensor:
    """Receive field [z y x] of one of `coils` loops on two rings around the object; a single coil is uniform."""
    if coils == 1:
        return torch.ones(shape, dtype=torch.complex64)
    rings = 1 if coils < 6 else 2
    angle = 2 * math.pi * (coil // rings + 0.5 * (coil % rings)) / math.ceil(coils / rings)
    height = 0.0 if rings == 1 else (0.5 if coil % 2 else -0.5)
    centre = (height, 1.3 * math.sin(angle), 1.3 * math.cos(angle))
    axes = [(torch.arange(n) - n // 2) / (n / 2) for n in shape]
    z, y, x = (a.reshape([-1 if i == j else 1 for j in range(3)]) - c for i, (a, c) in enumerate(zip(axes, centre)))
    squared = z**2 + y**2 + x**2
    inward = -(y * math.sin(angle) + x * math.cos(angle))
    phase = angle + 0.9 * torch.atan2(-y * math.cos(angle) + x * math.sin(angle), inward + 0.4) + 0.4 * z
    return torch.polar(1 / (squared + 0.35), phase.expand_as(squared)).to(torch.complex64)


def loop_sensitivities(coils: int, shape: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
    """Receive fields [coils z y x] of loops at random places around the object.

    At its centre their root sum of squares is of order 1: on average 0.6 for 2 coils, 1.6 for 12. By reciprocity a loop
    receives Bx - i By of the field it would make, x and y perpendicular to B0, here the first axis (Hoult, Concepts
    Magn. Reson. 2000).
    """
    grid = torch.stack(torch.meshgrid(*((torch.arange(n) - n // 2) / (n / 2) for n in shape), indexing="ij"))
    fields = torch.empty((coils, *shape), dtype=torch.complex64)
    turn, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 0.7)
    for coil in range(coils):
        angle = turn + 2 * math.pi * (coil + rng.uniform(-0.4, 0.4)) / coils
        outward = np.array([rng.uniform(-0.8, 0.8), math.sin(angle), math.cos(angle)])
        moment = outward / np.linalg.norm(outward) + rng.uniform(-0.4, 0.4, 3)
        field = loop_field(grid, outward * rng.uniform(1.2, 1.7), moment, radius)
        fields[coil] = torch.complex(field[2], -field[1]) * np.exp(2j * math.pi * rng.random()) * rng.uniform(0.6, 1.4)
    return fields


def loop_field(grid: Tensor, centre: np.ndarray, moment: np.ndarray, radius: float) -> Tensor:
    """Magnetic field [3 ...] of a current loop at the positions grid [3 ...].

    moment is pi R^2 times the current, mu0 / 4 pi is left out. (3 (m.r) r + m (2 R^2 - r^2)) / (r^2 + R^2)^(5/2): exact
    on the loop's axis, a dipole's field far away (Jackson, section 5.5, without terms odd in r).
    """
    column = lambda v: torch.as_tensor(v, dtype=torch.float32).reshape(3, *[1] * (grid.ndim - 1))
    away, m = grid - column(centre), column(moment)
    squared = away.square().sum(0)
    return (3 * (m * away).sum(0) * away + m * (2 * radius**2 - squared)) / (squared + radius**2) ** 2.5


def smooth_phase(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Smooth object phase [z y x] in radians: a sum of six slow waves."""
    rng = np.random.default_rng([seed, 10])
    axes = [(torch.arange(n) - n // 2) / n for n in shape]
    z, y, x = (a.reshape([-1 if i == j else 1 for j in range(3)]) for i, a in enumerate(axes))
    out = torch.zeros(shape)
    for _ in range(6):
        kz, ky, kx = rng.uniform(-1.2, 1.2, 3)
        amplitude, offset = float(rng.uniform(0.2, 0.6)), float(rng.uniform(0, 6.28))
        out += amplitude * torch.cos(2 * math.pi * (kz * z + ky * y + kx * x) + offset)
    return out


def sampling_mask(
    shape: tuple[int, int], acceleration: float, pattern: str = "poisson", acs: int = 24, seed: int = 0
) -> np.ndarray:
    """Boolean phase-encode mask [z y] with about z*y/acceleration lines, calibration square included.

    Raises:
        ValueError: for an unknown pattern, or if the calibration lines alone take over 90 % of the lines at this
            acceleration.
    """
    if pattern == "full" or acceleration <= 1:
        return np.ones(shape, bool)
    acs = [min(acs, n) for n in shape]
    centre = centre_block(shape, acs).numpy()
    wanted = shape[0] * shape[1] / acceleration
    if centre.sum() > 0.9 * wanted:
        raise ValueError(
            f"acceleration {acceleration:g} leaves {wanted:.0f} of {shape[0]} x {shape[1]} lines, but the "
            f"{acs[0]} x {acs[1]} calibration square alone takes {centre.sum()}; lower the acceleration or --acs"
        )
    if pattern == "regular":
        return centre | _regular(shape, acceleration)
    if pattern == "poisson":
        return _poisson(shape, wanted, centre, seed)
    raise ValueError(f"unknown pattern {pattern!r}; expected poisson, regular or full")


def _regular(shape: tuple[int, int], acceleration: float) -> np.ndarray:
    """CAIPIRINHA-type lattice: every Ry-th line, shifted along y from one Rz-th plane to the next."""
    rz = max(1, int(math.sqrt(acceleration))) if shape[0] > 1 else 1
    ry = max(1, round(acceleration / rz))
    z, y = np.ogrid[: shape[0], : shape[1]]
    z, y = z - shape[0] // 2, y - shape[1] // 2
    return (z % rz == 0) & ((y - (z // rz) * (ry // 2)) % ry == 0)


def _poisson(shape: tuple[int, int], wanted: float, centre: np.ndarray, seed: int) -> np.ndarray:
    """Variable-density Poisson-disc sampling inside the k-space ellipse; the disc size is found by bisection."""
    acceleration = shape[0] * shape[1] / wanted
    # in a single row the acceleration comes from one axis alone
    widest = 2.0 * (acceleration if min(shape) == 1 else math.sqrt(acceleration))
    low, high, mask = 0.1, widest, centre
    for _ in range(10):
        middle = (low + high) / 2
        mask = centre | _throw_darts(shape, middle, seed)
        if abs(mask.sum() - wanted) < 0.01 * wanted:
            break
        low, high = (middle, high) if mask.sum() > wanted else (low, middle)
    return mask


def _throw_darts(shape: tuple[int, int], size: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 11])
    nz, ny = shape
    z, y = np.ogrid[:nz, :ny]
    radius = np.sqrt(((z - nz // 2) / (nz / 2)) ** 2 + ((y - ny // 2) / (ny / 2)) ** 2)
    disc = size * (0.5 + 1.0 * radius)
    candidates = np.argwhere(radius <= 1)
    rng.shuffle(candidates)
    taken = np.zeros(shape, bool)
    for cz, cy in candidates.tolist():
        r = disc[cz, cy]
        w = int(r)
        z0, y0 = max(0, cz - w), max(0, cy - w)
        hits = np.argwhere(taken[z0 : cz + w + 1, y0 : cy + w + 1])
        if not len(hits) or ((hits - (cz - z0, cy - y0)) ** 2).sum(1).min() >= r * r:
            taken[cz, cy] = True
    return taken
