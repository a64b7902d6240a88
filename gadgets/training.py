"""What `slicediff train` is given: volumes, folders of volumes, and options from YAML and the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recon_core.train import TrainOptions

from .files import FileError
from .options import OptionsError, error_sentence, read_yaml

VOLUMES = (".nii.gz", ".nii", ".npy")


def find_volumes(paths: Iterable[Path]) -> list[Path]:
    """The volume files among files and folders, in order.

    Raises:
        FileError: for a path that does not exist or a folder without volumes.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise FileError(f"no such volume or folder: {path}")
        inside = sorted(p for p in path.iterdir() if p.name.endswith(VOLUMES)) if path.is_dir() else [path]
        if not inside:
            raise FileError(f"the folder {path} holds no volume ({', '.join(VOLUMES)})")
        found += inside
    return found


def make_train_options(config: Path | None, given: Mapping[str, Any]) -> TrainOptions:
    """Training options from a YAML file, overruled by what was given by hand.

    Raises:
        OptionsError: naming the option, what was expected and what came.
    """
    merged = {**(read_yaml(config) if config else {}), **given}
    try:
        return TrainOptions.model_validate(merged)
    except ValidationError as error:
        raise OptionsError(error_sentence(error, TrainOptions.model_fields)) from None
