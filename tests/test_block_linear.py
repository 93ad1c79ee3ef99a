"""Matrices held as their file stores them: equal to the expanded ones, within what rounding the vector to 16 bits allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ggml_fixtures import SPANNING, blocks_of, random, random_blocks
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from skvq.engine.embedding import StoredEmbedding
from skvq.engine.report import Quiet
from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.kernels.linear import FloatMatrix, StoredLinear
from skvq.kernels.numba_cpu import linear_simd
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import HalfMatrix
from skvq.loaders.hub import resolve

KINDS = list(FORMATS)
COUNTS = (1, 3, 4, 16, 17, 40, 300)


def wide(kind: str, count: int) -> int:
    """Columns of so many blocks, or of so many spans of eight."""
    return count * BLOCK * FORMATS[kind].span


def rounding_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Largest error [N, out] of rounding x to a 65534th of the range of its block, and as much again for float32 sums."""
    step = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True).expand(-1, -1, BLOCK).flatten(-2) / 65534
    sums = 2**-24 * 2 * x.shape[1] ** 0.5 * (x.abs() @ weight.abs().T)
    return (step @ weight.abs().T) * 1.001 + sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 37, 576])
def test_blocks_expand_to_the_same_bits(kind: str, rows: int) -> None:
    columns = wide(kind, 3)
    data, weight = blocks_of(kind, rows, columns)
    matrix = BlockMatrix(data, kind)
    assert matrix.shape == (rows, columns)
    expanded = matrix.rows(torch.arange(rows))
    assert torch.equal(expanded.view(torch.int32), weight.view(torch.int32))
    ids = torch.tensor([rows - 1, 0, rows // 2, 0])
    assert torch.equal(matrix.rows(ids), weight[ids])
    assert torch.equal(StoredEmbedding(matrix, torch.float32)(ids.view(2, 2)), weight[ids.view(2, 2)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [7, 64, 333])
@pytest.mark.parametrize("count", COUNTS)
def test_product_of_blocks(kind: str, rows: int, count: int) -> None:
    columns = wide(kind, 5)
    data, weight = blocks_of(kind, rows, columns)
    x, bias = random(count, columns, seed=1) * random(count, columns, seed=2).exp(), random(rows, seed=3)
    got = StoredLinear((BlockMatrix(data, kind),), bias)(x[None])
    want = x.double() @ weight.double().T + bias
    assert got.shape == (1, count, rows)
    assert bool(((got[0] - want).abs() <= rounding_bound(x, weight) + 2**-22 * want.abs()).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_in_a_batch_is_what_it_is_alone(kind: str) -> None:
    data, _ = blocks_of(kind, 100, wide(kind, 3))
    linear, x = StoredLinear((BlockMatrix(data, kind),), None), random(7, wide(kind, 3))
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


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("threads", [1, 9])
def test_many_vectors_at_every_edge(rows: int, threads: int) -> None:
    """Of rows, vectors and columns that are multiplied at a time; nothing beside the result is written."""
    before = torch.get_num_threads()
    weight, bias = random(rows, 528).bfloat16(), random(rows, seed=2)
    try:
        for count in (17, 64, 128, 129, 300):
            x, out = random(count, 528, seed=1), torch.full((count, rows + 3), 7.0)
            torch.set_num_threads(threads)
            HalfMatrix(weight).multiply(x, bias, out[:, :rows])
            torch.set_num_threads(before)
            want = x.double() @ weight.double().T + bias
            scale = x.abs() @ weight.float().abs().T
            assert bool(((out[:, :rows] - want).abs() <= 2**-24 * 528**0.5 * 4 * (scale + 1)).all())
            assert (out[:, rows:] == 7).all()
            again = torch.empty(count, rows)
            HalfMatrix(weight).multiply(x, bias, again)  # on other threads: the same bytes
            assert torch.equal(again, out[:, :rows])
    finally:
        torch.set_num_threads(before)


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
def test_memory_is_that_of_the_file_but_for_factors_of_six_bits(kind: str) -> None:
    data, weight = blocks_of(kind, 64, wide(kind, 3))
    held = BlockMatrix(data, kind).data.nbytes
    assert held == data.nbytes + (4 * weight.numel() // 256 if kind in ("Q4_K", "Q5_K") else 0)  # 16 factors: 16 bytes for 12
    assert held / weight.numel() == {
        "Q4_0": 0.5625, "Q4_1": 0.625, "Q5_0": 0.6875, "Q5_1": 0.75, "Q8_0": 1.0625,
        "Q4_K": 0.578125, "Q5_K": 0.703125, "Q6_K": 0.8203125,
    }[kind]  # fmt: skip


def test_more_rows_than_are_packed_at_a_time() -> None:
    data, weight = blocks_of("Q5_K", 4096 + 21, 256)
    assert torch.equal(BlockMatrix(data, "Q5_K").rows(torch.arange(4080, 4117)), weight[4080:])


@pytest.mark.parametrize("kind", SPANNING)
@pytest.mark.parametrize("fill", [0, 0x0F, 0x80, 0xFF])
def test_extremes_of_factors_and_codes(kind: str, fill: int) -> None:
    data = random_blocks(kind, 16, 512, fill=fill)
    weight = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[kind]))
    matrix, x, out = BlockMatrix(data, kind), random(5, 512).sign(), torch.empty(5, 16)
    assert torch.equal(matrix.rows(torch.arange(16)).view(torch.int32), weight.view(torch.int32))
    matrix.multiply(x, None, out)
    want = x.double() @ weight.double().T
    assert bool(((out - want).abs() <= rounding_bound(x, weight) + 2**-22 * want.abs()).all())


@pytest.mark.parametrize("lacking", ["avx512vnni", "avx512vnni avx512bw", "avx512vnni avx512bw avx2 f16c"])
def test_every_instruction_set_gives_the_same_integers(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of small integers is exact in float32, so all forms must agree to the bit."""
    from numba import njit

    from skvq.kernels.numba_cpu import linear, simd

    names = {f"+{name}" for name in lacking.split()}
    whole = simd.host_features
    for module in (linear_simd, simd):
        monkeypatch.setattr(module, "host_features", lambda context: whole(context) - names)

    @njit
    def run(kind: int, x: int, matrix: int, blocks: int, work: int, out: int) -> None:
        linear.round_vector(x, blocks, work)
        linear_simd.dot(kind, matrix, blocks, work, 0, out)

    for number, kind in enumerate(KINDS):
        columns = wide(kind, 3)
        data, weight = blocks_of(kind, 16, columns)
        packed = BlockMatrix(data, kind)
        x, want = torch.randint(-9, 9, (1, columns)).float(), torch.empty(1, 16)
        packed.multiply(x, None, want)
        work, got = np.zeros(linear.rounded_bytes(columns), np.uint8), torch.empty(1, 16)
        run(number, x.data_ptr(), packed.data.data_ptr(), columns // BLOCK, work.ctypes.data, got.data_ptr())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert bool(((got - x @ weight.T).abs() <= rounding_bound(x, weight) + 1e-5).all())


# --- the whole model -----------------------------------------------------------------------------------------------------


def smollm2() -> Path:
    return resolve("smollm2-135m", download=False).path


def test_smollm2_in_blocks_is_smollm2() -> None:
    from skvq import CacheConfig, Engine

    options = {"max_context": 256, "max_sequences": 1, "cache": CacheConfig(method="fp"), "device": "cpu", "report": Quiet()}
    blocks, dense = (Engine.load(smollm2(), backend=name, **options) for name in ("numba", "reference"))  # type: ignore[arg-type]
    assert dense.parts.model.weights.nbytes == 538_060_032
    assert blocks.parts.model.weights.nbytes < 97_000_000
    ids = blocks.encode("The Nile is the longest river of Africa. It rises near the equator and flows north for")
    apart = (blocks.logits(ids) - dense.logits(ids)).abs()
    assert float(apart.max()) < 0.02 and float(apart.mean()) < 2e-3  # llama.cpp's 8 bits are 0.2 away on average
    sequences, rows = [], []
    for engine in (blocks, dense):
        sequence = engine.new_sequence()
        rows.append(engine.read(sequence, ids))
        sequences.append(sequence)
    for _ in range(20):
        token = int(rows[1].argmax())
        assert float(rows[1].max() - rows[1].flatten()[int(rows[0].argmax())]) < 0.02  # the same, or a tie
        rows = [engine.decode_step([one], [token]) for engine, one in zip((blocks, dense), sequences, strict=True)]
