"""A file of named tensors, complete or refused: safetensors, written in pieces, read through mmap, with a checksum at its end.

Layout: as safetensors says, 8 bytes of header length, a JSON header, the tensors one after another. The header's metadata
hold one JSON object under ``skvq.<kind>``. The last tensor, ``checksum``, is the BLAKE2b of the BLAKE2b of every 64 MiB of
all bytes before it, so that many cores can verify it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from skvq.engine.errors import SessionError
from skvq.loaders.files import atomic_file

BLOCK = 1 << 26
CHECKSUM = "checksum"
CHECKSUM_BYTES = 16
LONGEST_HEADER = 100_000_000
DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: ``pieces()`` yields parts that together are its elements in order, on any device."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def whole(name: str, tensor: Tensor) -> Entry:
    """A tensor written in one piece."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


@dataclass(frozen=True, slots=True)
class Container:
    """What a file holds; the tensors are views of its map and must not be written."""

    path: Path
    header: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def number(self, name: str, most: int) -> int:
        """What the header says of that name. Raises SessionError unless it is a whole number from 0 to ``most``."""
        found = self.header.get(name)
        if type(found) is not int or not 0 <= found <= most:
            told = str(found)[:40]
            raise SessionError(f"{self.path} is damaged: its {name} is {told}, not a number from 0 to {most:,}: start again")
        return found

    def expect(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor of that name. Raises SessionError unless it has this type and shape."""
        found = self.tensors.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != tuple(shape):
            what = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise SessionError(f"{self.path}: {name} is {what}, not {dtype} {tuple(shape)}: the file cannot be used here")
        return found


def write_container(path: Path, kind: str, header: Mapping[str, object], entries: Sequence[Entry]) -> None:
    """Write the file under a temporary name, then rename; a piece at a time is held in memory. Same content, same bytes."""
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)  # so that every tensor is aligned in the map
    checksum = whole(CHECKSUM, torch.zeros(CHECKSUM_BYTES, dtype=torch.uint8))
    table: dict[str, object] = {"__metadata__": {f"skvq.{kind}": json.dumps(header, sort_keys=True)}}
    end = 0
    for entry in [*ordered, checksum]:
        start, end = end, end + entry.nbytes
        table[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            _write_entry(file, entry)
        file.flush()
        # the map is closed with its last view: after Ctrl-C threads may still hold some
        file.write(_checksum(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))))


def _write_entry(file: BinaryIO, entry: Entry) -> None:
    count = 0
    for piece in entry.pieces():
        assert piece.dtype == entry.dtype, (entry.name, piece.dtype)
        flat = piece.detach().contiguous().cpu().reshape(-1)
        count += flat.numel() * entry.dtype.itemsize
        file.write(flat.view(torch.uint8).numpy().data)
    assert count == entry.nbytes, (entry.name, count, entry.nbytes)


def _checksum(data: memoryview) -> bytes:
    def digest(start: int) -> bytes:
        with data[start : start + BLOCK] as block:
            return hashlib.blake2b(block, digest_size=CHECKSUM_BYTES).digest()

    starts = range(0, len(data), BLOCK)
    try:
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(digest, starts))
    except RuntimeError:  # the interpreter is ending, and starts no more threads
        parts = list(map(digest, starts))
    return hashlib.blake2b(b"".join(parts), digest_size=CHECKSUM_BYTES).digest()


def open_container(path: Path, kind: str) -> Container:
    """Map a file and verify it. Raises SessionError if it is missing, cut short, changed, or of another kind."""
    data = _map(path, kind)
    header, table, start = _read_table(path, kind, data)
    if CHECKSUM not in table or _checksum(memoryview(data)[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise SessionError(f"{kind} {path} is corrupt, its checksum does not match: delete it and start again")
    return Container(path, header, {name: _view(data, start, e) for name, e in table.items()})


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """What the file says about itself, to be looked at before long work: whole, but not verified. Raises SessionError."""
    return _read_table(path, kind, _map(path, kind))[0]


def _map(path: Path, kind: str) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise SessionError(f"cannot read {kind} {path}: {reason}") from None


def _read_table(path: Path, kind: str, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Our header, the table of tensors, and where these begin; nothing is missing after them."""
    length = int.from_bytes(data[:8], "little")
    try:
        if not 2 <= length <= min(LONGEST_HEADER, len(data) - 8):
            raise ValueError
        table = json.loads(data[8 : 8 + length])
        told = table.pop("__metadata__", {}).get(f"skvq.{kind}")
        header = None if told is None else json.loads(told)
        for entry in table.values():
            first, last = entry["data_offsets"]
            numbers = (first, last, *entry["shape"])
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError
            if math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize != last - first:
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SessionError(f"{path} is not an skvq {kind}, or is damaged: give another file name") from None
    if not isinstance(header, dict):
        raise SessionError(f"{path} is a safetensors file, but no skvq {kind}, or is damaged: give another file name")
    size = 8 + length + max((int(e["data_offsets"][1]) for e in table.values()), default=0)
    if size != len(data):
        wrong = "is truncated" if len(data) < size else "goes on after its end"
        raise SessionError(f"{kind} {path} {wrong}, {len(data):,} bytes where it has {size:,}: delete it and start again")
    return header, table, 8 + length


def _view(data: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if first == last:
        return torch.empty(shape, dtype=dtype)
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + first).view(shape)
