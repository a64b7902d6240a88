"""The network inside the prior: a small convolutional U-Net, local and independent of the matrix size.

It deliberately has no normalisation layers: statistics over a slice would depend on how much air it
contains, so a network trained on crops would behave differently on full slices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoiseLevel(nn.Sequential):
    """Embeds noise levels [slices] as features [slices features], in fp32 even inside autocast."""

    def __init__(self, features: int):
        super().__init__(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())
        self.features = features

    def forward(self, noise_level: Tensor) -> Tensor:
        with torch.autocast(noise_level.device.type, enabled=False):
            freqs = torch.exp(
                torch.linspace(math.log(0.5), math.log(50.0), self.features // 2, device=noise_level.device)
            )
            phase = noise_level[:, None].float() * freqs
            return super().forward(torch.cat([phase.cos(), phase.sin()], dim=1))


class Block(nn.Module):
    """Residual block whose inner features are scaled and shifted by the noise-level embedding."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        for layer in (self.film, self.conv2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(x))
        h = torch.addcmul(shift, h, 1 + scale)
        return x + self.conv2(F.silu(h))


class Level(nn.ModuleList):
    """Blocks at one resolution, applied in turn."""

    def __init__(self, blocks: int, channels: int, embedding: int):
        super().__init__(Block(channels, embedding) for _ in range(blocks))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self:
            x = block(x, emb)
        return x


class UNet(nn.Module):
    """U-Net behind a pixel-unshuffle by `unshuffle`; the untrained output is zero.

    Args:
        channels: features per level, finest first.
        blocks: residual blocks per level and direction.
        unshuffle: side of the pixel block folded into channels at the input (1: none).
        io_channels: real channels of a slice (2: real and imaginary part).
        embedding: features of the noise-level embedding.
    """

    def __init__(self, channels=(48, 96, 160), blocks=2, unshuffle=2, io_channels=2, embedding=128):
        super().__init__()
        self.unshuffle = unshuffle
        self.multiple = unshuffle * 2 ** (len(channels) - 1)
        folded = io_channels * unshuffle**2
        pairs = list(zip(channels[:-1], channels[1:]))
        self.embed = NoiseLevel(embedding)
        self.head = nn.Conv2d(folded, channels[0], 3, padding=1)
        self.down = nn.ModuleList(Level(blocks, c, embedding) for c in channels[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.middle = Level(blocks, channels[-1], embedding)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(Level(blocks, c, embedding) for c in channels[:-1])
        self.tail = nn.Conv2d(channels[0], folded, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        """Map x [slices io h w], of any h and w, and noise_level [slices] to [slices io h w]."""
        height, width = x.shape[-2:]
        pad = (0, -width % self.multiple, 0, -height % self.multiple)
        if any(pad):
            x = F.pad(x, pad, mode="replicate")
        emb = self.embed(noise_level)
        h = self.head(F.pixel_unshuffle(x, self.unshuffle))
        skips = []
        for level, shrink in zip(self.down, self.shrink):
            h = level(h, emb)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h, emb)
        for level, grow, skip in reversed(list(zip(self.up, self.grow, skips))):
            h = level(grow(h) + skip, emb)
        return F.pixel_shuffle(self.tail(F.silu(h)), self.unshuffle)[..., :height, :width]


def round_weights(network: nn.Module) -> None:
    """Store in bf16 the weights that autocast rounds to it anyway.

    Without gradients it would round them again for every batch.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) or name.endswith("film"):
            layer.to(torch.bfloat16)
