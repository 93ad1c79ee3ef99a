"""Which form a model's weights are held in."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.engine.storage import Form, Kinds, NoKinds
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.ggml.words import EXPANDED_BYTES, words_bytes
from skvq.kernels.linear import StackedMatrix

HALVES = (torch.float16, torch.bfloat16)


def form_of(backend: str, device: torch.device, dtype: torch.dtype) -> Form:
    """The form that goes with a backend: what the file has where its kernels multiply that, else one dtype."""
    kinds: Kinds = NoKinds()
    if backend == "numba" and dtype == torch.float32:
        kinds = CpuKinds()
    elif backend == "triton" and dtype in HALVES:
        kinds = GpuKinds(device)
    return Form(device, dtype, kinds)


class CpuKinds:
    """GGUF blocks and 16-bit numbers, by numba's kernels; arithmetic is float32."""

    def keeps(self, kind: str, columns: int) -> bool:
        from skvq.kernels.numba_cpu.half_matrix import STEP

        return kind in FORMATS or (kind in map(str, HALVES) and columns % STEP == 0)

    def nbytes(self, kind: str, rows: int, columns: int) -> int:
        from skvq.kernels.numba_cpu.block_matrix import BlockMatrix

        return BlockMatrix.bytes_of(kind, rows, columns) if kind in FORMATS else 2 * rows * columns

    def matrix(self, kind: str, data: Tensor) -> StackedMatrix:
        from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
        from skvq.kernels.numba_cpu.half_matrix import HalfMatrix

        return BlockMatrix(data, kind) if kind in FORMATS else HalfMatrix(data)

    @property
    def expanded_bytes(self) -> int:
        return 0


class GpuKinds:
    """GGUF blocks, by Triton's kernels; arithmetic is that of the compute dtype."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def keeps(self, kind: str, columns: int) -> bool:
        return kind in FORMATS

    def nbytes(self, kind: str, rows: int, columns: int) -> int:
        return words_bytes(kind, rows, columns)

    def matrix(self, kind: str, data: Tensor) -> StackedMatrix:
        from skvq.kernels.triton_gpu.blocks import BlockMatrix

        return BlockMatrix(data, kind, self._device)

    @property
    def expanded_bytes(self) -> int:
        return EXPANDED_BYTES
