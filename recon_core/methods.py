"""Every reconstruction method behind one interface: (measurement, prior, start, config, seed) -> states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .adaptation import AdaptedConfig, reconstruct_adapted
from .cg_sense import STRENGTH_AS_IMAGE, cg_sense
from .faithful import FaithfulConfig, reconstruct_faithful
from .gaussians import Gaussians
from .measurement import Measurement
from .neural_field import NeuralField
from .plug_and_play import PlugAndPlayConfig, reconstruct_plug_and_play
from .posterior import PosteriorConfig, reconstruct_posterior
from .prior import Prior, PriorError
from .slices import Denoiser
from .state import State
from .total_variation import TotalVariationConfig, reconstruct_total_variation
from .wavelet import WaveletConfig, reconstruct_wavelet


@dataclass(frozen=True)
class Method:
    """`title` is for people; `run` yields States from the measurement, prior (None if unused) and CG-SENSE image.

    `prior` names the prior that suits the method, "" if it uses none: `small` was also trained on the states of
    `diffusion`; `small-white`, trained on white noise alone, is the one to sample with. `gpu_prior` names the one to
    use instead on a GPU, where a larger network costs only seconds. `function_space`: whether the prior must, may or
    cannot be one in function space. `anytime`: every state is usable, not just the last.
    """

    title: str
    run: Callable[[Measurement, Denoiser | None, Tensor, Any, int], Iterator[State]]
    config: Any = None
    prior: str = ""
    gpu_prior: str = ""
    function_space: Literal["must", "may", "cannot"] = "cannot"
    iterative: bool = True
    anytime: bool = True

    @property
    def uses_prior(self) -> bool:
        """Whether the method needs a prior."""
        return bool(self.prior)

    def suitable_prior(self, device: str | torch.device) -> str:
        """Name of the prior that suits the method on this device."""
        return self.gpu_prior if self.gpu_prior and torch.device(device).type == "cuda" else self.prior

    def check(self, prior: Prior) -> None:
        """Raise PriorError if the prior is in function space and the method cannot use it, or the other way round."""
        if prior.in_function_space and self.function_space == "cannot":
            raise PriorError(
                f"a prior in function space does not fit {self.title}; "
                "use it with the method operator, or take another prior"
            )
        if self.function_space == "must" and not prior.in_function_space:
            raise PriorError(f"{self.title}, needs one; leave prior at auto, or use this one with the method faithful")


def _zero_filled(measurement: Measurement, prior: None, start: Tensor, config: None, seed: int) -> Iterator[State]:
    yield State(1, 1, 0.0, measurement.adjoint, 0)


def _cg_sense(measurement: Measurement, prior: None, start: Tensor, config: None, seed: int) -> Iterator[State]:
    yield State(1, 1, 0.0, cg_sense(measurement, strength=STRENGTH_AS_IMAGE), 0)


_published = partial(Method, run=reconstruct_faithful, prior="small-white", function_space="may")
_sampled = partial(Method, run=reconstruct_posterior, prior="small-white", anytime=False)

METHODS = {
    "diffusion": Method("slice diffusion", reconstruct_adapted, AdaptedConfig(), "small", gpu_prior="base"),
    "faithful": _published("slice diffusion as published", config=FaithfulConfig()),
    "interpolated": _published(
        "slice diffusion as published, prior on 2 mm", config=FaithfulConfig(prior_voxel_mm=2.0)
    ),
    "field": _published(
        "slice diffusion as published, neural field",
        config=FaithfulConfig(iterations=400, slabs=5, patience=100, representation=NeuralField),
    ),
    "gaussians": _published("slice diffusion as published, Gaussians", config=FaithfulConfig(representation=Gaussians)),
    "operator": _published(
        "slice diffusion as published, prior in function space",
        config=FaithfulConfig(),
        prior="operator",
        function_space="must",
    ),
    "dds": _sampled("posterior sampling DDS", config=PosteriorConfig(axis=2)),
    "tpdm": _sampled("posterior sampling TPDM", config=PosteriorConfig()),
    "mbir": _sampled("posterior sampling DiffusionMBIR", config=PosteriorConfig(axis=0, tv=0.02)),
    "pnp": Method("plug-and-play ADMM", reconstruct_plug_and_play, PlugAndPlayConfig(), "small"),
    "wavelet": Method("l1-wavelet", reconstruct_wavelet, WaveletConfig()),
    "tv": Method("total variation", reconstruct_total_variation, TotalVariationConfig()),
    "cg": Method("CG-SENSE", _cg_sense, iterative=False),
    "zero-filled": Method("zero-filled", _zero_filled, iterative=False),
}
