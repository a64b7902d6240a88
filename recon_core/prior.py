"""The prior: a callable D(x, sigma) that denoises slices, and the folders it is loaded from.

Preconditioning follows Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models" (arXiv 2206.00364), table 1: the untrained network outputs zero, and D is then the exact
posterior mean of a Gaussian prior with standard deviation `sigma_data`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .neural_operator import TAP_MM, NeuralOperator, Voxel, smooth_noise
from .unet import UNet, round_weights

FORMAT = 1
WEIGHTS_DIR = Path(__file__).parent / "weights"
TRAINED_MM = (TAP_MM, TAP_MM)  # voxel size that priors in function space are trained on
ARCHITECTURES = {
    "small": partial(UNet, channels=(48, 96, 160), blocks=2, unshuffle=2),
    "base": partial(UNet, channels=(48, 96, 192, 192), blocks=3, unshuffle=1),
    "operator": NeuralOperator,
}


class PriorError(Exception):
    """Weights are missing or cannot be trusted; the message is one sentence for the user."""


class Prior(nn.Module):
    """Denoiser D(x, sigma) for complex slices whose typical tissue has magnitude 1 (see scale.py).

    sigma is the standard deviation of each of the real and imaginary parts. With `in_bf16` the network computes in
    bf16 where autocast allows: its output is scaled by sigma, so the rounding stays far below the noise.
    """

    def __init__(self, architecture: str = "small", sigma_data: float = 0.5, card: dict | None = None):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise PriorError(f"unknown architecture {architecture!r}; expected one of {sorted(ARCHITECTURES)}")
        self.architecture = architecture
        self.sigma_data = float(sigma_data)
        self.card = card or {}
        self.in_bf16 = False
        self.net = ARCHITECTURES[architecture]()

    @property
    def in_function_space(self) -> bool:
        """Whether it is told the voxel size, and removes only smooth noise (neural_operator.py)."""
        return isinstance(self.net, NeuralOperator)

    def unit_noise(self, white: Tensor, voxel_mm: Voxel = TRAINED_MM) -> Tensor:
        """The noise that it removes, from white noise [... h w] on voxels of `voxel_mm` (h, w).

        Unchanged unless in function space.
        """
        return smooth_noise(white, voxel_mm) if self.in_function_space else white

    def forward(self, x: Tensor, sigma: Tensor | float, voxel_mm: Voxel = TRAINED_MM) -> Tensor:
        """Denoise x [slices 2 h w] at noise level sigma, a number or [slices]; returns the same shape.

        Args:
            voxel_mm: voxel size along h and w; used in function space only.

        Raises:
            ValueError: if x is not finite. Not checked in training, where it would stall a GPU at every step and the
                loss shows it anyway.
        """
        if not self.training and not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
            raise ValueError("the slices given to the prior hold NaN or infinity")
        if torch.is_tensor(sigma):
            sigma = sigma.to(x.device, torch.float32).expand(x.shape[0])
        else:
            sigma = torch.full(x.shape[:1], sigma, dtype=torch.float32, device=x.device)
        s = sigma[:, None, None, None]
        total = torch.sqrt(s**2 + self.sigma_data**2)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bf16):
            voxel = (voxel_mm,) if self.in_function_space else ()
            out = self.net(x / total, torch.log(sigma) / 4, *voxel)
        return x * (self.sigma_data / total) ** 2 + out.float() * (s * self.sigma_data / total)


def move_weights(network: nn.Module, towards: nn.Module, share: float) -> None:
    """Move the weights of `network`, in place, `share` of the way to those of `towards`, of the same architecture."""
    with torch.no_grad():
        torch._foreach_lerp_(list(network.parameters()), list(towards.parameters()), share)


def half_is_faster(device: str | torch.device) -> bool:
    """Whether the device multiplies bf16 natively: GPUs from Ampere onwards, CPUs with AVX512-BF16 or AMX."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def save_prior(prior: Prior, path: str | Path, card: dict) -> None:
    """Write fp16 weights to `path` (.safetensors) and the model card beside it (.json) with its sha256."""
    path = Path(path)
    tensors = {name: t.detach().half().contiguous() for name, t in prior.state_dict().items()}
    weights = save(tensors)
    card = {
        **card,
        "format": FORMAT,
        "architecture": prior.architecture,
        "sigma_data": prior.sigma_data,
        "parameters": sum(t.numel() for t in tensors.values()),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    # both are complete before either replaces the old file
    with replaced(path) as new, replaced(path.with_suffix(".json")) as new_card:
        new.write_bytes(weights)
        new_card.write_text(json.dumps(card, indent=2) + "\n")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when written.

    A reader finds a complete file at any time, even after a kill.
    """
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def load_prior(
    name_or_path: str | Path = "small", device: str | torch.device = "cpu", half: bool | None = None
) -> Prior:
    """Load a prior by name (see prior_folders), or by the path of its .safetensors file.

    Args:
        half: whether the network computes in bf16; by default where that is faster.

    Raises:
        PriorError: if weights or card are missing, damaged, or have a different format version.
    """
    path = find_weights(name_or_path)
    card = read_card(path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.get("sha256"):
        raise PriorError(
            f"{path} does not match the sha256 in its model card (truncated or changed?); install it again"
        )
    prior = Prior(card["architecture"], card["sigma_data"], card)
    try:
        prior.load_state_dict({name: t.float() for name, t in load(data).items()})
    except (SafetensorError, RuntimeError) as error:
        raise PriorError(f"{path} does not hold the network its card describes: {error}") from error
    prior.in_bf16 = half_is_faster(device) if half is None else half
    prior = prior.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if prior.in_bf16:
        round_weights(prior.net)
    return prior


def prior_folders() -> list[Path]:
    """Where weights are looked up by name: the folders in SLICEDIFF_PRIORS (a site's own), then those shipped here."""
    own = [Path(p) for p in os.environ.get("SLICEDIFF_PRIORS", "").split(os.pathsep) if p]
    return [*own, WEIGHTS_DIR]


def find_weights(name_or_path: str | Path) -> Path:
    """Path of the .safetensors file for a name or a path; if there is none, PriorError lists the known names."""
    named = [folder / f"{name_or_path}.safetensors" for folder in prior_folders()]
    path = next((p for p in named if p.is_file()), Path(name_or_path))
    if path.suffix != ".safetensors" or not path.is_file():  # a name alone never means a file of the working directory
        names = ", ".join(dict.fromkeys(p.stem for p in _all_weights())) or "none"
        raise PriorError(
            f"no prior {str(name_or_path)!r}: neither a known name (known: {names}) nor a .safetensors file"
        )
    return path


def _all_weights() -> list[Path]:
    return [p for folder in prior_folders() for p in sorted(folder.glob("*.safetensors"))]


def read_card(weights: Path) -> dict:
    """Model card of a weights file; PriorError if it is missing, unreadable or of another format."""
    try:
        card = json.loads(weights.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise PriorError(f"no readable model card beside {weights}: {error}") from error
    if not isinstance(card, dict):
        raise PriorError(f"the model card beside {weights} should be a JSON object, it is {type(card).__name__}")
    if card.get("format") != FORMAT:
        raise PriorError(f"{weights} has format {card.get('format')}, this version reads format {FORMAT}")
    missing = [name for name in ("architecture", "sigma_data", "parameters", "sha256") if name not in card]
    if missing:
        raise PriorError(f"the model card beside {weights} lacks {', '.join(missing)}")
    return card


def list_priors() -> list[dict]:
    """Cards of all priors known by name, with that name; the first folder that has a name wins.

    Without a usable card, `error` says why.
    """
    first = {path.stem: path for path in reversed(_all_weights())}
    return [{"name": name, **_card_or_error(first[name])} for name in sorted(first)]


def _card_or_error(weights: Path) -> dict:
    try:
        return read_card(weights)
    except PriorError as error:
        return {"error": str(error)}
