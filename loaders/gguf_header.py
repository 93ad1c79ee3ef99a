"""GGUF headers: metadata and the table of tensors, every count checked against the file before anything is built.

Own code, because `gguf.GGUFReader` trusts the counts of the file: a corrupt array length makes it loop forever.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skvq.engine.errors import ModelError
from skvq.loaders.fields import shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FLOAT32, STRING, ARRAY = 6, 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
MAX_DEPTH = 4
MAX_DIMS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One row of the table. shape: outermost first, as in torch; offset: bytes from the start of the data section."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Metadata as Python values and the tensors by name.

    Arrays of numbers are numpy arrays, arrays of strings lists. A float32 becomes the shortest decimal that rounds to
    it: the file's 9.999999747378752e-06 is the config's 1e-05.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    data_start: int
    alignment: int


class _Cursor:
    """A reading position in the mapped file that refuses to go past its end."""

    def __init__(self, data: NDArray[np.uint8], where: str) -> None:
        self.data = data
        self.view = data.data
        self.where = where
        self.position = 0

    def take(self, count: int, what: str) -> NDArray[np.uint8]:
        start = self.skip(count, what)
        return self.data[start : start + count]

    def skip(self, count: int, what: str) -> int:
        """Where the next ``count`` bytes begin."""
        left = len(self.view) - self.position
        if count > left:
            raise ModelError(
                f"{self.where} is truncated or corrupt: {what} at byte {self.position} needs {count} bytes, "
                f"{left} are left: download it again"
            )
        start, self.position = self.position, self.position + count
        return start

    def number(self, code: str, what: str) -> int:
        value = struct.unpack_from(code, self.view, self.skip(struct.calcsize(code), what))[0]
        return int(value)

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        start = self.skip(length, what)
        return str(self.view[start : start + length], "utf-8", "replace")

    def count(self, smallest: int, what: str) -> int:
        """A number of items that each take at least ``smallest`` bytes."""
        value = self.number("<Q", f"the number of {what}")
        left = len(self.data) - self.position
        if value * smallest > left:
            raise ModelError(
                f"{self.where} is corrupt: it claims {value} {what}, which do not fit "
                f"into the {left} bytes left: download it again"
            )
        return value


def read_header(data: NDArray[np.uint8], where: str) -> GgufHeader:
    """Parse the header of a mapped file. ModelError, one line, for everything that is not a whole GGUF header."""
    cursor = _Cursor(data, where)
    if cursor.take(4, "the magic").tobytes() != MAGIC:
        raise ModelError(f"{where} is not a GGUF file: it begins with {data[:4].tobytes()!r}, not {MAGIC!r}")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        hint = "it is big-endian" if version & 0xFFFF == 0 else f"known: {', '.join(map(str, VERSIONS))}"
        raise ModelError(f"{where}: GGUF version {version} is not supported ({hint})")
    tensor_count = cursor.count(24, "tensors")
    metadata = _mapping(cursor, cursor.count(13, "metadata keys"), _metadata_item, "metadata key")
    tensors = _mapping(cursor, tensor_count, _tensor_item, "tensor")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ModelError(f"{where}: general.alignment must be a power of two, got {shorten(repr(alignment))}")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(metadata=metadata, tensors=tensors, data_start=start, alignment=alignment)


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file as a read-only array of bytes. ModelError if it cannot be opened or is empty."""
    try:
        if not path.stat().st_size:
            raise ModelError(f"{path} is empty: download it again")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be opened: {error}") from error


def check_extents(header: GgufHeader, nbytes: Mapping[str, int], size: int, where: str) -> None:
    """Raise ModelError unless the tensors, of ``nbytes`` each, lie one behind another inside a file of ``size`` bytes."""
    expected = 0
    for name in sorted(nbytes, key=lambda name: (header.tensors[name].offset, nbytes[name])):
        offset = header.tensors[name].offset
        end = header.data_start + offset + nbytes[name]
        if end > size:
            raise ModelError(f"{where} is truncated: {name} ends at byte {end}, the file has {size}: download it again")
        if offset != expected:
            raise ModelError(f"{where} is corrupt: {name} is at byte {offset} of the data, not {expected}: download it again")
        expected = -(-(offset + nbytes[name]) // header.alignment) * header.alignment


def _mapping(cursor: _Cursor, count: int, item: Callable[[_Cursor, str], Any], what: str) -> dict[str, Any]:
    """``count`` named items. ModelError for a name that occurs twice."""
    found: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string(f"a {what}")
        if name in found:
            raise ModelError(f"{cursor.where} is corrupt: {what} {shorten(name)!r} occurs twice")
        found[name] = item(cursor, name)
    return found


def _metadata_item(cursor: _Cursor, name: str) -> Any:
    return _value(cursor, cursor.number("<I", "a type"), shorten(name), 0)


def _value(cursor: _Cursor, kind: int, name: str, depth: int) -> Any:
    if kind in SCALARS:
        dtype = np.dtype(SCALARS[kind])
        value = cursor.take(dtype.itemsize, name).view(dtype)[0]
        return float(str(value)) if kind == FLOAT32 else value.item()
    if kind == STRING:
        return cursor.string(name)
    if kind != ARRAY or depth == MAX_DEPTH:
        raise ModelError(f"{cursor.where} is corrupt: {name} has the unknown type {kind} at depth {depth}")
    inner = cursor.number("<I", "an array type")
    if inner in SCALARS:
        dtype = np.dtype(SCALARS[inner])
        return cursor.take(cursor.count(dtype.itemsize, f"values of {name}") * dtype.itemsize, name).view(dtype)
    count = cursor.count(8 if inner == STRING else 12, f"values of {name}")
    if inner == STRING:
        return [cursor.string(name) for _ in range(count)]
    return [_value(cursor, inner, name, depth + 1) for _ in range(count)]


def _tensor_item(cursor: _Cursor, name: str) -> TensorEntry:
    what = f"the table entry of {shorten(name)}"
    dims = cursor.number("<I", what)
    if not 1 <= dims <= MAX_DIMS:
        raise ModelError(f"{cursor.where} is corrupt: {shorten(name)} has {dims} dimensions")
    shape = tuple(cursor.number("<Q", what) for _ in range(dims))[::-1]
    kind, offset = cursor.number("<I", what), cursor.number("<Q", what)
    if prod(shape) >= 1 << 62 or 0 in shape:
        raise ModelError(f"{cursor.where} is corrupt: {shorten(name)} has the shape {list(shape)}")
    return TensorEntry(shape=shape, kind=kind, offset=offset)
