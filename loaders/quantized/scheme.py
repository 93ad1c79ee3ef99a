"""What is known of a way to store matrices in few bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.engine.errors import ModelError
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.loaders.fields import Fields

WHOLE_TYPES = ("F32", "F16", "BF16")
"""Types of safetensors of whole numbers, and of scales."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a matrix is stored as."""

    names: tuple[str, ...]  # what it may be called, behind the matrix's own prefix
    types: tuple[str, ...]  # of safetensors
    shapes: tuple[tuple[int, ...], ...]  # that it may have; none: any


class Scheme(ABC):
    """How a checkpoint stores its matrices. Its ``repr`` says all that their numbers depend on besides the tensors."""

    @property
    @abstractmethod
    def label(self) -> str:
        """For people."""

    @property
    def kind(self) -> str:
        """The ggml type of the blocks that hold just these numbers; empty if none does: then they are expanded."""
        return ""

    @property
    def embeds(self) -> bool:
        """Whether token embedding and head are stored that way as well."""
        return False

    @property
    def unit(self) -> int:
        """What the input channels of every matrix are a multiple of."""
        return 1

    @abstractmethod
    def parts(self, outs: int, ins: int) -> tuple[Part, ...]:
        """The tensors of a matrix [out, in]; where the first, the codes, is in a file, the matrix is stored by this scheme."""

    @abstractmethod
    def expand(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """Weights float32 [out, in] of a matrix's tensors."""

    def blocks(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same as rows of blocks uint8 [out, bytes]."""
        raise AssertionError(f"{self.label} has no blocks")

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ModelError if a matrix's tensors, of which little is read, are not what the config says."""
        return

    def ordered_by(self, indices: Sequence[Tensor]) -> Scheme:
        """The same where these, [in] each, say which group each channel of some matrices is of. ModelError for no group."""
        return self


def group_size(fields: Fields, size: object) -> int:
    """Input channels that share a scale, a multiple of 32; 0: all of a row."""
    if size == -1:
        return 0
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % BLOCK:
        raise ModelError(f"{fields.where}: group_size is {str(size)[:40]}, this engine reads -1 and multiples of {BLOCK}")
    return size


def to_q4_1(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Rows of Q4_1 blocks: ``scale * code + minimum`` of codes uint8 [out, in], both rounded to float16 (minima of a code's
    multiple by a 128th of a step at most); scales and minima [out, groups]."""
    outs, ins = codes.shape
    halves = codes.view(outs, ins // BLOCK, 2, BLOCK // 2)
    return _with_heads("Q4_1", halves[:, :, 0] | halves[:, :, 1] << 4, torch.stack([scales, minima], -1))


def to_q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Rows of Q8_0 blocks: ``scale * code``, scales [out, groups] rounded to float16, of codes int8 [out, in]."""
    blocks = codes.contiguous().view(torch.uint8).view(len(codes), -1, BLOCK)
    return _with_heads("Q8_0", blocks, scales[..., None])


def _with_heads(kind: str, blocks: Tensor, heads: Tensor) -> Tensor:
    """Blocks uint8 [out, n, bytes] behind their numbers [out, groups, 1 or 2] in float16."""
    heads = heads.half().repeat_interleave(blocks.shape[1] // heads.shape[1], 1).contiguous()
    joined = torch.cat([heads.view(torch.uint8), blocks], -1)
    assert joined.shape[-1] == FORMATS[kind].file_bytes
    return joined.view(len(blocks), -1)
