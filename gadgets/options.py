"""All options of the plugin: one frozen, validated object, whatever their source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .orientation import parse_orientation

PRESETS_DIR = Path(__file__).parent / "presets"
DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
PRIOR_NAME = re.compile(r"[^/\0]{1,100}(?<!\.safetensors)")
ForComparison = Literal["faithful", "interpolated", "field", "gaussians", "operator", "dds", "tpdm", "mbir", "pnp"]
Method = Literal["diffusion", ForComparison, "wavelet", "tv", "cg", "zero-filled"]
*USUAL, LAST = (name for name in get_args(Method) if name not in get_args(ForComparison))  # for the description


class OptionsError(ValueError):
    """An invalid option name or value; the message is one sentence for the user."""


class Options(BaseModel):
    """Options of a reconstruction; the descriptions appear in the README's table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field(
        "diffusion",
        description=f"the image to compute: {', '.join(USUAL)} or {LAST}; "
        f"for comparison: {', '.join(get_args(ForComparison))}",
    )
    prior: str = Field(
        "auto",
        description="name of a prior (see `slicediff priors`) or, on the command line, path of a .safetensors file; "
        "auto picks the one that suits method and device",
    )
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, or cuda:1 for the second GPU")
    preview: bool = Field(True, description="send the CG-SENSE image first, as a separate series")
    coils: int = Field(12, ge=1, le=128, description="maximum number of virtual coils after coil compression")
    sweeps: int = Field(
        12,
        ge=1,
        le=1000,
        description="passes over the volume; more is better but slower "
        "(diffusion only, other methods have their own settings)",
    )
    sigma_max: float = Field(
        0.3, ge=1e-4, le=2, description="noise level of the prior in the first sweep, relative to tissue brightness"
    )
    sigma_min: float = Field(
        0.02,
        ge=1e-4,
        le=2,
        description="noise level of the prior in the last sweep; never below half the noise of the data",
    )
    prior_weight: float = Field(
        0.7, gt=0, le=100, description="strength of the prior relative to the data; needs no tuning per protocol"
    )
    slice_fraction: float = Field(1.0, gt=0, le=1, description="fraction of the slices that is denoised in each sweep")
    adapt: int = Field(
        20,
        ge=0,
        le=1000,
        description="rounds of learning from the scan's own lines, for single planes and thin slabs; 0 turns it off",
    )
    error_map: bool = Field(
        False,
        description="also send an estimate of the (complex) error of each voxel, as series 3; "
        "adds nearly three times the time of the image itself (five times for methods other than diffusion)",
    )
    deadline_s: float | None = Field(
        None, gt=0, description="stop the solver after this many seconds and send the latest image"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of the random slices and poses")
    output: Literal["uint16", "float32", "complex64"] = Field(
        "uint16", description="pixel type: uint16 (12-bit range), float32 or complex64"
    )
    orientation: str = Field(
        "acquired", description="pixel order: acquired, or any of transpose, flip_x, flip_y, flip_z joined by +"
    )
    layout: Literal["volume", "partitions"] = Field(
        "volume", description="volume (one 3D image) or partitions (one 2D image per partition)"
    )

    @field_validator("device")
    @classmethod
    def _device_is_one(cls, text: str) -> str:
        if not DEVICE.fullmatch(text):
            raise ValueError("expected auto, cpu, cuda, or cuda:N for GPU number N")
        return text

    @field_validator("orientation")
    @classmethod
    def _orientation_exists(cls, text: str) -> str:
        parse_orientation(text)
        return text

    @model_validator(mode="after")
    def _noise_levels_fall(self) -> Options:
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must not exceed sigma_max {self.sigma_max:g}")
        return self


def make_options(*sources: Mapping[str, Any]) -> Options:
    """Options from mappings, later ones taking precedence; values may be text (XML properties) or typed.

    A key `preset` in any source is loaded first.

    Raises:
        OptionsError: naming the option, what was expected and what was given.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merged.update(source)
    preset = merged.pop("preset", None)
    if preset is not None:
        loaded = read_preset(str(preset))
        if "preset" in loaded:
            raise OptionsError(f"the preset {preset} names another one ({loaded['preset']}): write its options out")
        merged = {**loaded, **merged}
    merged = {key: _none_if_empty(value) if key in MAY_BE_NONE else value for key, value in merged.items()}
    try:
        return Options.model_validate(merged)
    except ValidationError as error:
        raise OptionsError(error_sentence(error, [*Options.model_fields, "preset"])) from None


def from_a_peer(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options; OptionsError if they name a file.

    Whoever can connect must not have the server read any file it can.
    """
    preset, prior = str(options.get("preset", "default")), str(options.get("prior", "auto"))
    if preset not in preset_names():
        raise OptionsError(
            f"no preset {preset[:100]!r}: shipped are {', '.join(preset_names())}; "
            "a file of options is taken from the command line of the server only"
        )
    if not PRIOR_NAME.fullmatch(prior):
        raise OptionsError(
            f"a scan may ask for a prior by its name only, got {prior[:100]!r}: "
            "put the file in a prior folder of the server (SLICEDIFF_PRIORS) and give its name"
        )
    return dict(options)


def read_preset(name_or_path: str) -> dict[str, Any]:
    """Options of a shipped preset or of a YAML file; if there is none, OptionsError lists the shipped ones."""
    shipped = PRESETS_DIR / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        shipped_names = ", ".join(preset_names())
        raise OptionsError(f"no preset {name_or_path!r}: shipped are {shipped_names}, or give the path of a YAML file")
    return read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Contents of a YAML file of option: value; OptionsError if it is anything else."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionsError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise OptionsError(f"{path} must be a mapping of option: value, found {type(content).__name__}")
    return content


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(p.stem for p in PRESETS_DIR.glob("*.yaml"))


def options_from_json(text: str) -> tuple[dict[str, Any], list[str]]:
    """A peer's options from a FIRE/OpenRecon parameter message, and the other names in it, which are the host's own.

    The message is {"parameters": {name: value}}.
    """
    try:
        parameters = json.loads(text).get("parameters") or {}
        others = sorted(set(parameters) - set(Options.model_fields) - {"preset"})
        found = {key: value for key, value in parameters.items() if key not in others}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise OptionsError('the parameter text is not a JSON object {"parameters": {name: value}}') from None
    return from_a_peer(found), others


MAY_BE_NONE = [name for name, field in Options.model_fields.items() if field.default is None]


def _none_if_empty(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none") else value


def error_sentence(error: ValidationError, known: Iterable[str]) -> str:
    """The first error, with the option's name and the value given; `known` are the valid names."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown option {name!r}; known are {', '.join(sorted(known))}"
    message = first["msg"].removeprefix("Value error, ")
    return f"option {name!r}: {message}, got {first['input']!r}" if name else f"options: {message}"
