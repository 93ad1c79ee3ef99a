"""What the engine asks of a place that holds weights, whatever the file format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig

SAMPLE_BYTES = 4096
"""Bytes of every tensor that enter the fingerprint: 14 GB of weights are told apart by reading about one megabyte."""
NEWER = ("rotary_size", "chunks", "experts")
"""Fields of the config that count only where they say something: other models keep the fingerprint they had before there were
any, and with it their calibrations and sessions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedBlocks:
    """A matrix as its file stores it: rows of ggml blocks, in the row order of the canonical weight.

    data: uint8 [rows, bytes_per_row]; kind: ggml type name such as ``Q4_1``; shape: (rows, columns) when expanded.
    """

    data: torch.Tensor
    kind: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        assert self.data.dtype == torch.uint8 and self.data.dim() == 2 and self.data.shape[0] == self.shape[0]


class WeightSource(Protocol):
    """Weights of one model by canonical name. All names, shapes and types were checked when it was opened."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    @property
    def where(self) -> str:
        """Folder or file, for messages."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the config and a sample of every tensor: equal only for the same weights."""

    def read(self, name: str) -> torch.Tensor:
        """The weight in its stored type (float32 if it had to be expanded); may alias a memory map: do not write."""

    def stored(self, name: str) -> tuple[str, int]:
        """What ``read`` or ``blocks`` would give, without reading it: ggml block type or torch dtype, and bytes."""

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """The weight unexpanded, or None where it is not stored in blocks."""

    def expanded(self, name: str) -> str:
        """How the file stores the weight, for people, where ``read`` gives more bytes and ``blocks`` none; else empty."""


def fingerprint_of(config: ModelConfig, tensors: Iterable[tuple[str, tuple[int, ...], str, bytes]]) -> str:
    """SHA-256 over the config and (name, shape, stored type, first bytes) of every tensor, in the order of names."""
    told = {name: value for name, value in asdict(config).items() if value or name not in NEWER}
    digest = hashlib.sha256(repr(sorted(told.items())).encode())
    for name, shape, kind, head in sorted(tensors):
        digest.update(f"\n{name} {shape} {kind} ".encode())
        digest.update(head[:SAMPLE_BYTES])
    return digest.hexdigest()


def first_bytes(tensor: torch.Tensor) -> bytes:
    """The first ``SAMPLE_BYTES`` of a contiguous tensor, touching no other page of its map."""
    count = -(-SAMPLE_BYTES // tensor.element_size())
    flat = tensor.reshape(-1)[:count]
    return flat.view(torch.uint8).numpy().tobytes()[:SAMPLE_BYTES]


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raise ModelError if a weight holds NaN or infinity: they would silently turn every later logit into NaN."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    if not len(flat) or bool(torch.stack(torch.aminmax(flat)).isfinite().all()):  # one pass, nothing written; NaN is both
        return
    step = 1 << 24
    bad = sum(int((~torch.isfinite(flat[start : start + step])).sum()) for start in range(0, len(flat), step))
    raise ModelError(
        f"{where}: {bad} of {flat.numel()} values of {name} are NaN or infinite, so every answer would be garbage: "
        "download the file again, or convert the model to bfloat16 if it overflowed in float16"
    )


def unknown_weight(name: str, where: str) -> ModelError:
    """The error of a source asked for a weight that the model does not have."""
    return ModelError(f"{where}: no weight named {name!r} in this model")
