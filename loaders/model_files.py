"""Where a model's files are, once it has been found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from skvq.engine.errors import ModelError

KINDS = ("safetensors", "gguf")
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
"""What the name of a part of a GGUF file ends in, before its suffix."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """path: a folder with config.json and safetensors, or a GGUF file, or its first part; kind: ``safetensors`` or ``gguf``;
    rounded: whether matrices are to be rounded to 8 bits (``loaders.rounded``)."""

    path: Path
    kind: str
    rounded: bool = False

    def __post_init__(self) -> None:
        assert self.kind in KINDS


def local_files(path: Path) -> ModelFiles:
    """The files at a path: a GGUF file, or a folder. ModelError for anything else."""
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelFiles(path, "gguf")
        raise ModelError(f"{path} is not a model: give a folder with config.json and *.safetensors, or a .gguf file")
    if not path.is_dir():
        raise ModelError(f"{path} does not exist: give a folder with config.json and *.safetensors, or a .gguf file")
    ggufs = sorted(path.glob("*.gguf"))
    models = {PART.sub("", file.name) for file in ggufs}
    if (path / "config.json").is_file() and (not models or any(path.glob("*.safetensors*"))):
        return ModelFiles(path, "safetensors")
    if len(models) == 1:
        return ModelFiles(ggufs[0], "gguf")
    if ggufs:
        raise ModelError(f"{path} holds no safetensors and {len(models)} GGUF files: name one of them")
    raise ModelError(f"{path} holds no config.json and no GGUF file: copy the model's files into it")
