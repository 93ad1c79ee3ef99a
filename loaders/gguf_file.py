"""Weights in a GGUF file: numbers as they are stored, and blocks expanded to float32 by the `gguf` package, or as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.ggml.recoded import RECODED, recoded, recoded_bytes
from skvq.loaders.fields import Fields, reason
from skvq.loaders.gguf_config import ROPE_TABLES, parse_gguf_config
from skvq.loaders.gguf_header import GgufHeader, check_extents, map_file, read_header
from skvq.loaders.model_files import PART
from skvq.loaders.names import EMBEDDING, FINAL_NORM, HEAD, check_shapes, expected_shapes, expert_stacks, stacks
from skvq.loaders.rows import INTERLEAVED, stored_rows
from skvq.loaders.source import SAMPLE_BYTES, QuantizedBlocks, fingerprint_of, unknown_weight

PERMUTED = ("llama", "mixtral", "ministral3", "smollm3", *INTERLEAVED)
"""Families whose queries and keys llama.cpp turns as neighbouring channels."""
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are single values, not blocks."""

ROWS_AT_A_TIME = 4096
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor's bytes in the map, uint8 [rows, bytes_per_row], its ggml type, and its shape when expanded."""

    data: NDArray[np.uint8]
    kind: Any
    shape: tuple[int, ...]


class GgufSource:
    """A GGUF file of one of ``gguf_config.ARCHITECTURES``, or all its parts, one of which was given.

    Opening maps the file and reads its header; ModelError, one line, if it is not a whole GGUF file, of another
    architecture, of a type that cannot be expanded, or if the `gguf` package is not installed.
    Files of some hold the rows of Q and K in another order (``rows``); both ``read`` and ``blocks`` undo it.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        header, stored = _open(Path(path))
        self.metadata = Fields(header.metadata, self.where)
        self.config = parse_gguf_config(header, self.where, _rope_tables(stored))
        names, stored = gguf_names(self.config), _apart(stored, self.config)
        back = {theirs: ours for ours, theirs in names.items()}
        shapes = {back.get(name, name): item.shape for name, item in stored.items() if name not in ROPE_TABLES}
        check_shapes(shapes, self.config, self.where)
        self._stored = {ours: stored[theirs] for ours, theirs in names.items()}
        self.fingerprint = fingerprint_of(self.config, self._samples())

    def read(self, name: str) -> torch.Tensor:
        """Single values as they are stored, blocks expanded to float32, or to float16 where there are no such ``blocks``; owned
        by the caller."""
        item, order = self._item(name), self._row_order(name)
        if item.kind.name in PLAIN_TYPES:
            values = torch.from_numpy(item.data.copy()).view(PLAIN_TYPES[item.kind.name]).view(item.shape)
        else:
            values = torch.from_numpy(_expand(item))
        values = values.half() if self.expanded(name) else values
        return values if order is None else values[torch.from_numpy(order)]

    def stored(self, name: str) -> tuple[str, int]:
        """Type of the numbers or the blocks, and bytes, of what is read or given as blocks."""
        item = self._item(name)
        if item.kind.name in PLAIN_TYPES:
            return str(PLAIN_TYPES[item.kind.name]), item.data.nbytes
        if len(item.shape) != 2:
            return str(torch.float32), 4 * prod(item.shape)
        if self.expanded(name):
            return str(torch.float16), 2 * prod(item.shape)
        kind = item.kind.name
        return (RECODED[kind], recoded_bytes(kind, item.data.nbytes)) if kind in RECODED else (kind, item.data.nbytes)

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """The weight as stored, or in other blocks that hold the same numbers (``ggml.recoded``); None for single values, a
        vector, or a type without such. A copy: it outlives the source."""
        item = self._item(name)
        kind = item.kind.name
        if kind in PLAIN_TYPES or len(item.shape) != 2 or self.expanded(name):
            return None
        order = self._row_order(name)
        data = torch.from_numpy(item.data.copy() if order is None else item.data[order])
        if kind in RECODED:
            data, kind = recoded(data, kind), RECODED[kind]
        return QuantizedBlocks(data=data, kind=kind, shape=(item.shape[0], item.shape[1]))

    def expanded(self, name: str) -> str:
        """The type of a matrix in blocks that no kernel multiplies, nor could as others."""
        item = self._item(name)
        kind = item.kind.name
        return "" if kind in PLAIN_TYPES or len(item.shape) != 2 or kind in FORMATS or kind in RECODED else kind

    def _item(self, name: str) -> _Stored:
        if name not in self._stored:
            raise unknown_weight(name, self.where)
        return self._stored[name]

    def _row_order(self, name: str) -> NDArray[np.int64] | None:
        """Stored row of each canonical row, or None where they are the same."""
        return stored_rows(name, self.config, interleaved=self.config.family in PERMUTED)

    def _samples(self) -> Iterator[tuple[str, tuple[int, ...], str, bytes]]:
        for name, item in self._stored.items():
            yield name, item.shape, item.kind.name, item.data.reshape(-1)[:SAMPLE_BYTES].tobytes()


def gguf_config(path: str | Path) -> ModelConfig:
    """ModelConfig of a GGUF file from its header alone; the same checks as opening it, but for the weights' shapes."""
    header, stored = _open(Path(path))
    return parse_gguf_config(header, str(path), _rope_tables(stored))


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Canonical name -> name in a GGUF file, for every weight of the model."""
    outside = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
    return {name: outside.get(name) or layer_name(name) for name in expected_shapes(config)}


def layer_name(name: str) -> str:
    """Name in a GGUF file of a layer's weight, or of several stacked.

    >>> layer_name("model.layers.3.self_attn.qkv_proj.weight"), layer_name("model.layers.3.mlp.experts.7.up_proj.weight")
    ('blk.3.attn_qkv.weight', 'blk.3.ffn_up.7.weight')
    """
    _, _, index, inner = name.split(".", 3)
    part, kind = inner.rsplit(".", 1)
    _, experts, of_expert = part.partition("mlp.experts.")
    if experts:
        expert, part = of_expert.split(".")
        return f"blk.{index}.{_PARTS[f'mlp.{part}']}.{expert}.{kind}"
    return f"blk.{index}.{_PARTS[part]}.{kind}"


def stack_name(first: str) -> str:
    """Name in a GGUF file of the matrices of a layer's experts in one tensor, of the name of that of the first.

    >>> stack_name("model.layers.3.mlp.experts.0.up_proj.weight")
    'blk.3.ffn_up_exps.weight'
    """
    return layer_name(first).replace(".0.weight", "_exps.weight")


def _apart(stored: dict[str, _Stored], config: ModelConfig) -> dict[str, _Stored]:
    """The same with weights that were stored one above the other (Phi-3, GLM, experts) under the name of each."""
    shapes, found = expected_shapes(config), dict(stored)
    for name, (shape, firsts) in stacks(shapes).items():
        whole, own = stored.get(layer_name(name)), {layer_name(part) for part in firsts} - {layer_name(name)}
        if whole is not None and whole.shape == shape and own.isdisjoint(stored):
            del found[layer_name(name)]
            for part, first in firsts.items():
                rows = whole.data.reshape(shape[0], -1)[first : first + shapes[part][0]]  # a bias has a number a row
                found[layer_name(part)] = replace(whole, data=rows, shape=shapes[part])
    for stack in expert_stacks(config):
        for parts in zip(*stack, strict=True):  # gates, ups or downs of all experts
            name = stack_name(parts[0])
            item = found.get(name)
            if item is not None and item.shape == (len(parts), *shapes[parts[0]]):
                del found[name]
                for part, data in zip(parts, np.split(item.data, len(parts)), strict=True):
                    found[layer_name(part)] = replace(item, data=data, shape=item.shape[1:])
    return found


def _quants() -> tuple[Any, Any]:
    """The modules `gguf` and `gguf.quants`, or the ModelError that says how to get them."""
    try:
        import gguf
        from gguf import quants
    except ImportError as error:
        raise ModelError('GGUF files need the gguf package: pip install "skvq[gguf]"') from error
    return gguf, quants


def _open(path: Path) -> tuple[GgufHeader, dict[str, _Stored]]:
    """Header and tensors of a file; of a part (``-00001-of-00003.gguf``) those of all, with what the first one says."""
    data = map_file(path)
    header = read_header(data, str(path))
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header, _locate(header, data, str(path))
    headers, stored, files = list[GgufHeader](), dict[str, _Stored](), _parts(path, count)
    for number, file in enumerate(files):
        data = map_file(file)
        header = read_header(data, str(file))
        if [header.metadata.get(key) for key in ("split.no", "split.count")] != [number, count]:
            raise ModelError(f"{file} is not part {number + 1} of {len(files)}, as its name says: download it again")
        found = _locate(header, data, str(file))
        twice = next((name for name in found if name in stored), None)
        if twice is not None:
            raise ModelError(f"{file} holds {twice}, as another part does: download the parts again")
        headers.append(header)
        stored |= found
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    return replace(headers[0], tensors=tensors), stored


def _parts(path: Path, count: int) -> list[Path]:
    """All parts of a file in order, one of which is given. ModelError if some are missing."""
    name = PART.search(path.name)
    if name is None or int(name[2]) != count:
        raise ModelError(f"{path} is one of {count} parts, but not named so (...-00001-of-{count:05}.gguf): give it its name")
    files = [path.with_name(f"{path.name[: name.start()]}-{number:05}-of-{name[2]}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{path.parent}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}")
    return files


def _locate(header: GgufHeader, data: NDArray[np.uint8], where: str) -> dict[str, _Stored]:
    """Every tensor as a view of the map. ModelError for unknown types, rows of broken blocks, and truncation."""
    gguf, quants = _quants()
    sizes = {int(kind): (kind, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    usable: dict[int, str] = {}
    forms: dict[str, tuple[Any, int, int]] = {}  # kind, rows, bytes of a row
    for name, entry in header.tensors.items():
        if entry.kind not in sizes:
            raise ModelError(f"{where}: {name} has ggml type {entry.kind}, which the installed gguf package does not know")
        kind, block, block_bytes = sizes[entry.kind]
        if entry.kind not in usable:
            usable[entry.kind] = _why_not(kind, block_bytes, quants)
        if usable[entry.kind] or entry.shape[-1] % block:
            why = usable[entry.kind] or f"{entry.shape[-1]} columns are not a multiple of its block size {block}"
            raise ModelError(f"{where}: {name} is of type {kind.name}, which cannot be expanded: {why}")
        forms[name] = kind, prod(entry.shape[:-1]), entry.shape[-1] // block * block_bytes
    check_extents(header, {name: rows * row for name, (_, rows, row) in forms.items()}, len(data), where)
    found = {}
    for name, (kind, rows, row) in forms.items():
        start = header.data_start + header.tensors[name].offset
        found[name] = _Stored(data[start : start + rows * row].reshape(rows, row), kind, header.tensors[name].shape)
    return found


def _why_not(kind: Any, block_bytes: int, quants: Any) -> str:
    """Empty if the package can expand this type to floating point, else its reason: tried on one block of zeros."""
    try:
        value = quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
    except Exception as error:
        return reason(error)
    return "" if value.dtype == np.float32 else f"it expands to {value.dtype}"


def _expand(item: _Stored) -> NDArray[np.float32]:
    """The tensor in float32, a few thousand rows at a time: the package's own scratch is as large as its result."""
    _, quants = _quants()
    out = np.empty((item.data.shape[0], item.shape[-1]), dtype=np.float32)
    for start in range(0, len(out), ROWS_AT_A_TIME):
        part = np.asarray(item.data[start : start + ROWS_AT_A_TIME])
        out[start : start + ROWS_AT_A_TIME] = quants.dequantize(part, item.kind)
    return out.reshape(item.shape)


def _rope_tables(stored: dict[str, _Stored]) -> dict[str, NDArray[np.float32]]:
    """Those of ``ROPE_TABLES`` that a file has, by name."""
    return {name: _expand(stored[name]).reshape(-1) for name in ROPE_TABLES if name in stored}
