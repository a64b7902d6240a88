"""Gaussian splatting for volumes: many Gaussians of complex amplitude, each with a position, widths and directions.

Volumes are rendered as in Kerbl et al. (arXiv 2308.04079), but onto voxels instead of along rays: every Gaussian adds
to the voxels of a cube around it, so that the cost grows with the number of Gaussians, not with the volume.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .representation import PUBLISHED, Representation, Shape

SHARE = 0.5  # Gaussians per voxel of the object
WIDTH = 0.6  # initial standard deviation, in units of their spacing
REACH = 2.5  # standard deviations from the centre of a cube to its face
WIDEST = 4  # voxels of the scan's mesh from the centre of a cube to its face, at most
# Adam learning rates for amplitudes in tissue units, positions in voxels and the logarithms of widths.
RATE, PLACE_RATE, WIDTH_RATE = 0.06, 0.05, 0.02
AT_ONCE = 1 << 20  # voxels of cubes in memory at a time
EMPTY = 0.05  # of tissue brightness: darker voxels count as no object


class Gaussians(Representation):
    """Positions and widths are in voxels of `start`.

    `factor` [gaussians 3 3] is the lower-triangular Cholesky factor of the inverse covariance.
    """

    fit_steps = 100
    fit_settles = True

    def __init__(self, start: Tensor, finest: Shape, seed: int = 0):
        super().__init__()
        self.shape = tuple(start.shape)
        random = torch.Generator().manual_seed(seed)
        weight = start.abs().clamp_max(1).flatten().cpu()
        count = max(1, math.ceil(SHARE * int((weight > EMPTY).sum())))
        # Weighted, without replacement (Gumbel top-k); multinomial is limited to 2^24.
        luck = -torch.log(-torch.log(torch.rand(weight.shape, generator=random).clamp(1e-12, 1 - 1e-7)))
        chosen = torch.topk(torch.log(weight + 1e-6) + luck, min(count, weight.numel())).indices
        places = torch.stack(torch.unravel_index(chosen, self.shape), -1).float()
        spacing = SHARE ** (-1 / 3)
        width = WIDTH * spacing
        amplitude = start.flatten()[chosen.to(start.device)] * (spacing / width / (2 * math.pi) ** 0.5) ** 3
        self.places = torch.nn.Parameter(places + 0.5 * torch.rand(places.shape, generator=random) - 0.25)
        self.logarithms = torch.nn.Parameter(torch.full((len(places), 3), -math.log(width)))
        self.shears = torch.nn.Parameter(torch.zeros(len(places), 3))
        self.amplitudes = torch.nn.Parameter(torch.view_as_real(amplitude.cpu()).clone())
        self.to(start.device)

    def groups(self, rate: float) -> list[dict]:
        """Own learning rates, as many Gaussians make up one voxel; RATE for amplitudes if `rate` is PUBLISHED."""
        return [
            {"params": [self.amplitudes], "lr": RATE * rate / PUBLISHED},
            {"params": [self.places], "lr": PLACE_RATE},
            {"params": [self.logarithms, self.shears], "lr": WIDTH_RATE},
        ]

    @property
    def factor(self) -> Tensor:
        """[gaussians 3 3], with a positive diagonal."""
        out = torch.diag_embed(self.logarithms.exp())
        each = torch.arange(len(out), device=out.device)[:, None]
        row, column = torch.tril_indices(3, 3, -1).to(out.device)
        return out.index_put((each, row, column), self.shears)

    def forward(self, shape: Shape) -> Tensor:
        finer = torch.tensor([n / own for n, own in zip(shape, self.shape)], device=self.places.device)
        middle = torch.tensor([own // 2 for own in self.shape], device=self.places.device)
        places = (self.places - middle) * finer + torch.tensor([n // 2 for n in shape], device=finer.device)
        factor = self.factor / finer[:, None]
        around = cubes(factor.detach(), WIDEST * float(finer.max()))
        return Splat.apply(places, factor, torch.view_as_complex(self.amplitudes), shape, around)


class Splat(torch.autograd.Function):
    """sum_i a_i exp(-|F_i^T (r - p_i)|^2 / 2) at all voxels r [z y x], each Gaussian truncated to its cube.

    Takes positions p [gaussians 3] in voxels, factors F [gaussians 3 3] in 1 / voxels, complex amplitudes
    a [gaussians], and `cubes`. Only these are saved for the backward pass.
    """

    @staticmethod
    def forward(
        ctx, places: Tensor, factor: Tensor, amplitude: Tensor, shape: Shape, cubes: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.save_for_backward(places, factor, amplitude)
        ctx.shape, ctx.cubes = shape, cubes
        out = amplitude.new_zeros(math.prod(shape))
        for some, offsets in cubes:
            index, _, _, bell = bells(places[some], factor[some], offsets, shape)
            out.index_add_(0, index.flatten(), (amplitude[some, None] * bell).flatten())
        return out.reshape(shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        places, factor, amplitude = ctx.saved_tensors
        to_places, to_factor, to_amplitude = (torch.zeros_like(values) for values in (places, factor, amplitude))
        flat = gradient.flatten()
        for some, offsets in ctx.cubes:
            index, away, scaled, bell = bells(places[some], factor[some], offsets, ctx.shape)
            here = flat[index]
            to_amplitude[some] = (here * bell).sum(1)
            to_scaled = (-(here * amplitude[some, None].conj()).real * bell)[..., None] * scaled
            to_factor[some] = away.mT @ to_scaled
            to_places[some] = -(factor[some] @ to_scaled.sum(1)[..., None])[..., 0]
        return to_places, to_factor, to_amplitude, None, None


def bells(places: Tensor, factor: Tensor, offsets: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat voxel indices, r - p, F^T (r - p) and the values of the Gaussians, each [gaussians voxels ...].

    Values outside the mesh are 0.
    """
    nearest = places.round()
    at = nearest.long()[:, None] + offsets
    limit = torch.tensor(shape, device=at.device)
    inside = ((at >= 0) & (at < limit)).all(-1)
    at = at.clamp_min(0).minimum(limit - 1)
    index = (at[..., 0] * shape[1] + at[..., 1]) * shape[2] + at[..., 2]
    away = offsets + (nearest - places)[:, None]
    scaled = away @ factor
    return index, away, scaled, torch.exp(-0.5 * scaled.square().sum(-1)) * inside


def cubes(factor: Tensor, most: float) -> list[tuple[Tensor, Tensor]]:
    """Indices of Gaussians and the offsets [voxels 3] of their cubes, in groups of at most AT_ONCE voxels.

    A cube reaches REACH standard deviations from its centre, but at most `most` voxels.
    """
    # The largest standard deviation of each, over the axes.
    widest = torch.linalg.inv(factor).square().sum(1).sqrt().amax(1)
    sides, out = (REACH * widest).ceil().clamp(1, math.ceil(most)).int(), []
    for side in sides.unique().tolist():
        line = torch.arange(-side, side + 1, device=factor.device)
        offsets = torch.cartesian_prod(line, line, line)
        out += [(some, offsets) for some in (sides == side).nonzero()[:, 0].split(max(1, AT_ONCE // len(offsets)))]
    return out
