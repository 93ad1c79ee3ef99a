"""Which form a weight is held in on the CPU: what its file has, where that can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ggml_fixtures import blocks_of, random
from tiny import Listener, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.storage import Storage, WeightReader
from skvq.engine.weight_forms import form_of
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.linear import FloatMatrix
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import HalfMatrix
from skvq.loaders.source import QuantizedBlocks


class Source:
    """Weights from a dict: tensors, or (ggml type, blocks, expanded)."""

    where = "here"

    def __init__(self, **weights: Tensor | tuple[str, Tensor, Tensor]) -> None:
        self._weights = weights

    def read(self, name: str) -> Tensor:
        found = self._weights[name]
        return found[2] if isinstance(found, tuple) else found

    def blocks(self, name: str) -> QuantizedBlocks | None:
        found = self._weights[name]
        if not isinstance(found, tuple):
            return None
        return QuantizedBlocks(data=found[1], kind=found[0], shape=tuple(found[2].shape))

    def expanded(self, name: str) -> str:
        return ""


def storage_of(listener: Listener, **weights: Tensor | tuple[str, Tensor, Tensor]) -> Storage:
    reader = WeightReader(Source(**weights), lambda done: None)  # type: ignore[arg-type]
    return Storage(form_of("numba", torch.device("cpu"), torch.float32), reader, listener)


def test_forms_are_kept_and_neighbours_stacked() -> None:
    q, k, v = (("Q4_1", *blocks_of("Q4_1", rows, 64)) for rows in (32, 16, 16))
    listener = Listener()
    storage = storage_of(listener, q=q, k=k, v=v, half=random(8, 64).half(), odd=random(8, 24).half(), full=random(8, 64))
    assert [m.data.nbytes for m in storage.linear(["q", "k", "v"], None).parts] == [64 * 40]  # type: ignore[attr-defined]
    assert torch.equal(storage.linear(["q", "k"], None).dense(), torch.cat([q[2], k[2]]))
    mixed = storage.linear(["q", "half", "full"], None)
    assert [type(m) for m in mixed.parts] == [BlockMatrix, HalfMatrix, FloatMatrix]  # type: ignore[attr-defined]
    assert [t.dtype for t in storage.linear(["full"], None).tensors] == [torch.float32]
    assert [t.dtype for t in storage.linear(["odd"], None).tensors] == [torch.float32]
    embedding, head = storage.embedding("q")
    assert embedding.tensors[0] is head.tensors[0]
    assert not listener.messages


def test_a_type_that_cannot_be_kept_is_announced_once() -> None:
    odd = ("IQ4_NL", torch.zeros(16, 36, dtype=torch.uint8), random(16, 64))
    listener = Listener()
    storage = storage_of(listener, a=odd, b=odd)
    assert torch.equal(storage.linear(["a", "b"], None).dense(), torch.cat([odd[2], odd[2]]))
    assert len(listener.messages) == 1 and "IQ4_NL" in listener.messages[0]


def test_a_broken_scale_is_refused() -> None:
    data, weight = blocks_of("Q8_0", 16, 64)
    data[3, 34:36] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # NaN
    with pytest.raises(Exception, match="NaN or infinite"):
        storage_of(Listener(), a=("Q8_0", data, weight)).linear(["a"], None)


@pytest.mark.parametrize(("kind", "at"), [("Q4_K", 144), ("Q4_K", 146), ("Q5_K", 176), ("Q5_K", 178), ("Q6_K", 418)])
def test_a_broken_scale_of_eight_blocks_is_refused(kind: str, at: int) -> None:
    data, weight = blocks_of(kind, 16, 512)
    storage_of(Listener(), a=(kind, data, weight)).linear(["a"], None)
    data[3, at : at + 2] = torch.tensor([0, 0xFC], dtype=torch.uint8)  # -infinity
    with pytest.raises(Exception, match="NaN or infinite"):
        storage_of(Listener(), a=(kind, data, weight)).linear(["a"], None)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [7, 16, 33])
def test_what_a_matrix_takes_is_known_before(kind: str, rows: int) -> None:
    assert BlockMatrix(blocks_of(kind, rows, 256)[0], kind).data.nbytes == BlockMatrix.bytes_of(kind, rows, 256)


def test_a_dtype_that_no_kernel_computes_in_is_told(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, num_layers=1)
    for dtype, told in (("bfloat16", True), ("float32", False)):
        listener = Listener()
        tiny_engine(folder, tiny_cache(method="fp"), dtype=dtype, backend="numba", report=listener)
        assert any("bfloat16 on a CPU is slower" in line for line in listener.messages) == told
