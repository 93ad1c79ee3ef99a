"""Instructions: the same integers on every CPU, every tile loader against the specification, one compilation per machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
import torch
from numba import njit

import skvq
from skvq.kernels import layout, reference
from skvq.kernels.layout import LEVELS
from skvq.kernels.numba_cpu import compiled, flash_simd, lanes, lattice, numeric, products, quantizer, simd, tiles
from skvq.kernels.numba_cpu.heads import build_attend_heads
from skvq.kernels.numba_cpu.linear import build_multiply
from skvq.kernels.numba_cpu.plain import build_attend_plain
from skvq.kernels.reference import e4m3_decode, pack_codes

CPUS = {
    "vnni": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+avxvnni"},
    "avx2": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"},
    "any": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}


def runs_here(cpu: str) -> bool:
    """Whether this CPU has the instructions of the other."""
    here = llvmlite.binding.get_host_cpu_features()
    return all(here.get(name[1:], False) for name in CPUS[cpu]["NUMBA_CPU_FEATURES"].split(",") if name)


def check_dots() -> None:
    """Two-limb dot products of the largest and of random codes, 1 to 4 rows at once and 7 in all."""
    gen = np.random.default_rng(0)
    for largest, bits, rows, words in ((255, 7, 7, 33), (15, 8, 6, 32), (3, 8, 1, 5)):
        codes = gen.integers(0, largest + 1, (words, 64, 4), dtype=np.uint8)
        codes[:, 0] = largest
        limit = int(numeric.limb_limit(bits))
        numbers = gen.integers(-limit, limit + 1, (rows, 4 * words))
        numbers[0], numbers[-1, ::2] = limit, -limit
        limbs = np.zeros((rows, 2, 4 * words), np.int8)
        given = numbers.astype(np.float32)
        for r in range(rows):
            low = limbs[r].ctypes.data
            total = numeric.split_limbs(given[r].ctypes.data, np.float32(1), 4 * words, low, low + 4 * words, bits)
            assert total == np.float32(numbers[r].sum())
        out = np.empty((rows, 64), np.float32)
        products.dots(
            rows, codes.ctypes.data, 256, words, limbs.ctypes.data, 4 * words, 8 * words, out.ctypes.data, 256, bits, 64,
            codes.ctypes.data, 64,
        )  # fmt: skip
        expected = np.einsum("jtk,rjk->rt", codes.astype(np.int64), numbers.reshape(rows, words, 4))
        assert np.array_equal(out, expected.astype(np.float32)), (largest, bits)


def check_halves() -> None:
    """Every float16, denormals, infinities and NaN included, to float32: sixteen at a time, and one by one."""
    numbers = np.arange(65536, dtype=np.uint16).view(np.float16)
    out = np.empty(len(numbers), np.float32)
    numeric.row_to_float(numbers.ctypes.data, out.ctypes.data, len(numbers), numeric.FLOAT16)
    assert np.array_equal(out, numbers.astype(np.float32), equal_nan=True)
    for start in range(0, len(numbers), 15):
        numeric.row_to_float(
            numbers[start:].ctypes.data, out.ctypes.data, len(row := numbers[start : start + 15]), numeric.FLOAT16
        )
        assert np.array_equal(out[: len(row)], row.astype(np.float32), equal_nan=True)


def check_dense_products() -> None:
    """What dense attention is made of, against float64: rows that fill registers and some more, hidden and blind queries."""
    gen = np.random.default_rng(0)
    for rows, count in ((8, 5), (13, 64), (6, 1), (128, 40), (3, 2)):
        table, coefs = (gen.standard_normal(shape).astype(np.float32) for shape in ((count, 32), (count, rows)))
        out = np.full((rows + 1, 32), 7, np.float32)
        arguments = (rows, table.ctypes.data, 128, count, coefs.ctypes.data, 4, 4 * rows, out.ctypes.data, 128)
        exact = coefs.T.astype(np.float64) @ table
        for add, factor in ((False, 1), (True, 2)):
            products.product(*arguments, add)
            assert np.abs(out[:rows] - factor * exact).max() <= 1e-6 * count, (rows, count)
            assert (out[rows] == 7).all()
    scores = (20 * gen.standard_normal((40, 32))).astype(np.float32)
    lows, highs = np.zeros(32, np.int32), np.full(32, 1000, np.int32)
    lows[3], highs[4], highs[5] = 120, 110, 100
    check_softmax_step(scores, lows, highs)


@njit(**tiles.FAST)
def _lanes(a: int, b: int, number: float, out: int) -> None:
    x, y, row = lanes.load(a), lanes.load(b), 4 * lanes.LANES
    lanes.store(out, (x + number) * y - number / x)
    lanes.store(out + row, lanes.rint(min(max(x, y), number)))
    larger = lanes.both(x > y, y > number)
    lanes.store(out + 2 * row, lanes.where(larger, x, lanes.spread(number)))
    total = lanes.spread(number)
    for i in range(3):
        total += lanes.load(a + i * 4)
        total -= number * y
        total *= y
    lanes.store(out + 3 * row, total)


def check_lanes() -> None:
    """What jitted code does with LANES numbers at once, against numpy; halves go to the even number."""
    gen = np.random.default_rng(0)
    a, b = gen.standard_normal((2, lanes.LANES + 2)).astype(np.float32)
    a[:4], b[:4], number = (0.5, 1.5, -0.5, 2.5), -3, np.float32(2.5)
    out = np.empty((4, lanes.LANES), np.float32)
    _lanes(a.ctypes.data, b.ctypes.data, number, out.ctypes.data)
    x, y = a[: lanes.LANES], b[: lanes.LANES]
    total = np.full(lanes.LANES, number)
    for i in range(3):
        total = (total + a[i : i + lanes.LANES] - number * y) * y
    np.testing.assert_allclose(out[0], (x + number) * y - number / x, rtol=1e-5, atol=1e-6)
    assert np.array_equal(out[1], np.rint(np.minimum(np.maximum(x, y), number)))
    assert np.array_equal(out[2], np.where((x > y) & (y > number), x, number))
    np.testing.assert_allclose(out[3], total, rtol=1e-5, atol=1e-4)


def check_softmax_step(scores: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> None:
    """One step of a softmax over tokens 100 .. 139, after one of weight 3 and maximum 2."""
    seen = (np.arange(100, 140)[:, None] >= lows) & (np.arange(100, 140)[:, None] < highs)
    held = np.where(seen, scores, numeric.HIDDEN).astype(np.float64)
    best = np.maximum(held.max(0), 2)
    weights = np.exp2(held - best)
    tops, totals, acc = np.full(32, 2, np.float32), np.full(32, 3, np.float32), np.ones((7, 32), np.float32)
    _hide(scores.ctypes.data, 100, len(scores), lows.ctypes.data, highs.ctypes.data)
    _soften(scores.ctypes.data, len(scores), tops.ctypes.data, totals.ctypes.data, acc.ctypes.data, 7)
    assert np.array_equal(tops, best.astype(np.float32))
    for found, exact in ((scores, weights), (totals, 3 * np.exp2(2 - best) + weights.sum(0)), (acc[6], np.exp2(2 - best))):
        np.testing.assert_allclose(found, exact, rtol=3e-5, atol=1e-37)  # of arguments up to 100, in float32


@njit
def _hide(scores: int, first: int, count: int, lows: int, highs: int) -> None:
    flash_simd.hide(scores, first, count, lows, highs)


@njit
def _soften(scores: int, count: int, tops: int, totals: int, acc: int, size: int) -> None:
    flash_simd.soften(scores, count, tops, totals, acc, size)


def test_this_cpu() -> None:
    check_dots()
    check_halves()
    check_dense_products()
    check_lanes()


@pytest.mark.parametrize("cpu", list(filter(runs_here, CPUS)))
def test_every_cpu_computes_the_same(cpu: str) -> None:
    """The forms for other CPUs are compiled and run here, in a process that numba is told such a CPU is in."""
    script = "import test_numba_simd as t\nt.check_dots()\nt.check_halves()\nt.check_dense_products()\nt.check_lanes()"
    path = os.pathsep.join(
        [str(Path(skvq.__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **CPUS[cpu], "PYTHONPATH": path}, check=True)


@pytest.mark.parametrize("size", [8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256])
def test_tile_loaders(size: int) -> None:
    gen = np.random.default_rng(size)
    lanes = -(-size // 32) * 32
    for bits, levels in LEVELS.items():
        for tile in (160,) if bits == 1.5 else (128, 160):
            codes = torch.from_numpy(gen.integers(0, levels, (tile, 1, size), dtype=np.uint8))
            keys, values = (pack_codes(codes, bits, tile, token_major=major).numpy().copy() for major in (True, False))
            out = np.full(tile * size, 0xA5, np.uint8)
            tiles.load_keys(keys.ctypes.data, out.ctypes.data, levels, size, tile)
            assert (out.reshape(size // 4, tile, 4).transpose(1, 0, 2).reshape(tile, size) == codes[:, 0].numpy()).all()
            out = np.full(tile * lanes, 0xA5, np.uint8)
            tiles.load_values(values.ctypes.data, out.ctypes.data, levels, size, tile)
            assert (
                out.reshape(tile // 4, lanes, 4).transpose(0, 2, 1).reshape(tile, lanes)[:, :size] == codes[:, 0].numpy()
            ).all()
            out = np.full(tile * size, 0xA5, np.uint8)
            tiles.load_value_rows(values.ctypes.data, out.ctypes.data, levels, size, tile)
            assert (codes[:, 0].numpy() == out.reshape(size, tile).T).all()


def test_metadata_even_where_denormals_are_flushed() -> None:
    words = np.arange(256, dtype=np.int32) * 0x01010101
    words = np.concatenate([words, words[::-1]]).reshape(4, 128).copy()
    out, bias = np.empty((4, 4, 128), np.float32), np.empty(128, np.float32)
    torch.set_flush_denormal(True)
    numeric.decode_meta(words.ctypes.data, out.ctypes.data, bias.ctypes.data, 4, 128)
    torch.set_flush_denormal(False)
    for part in range(4):
        byte = torch.from_numpy(words.view(np.uint8).reshape(4, 128, 4)[..., part] & (0x7F if part == 0 else 0xFF))
        expected = e4m3_decode(byte).numpy()
        assert np.array_equal(out[part], expected) or np.array_equal(np.isnan(expected), (byte.numpy() & 0x7F) == 0x7F)
        fine = ~np.isnan(expected)
        assert np.array_equal(out[part][fine], expected[fine])
    assert np.array_equal(bias < 0, (words[0] & 0x80) != 0)


@njit(**tiles.FAST)
def powers(x: int, out: int, count: int) -> None:
    given, found = simd.f32(x), simd.f32(out)
    for i in range(count):
        found[i] = numeric.exp2(given[i])


def test_exp2() -> None:
    x = np.concatenate([np.linspace(-126, 0, 100_001), [-126.5, -200, -1e30]]).astype(np.float32)
    out = np.empty_like(x)
    powers(x.ctypes.data, out.ctypes.data, len(x))
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(out[:-3] / exact[:-3] - 1) < 4e-7).all() and (out[-3:] == 0).all() and out[100_000] == 1


def test_compiled_once_per_machine(tmp_path: Path) -> None:
    """A second process reads what the first has compiled; no folder of the package need be writable."""
    script = (
        "from skvq.kernels.numba_cpu import compiled, small\nkernels = compiled.Kernels()\n"
        "kernels.function(small.build_swiglu)\nprint(kernels._compiled[small.build_swiglu][0].cache_hits)"
    )
    path = os.pathsep.join(
        [str(Path(skvq.__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    hits = [
        subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True).stdout for _ in "12"
    ]
    assert hits == ["0\n", "1\n"]


def test_a_change_in_any_source_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, plain = build_attend_heads.__module__, build_attend_plain.__module__
    before = compiled.source_stamp(heads), compiled.source_stamp(plain)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == "mean.py" else b""))
    assert compiled.source_stamp(heads) != before[0], "heads imports mean"
    assert compiled.source_stamp(plain) == before[1], "plain does not"
    matrices = compiled.source_stamp(build_multiply.__module__)
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == "formats.py" else b""))
    assert compiled.source_stamp(build_multiply.__module__) != matrices, "linear takes formats from outside"


def test_constants_copied_from_outside_are_those_outside() -> None:
    """See ``compiled.source_stamp``: kernels copy them, so that a change is a change of their own source."""
    assert (tiles.SLOTS, tiles.TRITS, tiles.RETAINED) == (layout.TRIT_SLOTS, layout.TRIT_PLANES, layout.RETAINED_FLAG)
    assert (quantizer.E4M3_MAX, quantizer.E4M3_MIN) == (layout.E4M3_MAX, layout.E4M3_MIN)
    assert (quantizer.E4M3_LARGEST, quantizer.ENOUGH) == (layout.E4M3_LARGEST, reference.ENOUGH)
    assert quantizer.REFINE_STEPS == reference.REFINE_STEPS
    for name in ("LATTICE_FITS", "LATTICE_ROUNDS", "LATTICE_SWEEPS"):
        assert getattr(lattice, name) == getattr(reference, name), name


def test_kernels_import_nothing_that_the_stamp_does_not_see() -> None:
    """A module with jitted code takes from skvq only its own package and ggml, in the forms that ``source_stamp`` reads."""
    for path in Path(tiles.__file__).parent.glob("*.py"):
        text = path.read_text()
        if not re.search(r"^@(njit|intrinsic)|^def build_", text, re.MULTILINE):
            continue
        package = re.escape(tiles.__package__)
        seen = re.findall(
            rf"^from {package}\.\w+ import|^from {package} import [\w, ]+$|^from skvq\.kernels\.ggml\.\w+ import",
            text,
            re.MULTILINE,
        )
        named = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("skvq")]
        assert len(seen) == len(named), path.name
