"""Weights in safetensors files, one or many shards, read through memory maps: a tensor is a view of the page cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from skvq.engine.config import ModelConfig
from skvq.engine.errors import ModelError
from skvq.loaders.fields import read_json, reason
from skvq.loaders.hf import read_config
from skvq.loaders.int4 import KIND, Int4Matrices, int4_format
from skvq.loaders.names import check_shapes, expected_shapes
from skvq.loaders.source import QuantizedBlocks, fingerprint_of, first_bytes, unknown_weight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_TYPES = ("F32", "F16", "BF16")
INT4_TYPES = ("I32",)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies: an open shard, and what its header says of it."""

    shard: Any
    file: str
    shape: tuple[int, ...]
    kind: str


class SafetensorsSource:
    """A folder with config.json and ``model.safetensors`` or the shards of ``model.safetensors.index.json``.

    Opening reads headers and a 4 KiB sample of each tensor. It raises ModelError, one line, for a missing or truncated
    file, a bad header, a tensor in two shards or in none, a wrong shape, and a type that is not F32, F16 or BF16. Matrices of
    4 bits (``int4``) are given out as blocks.
    """

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        self._where = str(root)
        self._config = read_config(root)
        self._entries = _open_shards(root)
        self._shapes, found = expected_shapes(self._config), {name: entry.shape for name, entry in self._entries.items()}
        form = int4_format(read_json(root / "config.json"))
        self._int4 = None if form is None else Int4Matrices(form, self._shapes, found, self._where)
        check_shapes(found if self._int4 is None else self._int4.whole(), self._config, self._where)
        for name in self._shapes:
            codes, *others = [name] if (int4 := self._int4_of(name)) is None else int4.parts(name)
            self._check_types(codes, STORED_TYPES if int4 is None else INT4_TYPES)
            for part, types in zip(others, (STORED_TYPES, INT4_TYPES), strict=False):
                self._check_types(part, types)
        if self._int4 is not None:
            self._int4.check(self._tensor)
        self._fingerprint = fingerprint_of(self._config, self._samples())

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._config

    @property
    def where(self) -> str:
        """The folder."""
        return self._where

    @property
    def fingerprint(self) -> str:
        """Hex digest of config and sampled weights."""
        return self._fingerprint

    def read(self, name: str) -> torch.Tensor:
        """The weight in its stored type, a view of the memory map; one of 4 bits expanded to float32."""
        int4 = self._int4_of(name)
        return self._tensor(name) if int4 is None else int4.read(name, self._tensor)

    def stored(self, name: str) -> tuple[str, int]:
        """Type and bytes of the weight, or of its blocks."""
        if (int4 := self._int4_of(name)) is not None:
            return KIND, int4.nbytes(name)
        tensor = self.read(name)  # a view: nothing is read
        return str(tensor.dtype), tensor.nbytes

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """A matrix of 4 bits as blocks, or None: others are whole numbers of values."""
        int4 = self._int4_of(name)
        return None if int4 is None else int4.blocks(name, self._tensor)

    def _int4_of(self, name: str) -> Int4Matrices | None:
        """What knows of the weight, if it is of 4 bits."""
        if name not in self._shapes:
            raise unknown_weight(name, self._where)
        return self._int4 if self._int4 is not None and name in self._int4.shapes else None

    def _tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, a view."""
        entry = self._entries[name]
        tensor = entry.shard.get_tensor(name)
        assert isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == entry.shape
        return tensor

    def _check_types(self, name: str, types: tuple[str, ...]) -> None:
        entry = self._entries[name]
        if entry.kind not in types:
            known = ", ".join(types)
            raise ModelError(
                f"{entry.file}: {name} is stored as {entry.kind}, this engine reads {known}: use the 16-bit checkpoint"
            )

    def _samples(self) -> Iterator[tuple[str, tuple[int, ...], str, bytes]]:
        for weight in self._shapes:
            for name in (weight,) if (int4 := self._int4_of(weight)) is None else int4.parts(weight):
                entry = self._entries[name]
                yield name, entry.shape, f"{entry.kind}{'' if int4 is None else int4.name}", first_bytes(self._tensor(name))


def weight_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Shard file name -> names of the tensors that the index puts there; none for a single file: whatever it holds."""
    if (folder / INDEX).is_file():
        return _indexed_shards(folder / INDEX)
    if (folder / SINGLE).is_file():
        return {SINGLE: ()}
    pickled = sorted(folder.glob("pytorch_model*.bin")) + sorted(folder.glob("*.pth"))
    hint = (
        f"{pickled[0].name} is a pickle, which this engine never opens: convert it to safetensors"
        if pickled
        else "download the model's *.safetensors files into it"
    )
    raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}: {hint}")


def _indexed_shards(index: Path) -> dict[str, tuple[str, ...]]:
    weight_map = read_json(index).section("weight_map").data
    if not weight_map:
        raise ModelError(f"{index}: weight_map is missing or empty: download the index again")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise ModelError(f"{index}: {name} is in {str(file)[:80]!r}, which is not a safetensors file in this folder")
        shards.setdefault(file, []).append(name)
    missing = [file for file in shards if not (index.parent / file).is_file()]
    if missing:
        raise ModelError(f"{index.parent}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}")
    return {file: tuple(names) for file, names in shards.items()}


def _open_shards(folder: Path) -> dict[str, _Entry]:
    """All tensors of all shards. ModelError if one lies in two shards, or not where the index puts it."""
    entries: dict[str, _Entry] = {}
    for file, promised in weight_files(folder).items():
        found = _open_shard(folder / file)
        twice = [name for name in found if name in entries]
        if twice:
            raise ModelError(
                f"{folder}: {len(twice)} tensors are in two shards, e.g. {twice[0]} in {entries[twice[0]].file} "
                f"and {file}: remove shards left from another download"
            )
        lost = [name for name in promised if name not in found]
        if lost:
            raise ModelError(f"{folder / file}: {len(lost)} tensors that the index places here are missing, e.g. {lost[0]}")
        entries |= found
    return entries


def _open_shard(path: Path) -> dict[str, _Entry]:
    """Map one file. The safetensors library checks its header: offsets cover the file exactly, without overlap."""
    try:
        shard: Any = safe_open(path, framework="pt")
        entries = {}
        for name in shard.keys():  # noqa: SIM118
            part = shard.get_slice(name)
            entries[name] = _Entry(shard, path.name, tuple(part.get_shape()), str(part.get_dtype()))
    except Exception as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ModelError(
            f"{path} ({size} bytes) is not a whole safetensors file ({reason(error)}): download it again"
        ) from error
    return entries
