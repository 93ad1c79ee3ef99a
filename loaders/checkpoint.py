"""Weights in safetensors files, one or many shards, read through memory maps: a tensor is a view of the page cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig
from skvq.loaders.fields import read_json, reason
from skvq.loaders.hf import read_config
from skvq.loaders.names import EMBEDDING, HEAD, canonical_names, check_shapes, expected_shapes, stacks
from skvq.loaders.quantized.choose import scheme_in
from skvq.loaders.quantized.matrices import QuantizedMatrices
from skvq.loaders.quantized.scheme import WHOLE_TYPES
from skvq.loaders.rows import INTERLEAVED, stored_rows
from skvq.loaders.source import QuantizedBlocks, fingerprint_of, first_bytes, unknown_weight

CODES = (".qweight", ".weight_packed")
"""Ends of names of quantized matrices."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_NAMES = ("gptq_model*.safetensors", "weights*.safetensors")
"""How AutoGPTQ and early versions of MLX call theirs."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies: an open shard, and what its header says of it."""

    shard: Any
    file: str
    name: str
    shape: tuple[int, ...]
    kind: str
    first_row: int = 0  # of it in the tensor, where that holds several weights


class SafetensorsSource:
    """A folder with config.json and ``model.safetensors`` or the shards of ``model.safetensors.index.json``.

    Opening reads headers and a 4 KiB sample of each tensor; of a head beside a tied embedding, all. It raises ModelError, one
    line, for a missing or truncated file, a bad header, a tensor in two shards or in none, a wrong shape or type. Matrices may
    be quantized (``quantized``).
    """

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        self.where = str(root)
        config = read_config(root)
        self._entries = _apart(_canonical(_open_shards(root)), config)
        self.config = self._with_own_head(config)
        self._shapes, found = expected_shapes(self.config), {name: entry.shape for name, entry in self._entries.items()}
        scheme = scheme_in(root)
        self._quantized: QuantizedMatrices | None = None
        if scheme is not None:
            self._quantized = QuantizedMatrices(scheme, self._shapes, self._entries, self._tensor, self.where)
            found = self._quantized.whole()
        for name, entry in self._entries.items():
            if (name in self._shapes and self._quantized_of(name) is None) or (scheme is None and name.endswith(CODES)):
                self._require_whole(entry, name)
        check_shapes(found, self.config, self.where)
        self.fingerprint = fingerprint_of(self.config, self._samples())

    def read(self, name: str) -> torch.Tensor:
        """The weight in its stored type, a view of the memory map; a quantized one expanded."""
        quantized, order = self._quantized_of(name), self._order(name)
        found = self._tensor(name) if quantized is None else quantized.read(name)
        return found if order is None else found[torch.from_numpy(order)]

    def stored(self, name: str) -> tuple[str, int]:
        """Type and bytes of the weight, or of its blocks."""
        if (quantized := self._quantized_of(name)) is not None:
            return quantized.stored(name)
        tensor = self._tensor(name)  # a view: nothing is read
        return str(tensor.dtype), tensor.nbytes

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """A quantized matrix, if there are blocks that hold just that."""
        quantized, order = self._quantized_of(name), self._order(name)
        found = None if quantized is None else quantized.blocks(name)
        return found if found is None or order is None else replace(found, data=found.data[torch.from_numpy(order)])

    def expanded(self, name: str) -> str:
        """The scheme of a quantized matrix that no blocks hold."""
        quantized = self._quantized_of(name)
        return "" if quantized is None or quantized.scheme.kind else quantized.scheme.label

    def _order(self, name: str) -> NDArray[np.int64] | None:
        """Stored row of each canonical row, or None where they are the same."""
        return stored_rows(name, self.config, interleaved=self.config.family in INTERLEAVED)

    def _quantized_of(self, name: str) -> QuantizedMatrices | None:
        """What knows of the weight, if it is quantized."""
        if name not in self._shapes:
            raise unknown_weight(name, self.where)
        return self._quantized if self._quantized is not None and name in self._quantized.shapes else None

    def _tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, a view."""
        entry = self._entries[name]
        tensor = entry.shard.get_tensor(entry.name)
        if tensor.shape != entry.shape:
            tensor = tensor[entry.first_row : entry.first_row + entry.shape[0]]
        assert isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == entry.shape
        return tensor

    def _with_own_head(self, config: ModelConfig) -> ModelConfig:
        """The config, untied where the checkpoint has a head of other numbers than the embedding, as merged adapters may.

        Where it is tied it may lie under either name.
        """
        head = self._entries.get(HEAD)
        quantized = any(name.startswith(HEAD.removesuffix("weight")) and name != HEAD for name in self._entries)
        if config.tie_embeddings and quantized:
            return replace(config, tie_embeddings=False)
        if not config.tie_embeddings or head is None:
            return config
        embedding = self._entries.setdefault(EMBEDDING, head)
        same = (head.shape, head.kind) == (embedding.shape, embedding.kind)
        if same and torch.equal(self._tensor(HEAD), self._tensor(EMBEDDING)):
            return config
        return replace(config, tie_embeddings=False)

    def _require_whole(self, entry: _Entry, name: str) -> None:
        if entry.kind not in WHOLE_TYPES:
            raise ModelError(
                f"{entry.file}: {name} is stored as {entry.kind}, and config.json does not say how it is quantized "
                f"(quantization_config); otherwise this engine reads {', '.join(WHOLE_TYPES)}: use the 16-bit checkpoint"
            )

    def _samples(self) -> Iterator[tuple[str, tuple[int, ...], str, bytes]]:
        for weight in self._shapes:
            quantized = self._quantized_of(weight)
            for name in (weight,) if quantized is None else quantized.parts(weight):
                entry = self._entries[name]
                kind = entry.kind if quantized is None else f"{entry.kind} {quantized.scheme}"
                yield name, entry.shape, kind, first_bytes(self._tensor(name))


def _canonical(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """The same by canonical name."""
    return {ours: entries[name] for name, ours in canonical_names(entries).items()}


def _apart(entries: dict[str, _Entry], config: ModelConfig) -> dict[str, _Entry]:
    """The same with whole numbers that were stored one matrix above the other under the name of each matrix."""
    shapes, found = expected_shapes(config), dict(entries)
    for name, (shape, firsts) in stacks(shapes).items():
        entry = entries.get(name)
        if entry is None or entry.kind not in WHOLE_TYPES or entry.shape != shape or not firsts.keys().isdisjoint(entries):
            continue
        del found[name]
        found |= {part: replace(entry, shape=shapes[part], first_row=first) for part, first in firsts.items()}
    return found


def weight_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Shard file name -> names of the tensors that the index puts there; none for a single file: whatever it holds.

    Of both, the single file counts: an index is what saving in one file leaves of an earlier save in shards.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: ()}
    if (folder / INDEX).is_file():
        return _indexed_shards(folder / INDEX)
    others = [path.name for pattern in OTHER_NAMES for path in folder.glob(pattern)]
    if len(others) == 1:
        return {others[0]: ()}
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
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or Path(file).name != file
            or "\0" in file
            or len(file) > 200
        ):
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
            entries[name] = _Entry(shard, path.name, name, tuple(part.get_shape()), str(part.get_dtype()))
    except Exception as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ModelError(
            f"{path} ({size} bytes) is not a whole safetensors file ({reason(error)}): download it again"
        ) from error
    return entries
