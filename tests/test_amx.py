"""Products by AMX: within 2^-15 of float64 at every edge of panels, slices and blocks; the same where the CPU has no tiles."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ggml_fixtures import blocks_of
from torch import Tensor

from skvq.kernels.ggml.formats import BLOCK, FORMATS
from skvq.kernels.numba_cpu import permission
from skvq.kernels.numba_cpu.amx import SIDE, STEP, TILE
from skvq.kernels.numba_cpu.amx_linear import SLICE, SPLIT
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import FEW, HalfMatrix

pytestmark = pytest.mark.usefixtures("by_tiles")


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of x [N, 32] as tiles hold them, as float32 [N, 32], N a multiple of 32."""
    tiles = torch.full((len(x) // SIDE * STEP,), 255, dtype=torch.uint8)
    SPLIT(1, 0, x.data_ptr(), 4 * x.shape[1], len(x), 1, tiles.data_ptr())
    parts = tiles.view(torch.bfloat16).view(-1, 2, 2 * TILE // 64, 32).float()  # [N / 32, large or small, 32, 32]
    return parts[:, 0].flatten(0, 1), parts[:, 1].flatten(0, 1)


def test_two_bfloat16_are_a_float32_within_two_to_the_minus_sixteen() -> None:
    x = torch.randn(256, 32) * torch.randn(256, 32).mul(20).exp2()
    large, small = split(x)
    assert torch.equal(large, x.bfloat16().float()) or ((large - x).abs() <= x.abs() * 2**-8).all()
    assert ((large.double() + small.double() - x.double()).abs() <= x.abs().double() * 2**-16).all()


def test_what_is_no_number_stays_so_whatever_its_bits() -> None:
    bits = torch.tensor([0x7FC00000, -1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF, 0x7F800000, -0x800000], dtype=torch.int32)
    x = torch.zeros(32, 32)
    x.view(torch.int32)[0, : len(bits)] = bits
    large, small = split(x)
    assert (large + small)[0, : len(bits)].isnan().all()
    assert not (large + small).flatten()[len(bits) :].any()


def check(matrix: BlockMatrix | HalfMatrix, weight: Tensor, count: int, *, with_bias: bool, beside: int = 3) -> None:
    """Every element within 2^-15 of its terms' magnitudes; memory beside the output is left alone."""
    rows, columns = weight.shape
    x, bias = torch.randn(count, columns) * torch.randn(count, 1).exp(), torch.randn(rows) if with_bias else None
    whole = torch.full((count, rows + beside), torch.nan)
    matrix.multiply(x, bias, whole[:, :rows])
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    bound = (x.abs().double() @ weight.abs().double().T) * 2**-15 + wanted.abs() * 2**-23
    assert ((whole[:, :rows] - wanted).abs() <= bound).all()
    assert whole[:, rows:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16, 31, 32, 33, 300])
@pytest.mark.parametrize("count", [FEW + 1, 2 * SIDE, 2 * SIDE + 1])
def test_sixteen_bits(dtype: torch.dtype, rows: int, count: int) -> None:
    weight = torch.randn(rows, 96).to(dtype)
    for with_bias in (False, True):
        check(HalfMatrix(weight), weight.float(), count, with_bias=with_bias)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [5, 16, 32, 70])
def test_blocks(kind: str, rows: int) -> None:
    data, weight = blocks_of(kind, rows, 3 * BLOCK * FORMATS[kind].span)
    for count in (FEW + 1, SIDE, 70):
        check(BlockMatrix(data, kind), weight, count, with_bias=rows == 70)


@pytest.mark.parametrize("columns", [SLICE - 32, SLICE, SLICE + 32, 3 * SLICE])
def test_slices_of_columns_add_up(columns: int) -> None:
    weight = torch.randn(40, columns).bfloat16()
    for with_bias in (False, True):
        check(HalfMatrix(weight), weight.float(), 40, with_bias=with_bias)


def test_a_vector_is_the_same_among_others_and_on_any_number_of_threads() -> None:
    weight, x, threads = torch.randn(700, 192).half(), torch.randn(90, 192), torch.get_num_threads()
    outs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outs.append(torch.empty(90, 700))
            HalfMatrix(weight).multiply(x, None, outs[-1])
    finally:
        torch.set_num_threads(threads)
    some = torch.empty(33, 700)
    HalfMatrix(weight).multiply(x[20:53].contiguous(), None, some)
    assert all(torch.equal(out, outs[0]) for out in outs) and torch.equal(some, outs[0][20:53])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(wrong: float) -> None:
    data, weight = blocks_of("Q4_K", 32, 512)
    for matrix in (BlockMatrix(data, "Q4_K"), HalfMatrix(weight.bfloat16())):
        x, out = torch.randn(40, 512), torch.empty(40, 32)
        x[7, 300] = wrong
        matrix.multiply(x, None, out)
        assert not out[7].isfinite().any() and out[torch.arange(40) != 7].isfinite().all()


def test_it_can_be_turned_off() -> None:
    code = "from skvq.kernels.numba_cpu.permission import has_amx; print(has_amx())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SKVQ_AMX": "0"}, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n", run.stderr


def test_where_the_system_refuses_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(permission, "compiles_tiles", lambda: True)
    monkeypatch.setattr(permission.ctypes, "CDLL", lambda name: SimpleNamespace(syscall=lambda *numbers: -1))
    permission.has_amx.cache_clear()
    assert [permission.has_amx(), permission.has_amx()] == [False, False]
    permission.has_amx.cache_clear()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the system does not let this process use it" in said
