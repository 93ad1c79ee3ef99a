"""The specification itself: packing, metadata, quantization. Worked examples of layout arithmetic: ``test_docstrings``."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import make_case, plain_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skvq.engine.codecs import are_chosen_together
from skvq.kernels import dense, layout, reference
from skvq.kernels.interface import MOST_PARTS, HeadSide, RopeFrequencies, Side
from skvq.kernels.layout import E4M3_MAX, E4M3_MIN, LEVELS, PageLayout, packed_tokens
from skvq.kernels.reference import (
    dequantize,
    e4m3_decode,
    e4m3_encode,
    encode_scale,
    merge,
    pack_codes,
    pack_meta,
    quantize,
    quantize_heads,
    quantize_labels,
    rotary,
    unpack_codes,
    unpack_meta,
)

WIDTHS = sorted(LEVELS)
ONE = torch.tensor(1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["heads", "labels"])
def test_attention_unpacks_a_sequence_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    module, codec = getattr(reference, kind), getattr(case, kind)
    attend = getattr(reference, f"attend_{kind}")
    expected = attend(case.q, case.pages, codec, case.full, case.step)
    read: list[int] = []
    whole = module.read_tiles
    monkeypatch.setattr(module, "read_tiles", lambda *args: read.append(args[3]) or whole(*args))
    found = attend(case.q, case.pages, codec, case.full, case.step)
    assert read == case.step.packed.tolist()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_major", [True, False])
@pytest.mark.parametrize("bits, tile", [(b, t) for b in WIDTHS for t in (128, 160) if b != 1.5 or t == 160])
@pytest.mark.parametrize("size", [32, 40, 128])
def test_codes_come_back(bits: float, tile: int, size: int, token_major: bool) -> None:
    codes = torch.randint(LEVELS[bits], (3 * tile, 3, size), generator=generator(), dtype=torch.uint8)
    packed = pack_codes(codes, bits, tile, token_major=token_major)
    assert packed.shape == (3, 3, layout.code_bytes(bits, size, tile)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, tile, size, token_major=token_major), codes)


def test_every_five_trits_share_a_byte_and_come_back_by_multiplying() -> None:
    """ceil(256 v / 243) for all 243 v: distinct, and five multiplications by 3 bring the digits out above bit 8."""
    found = set()
    for trits in itertools.product(range(3), repeat=5):
        codes = torch.zeros(160, 1, 32, dtype=torch.uint8)
        codes[[0, 32, 64, 96, 128], 0, 0] = torch.tensor(trits, dtype=torch.uint8)
        byte = int(pack_codes(codes, 1.5, 160, token_major=True)[0, 0, 0])
        v = sum(t * 3 ** (4 - i) for i, t in enumerate(trits))
        assert byte == math.ceil(256 * v / 243)
        found.add(byte)
        for trit in trits:
            byte *= 3
            assert byte >> 8 == trit
            byte &= 0xFF
    assert len(found) == 243


def test_two_bit_keys_lie_in_planes_as_the_layout_says() -> None:
    """Byte b of a token holds channels b, D/4 + b, D/2 + b, 3 D/4 + b, the first in the lowest bits."""
    codes = torch.zeros(128, 1, 64, dtype=torch.uint8)
    codes[5, 0, [3, 16 + 3, 32 + 3, 48 + 3]] = torch.tensor([1, 2, 3, 0], dtype=torch.uint8)
    keys = pack_codes(codes, 2.0, 128, token_major=True).view(128, 16)
    values = pack_codes(codes, 2.0, 128, token_major=False).view(16, 128)
    assert keys[5, 3] == values[3, 5] == 1 | 2 << 2 | 3 << 4
    assert int((keys != 0).sum()) == int((values != 0).sum()) == 1


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_every_e4m3_byte_is_its_own_encoding() -> None:
    byte = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)  # 0x7f and 0xff are NaN
    value = e4m3_decode(byte)
    assert value.isfinite().all() and value.max() == E4M3_MAX and value[value > 0].min() == E4M3_MIN
    assert torch.equal(e4m3_encode(value), byte)


def test_e4m3_rounds_to_nearest_and_saturates() -> None:
    x = torch.cat([torch.randn(4001, generator=generator()) * 10.0**p for p in range(-4, 4)])
    table = e4m3_decode(torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8))
    nearest = (x[:, None] - table[None]).abs().amin(1)
    assert torch.equal((e4m3_decode(e4m3_encode(x)) - x).abs(), nearest)


def test_scales_of_256_levels_are_rounded_up() -> None:
    x = torch.cat([torch.rand(4001, generator=generator()) * 10.0**p for p in range(-3, 4)]).clamp_min(E4M3_MIN)
    table = e4m3_decode(torch.arange(0x7F, dtype=torch.uint8))
    above = torch.where(table * reference.ENOUGH >= x[:, None], table, E4M3_MAX).amin(1)
    assert torch.equal(e4m3_decode(encode_scale(x, 256)), above)
    assert torch.equal(encode_scale(x, 16), e4m3_encode(x))


@pytest.mark.parametrize("groups, tile", [(1, 128), (3, 160)])
def test_metadata_come_back_with_their_flags(groups: int, tile: int) -> None:
    scale, mid, vscale, vmid = torch.randint(0x7F, (4, 3 * tile, 2, groups), generator=generator(), dtype=torch.uint8)
    mid = mid | 0x80  # negative mids keep their sign
    retained = torch.rand(3 * tile, generator=generator()) < 0.3
    words = pack_meta(scale, mid, vscale, vmid, retained, tile)
    assert words.shape == (3, 2, groups * tile) and words.dtype == torch.int32
    found = unpack_meta(words, tile)
    assert all(torch.equal(a, e4m3_decode(b)) for a, b in zip(found[:4], (scale, mid, vscale, vmid), strict=True))
    assert torch.equal(found[4], retained)


def test_bytes_of_a_metadata_word_are_in_the_order_of_the_layout() -> None:
    parts = [torch.full((128, 1, 1), b, dtype=torch.uint8) for b in (0x11, 0x22, 0x33, 0x44)]
    retained = torch.zeros(128, dtype=torch.bool)
    retained[3] = True
    words = pack_meta(*parts, retained, 128)[0, 0]
    assert words[0] == 0x44332211 and words[3] == 0x44332291


# --- quantization -----------------------------------------------------------------------------------------------------


def groups_of(kind: str, size: int = 64, count: int = 301) -> Tensor:
    x = torch.randn(count, size, generator=generator())
    if kind == "skewed":
        return x.exp()
    if kind == "outlier":
        x[:, 7] *= 20
    return x if kind != "offset" else x + 9


def decoded(y: Tensor, bits: float, unit: Tensor, clip: Tensor = ONE) -> Tensor:
    codes, scale, mid = quantize(y, LEVELS[bits], unit, clip)
    return dequantize(codes, e4m3_decode(scale) * unit, e4m3_decode(mid) * unit, LEVELS[bits])


def min_max(y: Tensor, levels: int, unit: Tensor) -> Tensor:
    """Plain round-to-nearest between min and max, with the same metadata bytes, rounded first."""
    scale = e4m3_decode(e4m3_encode(((y.amax(-1) - y.amin(-1)) / (levels - 1) / unit).clamp_min(E4M3_MIN))) * unit
    mid = e4m3_decode(e4m3_encode((y.amax(-1) + y.amin(-1)) / 2 / unit)) * unit
    codes = ((y - mid[..., None]) / scale[..., None] + (levels - 1) / 2).round().clamp(0, levels - 1)
    return dequantize(codes, scale, mid, levels)


@pytest.mark.parametrize("kind", ["normal", "skewed", "outlier", "offset"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_is_in_the_mean_no_worse_than_min_max(bits: float, kind: str) -> None:
    """From 4 bits on the fitted scale and mid lose up to 1/16 to their bytes, as do min/max: there it may be a tie."""
    y, unit = groups_of(kind), torch.tensor(2.0**-4)
    ours = (decoded(y, bits, unit) - y).square().mean()
    tie = 1 if bits < 4 else (1 + 1 / 16) ** 2
    assert ours <= tie * (min_max(y, LEVELS[bits], unit) - y).square().mean()


@pytest.mark.parametrize("kind", ["normal", "offset"])
def test_eight_bits_lose_little_to_metadata_in_eight(kind: str) -> None:
    """Exact scales and mids give .0051 of a deviation, nearest scales .0105, and .039 at the offset, beside nearest mids."""
    y = groups_of(kind)
    assert (decoded(y, 8.0, torch.tensor(2.0**-4)) - y).square().mean().sqrt() <= 0.0063


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_the_best_for_the_rounded_metadata(bits: float) -> None:
    y, unit = groups_of("skewed"), torch.tensor(2.0**-3)
    codes, scale, mid = quantize(y, LEVELS[bits], unit, torch.tensor(0.8))
    scale, mid = e4m3_decode(scale) * unit, e4m3_decode(mid) * unit
    points = dequantize(torch.arange(LEVELS[bits]).expand(len(y), -1), scale, mid, LEVELS[bits])
    best = (y[..., None] - points[:, None]).abs().amin(-1)
    taken = (y - dequantize(codes, scale, mid, LEVELS[bits])).abs()
    assert torch.allclose(taken, best, rtol=0, atol=float(torch.finfo(torch.float32).eps * y.abs().max()))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, -3.25, 1e-30, 447.0, 1e4])
def test_a_constant_group_comes_back_as_near_as_its_mid_byte_allows(bits: float, value: float) -> None:
    y = torch.full((1, 33), value)
    found = decoded(y, bits, ONE)
    assert found.isfinite().all()
    step = (
        max(min(abs(value), E4M3_MAX) / 16, E4M3_MIN / 2) + LEVELS[bits] * E4M3_MIN
    )  # half a mantissa step; the scale is never 0
    assert (found - y.clamp(-E4M3_MAX, E4M3_MAX)).abs().max() <= step + max(0.0, abs(value) - E4M3_MAX)


@settings(max_examples=60, deadline=None)
@given(power=st.integers(-55, 55), seed=st.integers(0, 10**6), bits=st.sampled_from(WIDTHS))
def test_a_power_of_two_in_values_and_unit_changes_no_byte(power: int, seed: int, bits: float) -> None:
    y = torch.randn(5, 32, generator=generator(seed))
    factor = 2.0**power
    a = quantize(y, LEVELS[bits], ONE, ONE)
    b = quantize(y * factor, LEVELS[bits], ONE * factor, ONE)
    assert all(torch.equal(x, z) for x, z in zip(a, b, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    y=st.lists(st.floats(-65504, 65504, width=16), min_size=4, max_size=40),
    bits=st.sampled_from(WIDTHS),
    unit=st.integers(-20, 20),
    clip=st.sampled_from([0.3, 0.7, 1.0]),
)
def test_whatever_16_bits_can_hold_packs_to_finite_metadata(y: list[float], bits: float, unit: int, clip: float) -> None:
    codes, scale, mid = quantize(torch.tensor([y]), LEVELS[bits], torch.tensor(2.0**unit), torch.tensor(clip))
    assert int(codes.max()) < LEVELS[bits]
    assert e4m3_decode(scale).isfinite().all() and e4m3_decode(mid).isfinite().all()
    assert (scale < 0x80).all(), "the sign bit of a scale is the flag of retained tokens"


def test_labels_quantize_each_group_as_if_alone() -> None:
    y = groups_of("normal", size=48, count=35)
    labels = torch.randint(3, (48,), generator=generator(3))
    side = Side(unit=torch.tensor([1.0, 0.25, 2.0]), clip=torch.tensor([1.0, 0.8, 0.6]))
    codes, scale, mid = quantize_labels(y, 2.0, side, labels)
    for group in range(3):
        own = quantize(y[:, labels == group], 4, side.unit[group], side.clip[group])
        assert torch.equal(codes[:, labels == group], own[0])
        assert torch.equal(scale[:, group], own[1]) and torch.equal(mid[:, group], own[2])


def metric_side(heads: int, size: int, groups: int, spread: float) -> HeadSide:
    """Unit metadata in 1/16 and a metric A A^T of random A near the identity."""
    a = torch.eye(size) + spread * torch.randn(heads, size, size, generator=generator(4)) / size**0.5
    metric = a @ a.transpose(1, 2)
    upper = torch.linalg.cholesky(metric, upper=True)
    factor = upper / upper.diagonal(dim1=1, dim2=2)[..., None]
    ones = torch.ones(heads, groups)
    return HeadSide(unit=ones / 16, clip=ones, metric=metric, factor=factor, has_metric=True)


@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("bits", [b for b in WIDTHS if are_chosen_together(b)])
def test_codes_chosen_together_err_less_in_their_metric(bits: float, spread: float) -> None:
    side, y = metric_side(2, 64, 2, spread), torch.randn(157, 2, 64, generator=generator(6))

    def error(found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        codes, scale, mid = found
        rounded = dequantize(codes.view(157, 2, 2, 32), e4m3_decode(scale) / 16, e4m3_decode(mid) / 16, LEVELS[bits])
        e = rounded.view(157, 2, 64) - y
        return torch.einsum("thi,hij,thj->", e, side.metric, e)

    alone = quantize_heads(y, bits, replace(side, has_metric=False))
    assert error(quantize_heads(y, bits, side)) <= error(alone)


# --- rotary, attention ------------------------------------------------------------------------------------------------


def test_turning_back_undoes_turning_at_a_million() -> None:
    rope = RopeFrequencies(inv_freq=10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64), scale=1.3)
    x = torch.randn(7, 3, 64, generator=generator())
    positions = torch.arange(999_993, 1_000_000)
    back = rotary(rotary(x, positions, rope), positions, rope, inverse=True)
    assert (back - x).abs().max() <= 8 * torch.finfo(torch.float32).eps * x.abs().max()


@pytest.fixture(params=["ours", "torch"])
def dense_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on a CPU goes to our kernel; other dtypes and devices to torch's, in the parts that these tests cut."""
    if request.param == "torch":
        monkeypatch.setattr(dense, "_is_ours", lambda q: False)


@pytest.mark.usefixtures("dense_kernel")
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize(
    "count, tokens, span",
    [
        (1, 37, 37), (5, 37, 2**31 - 1), (37, 37, 38), (37, 37, 37), (37, 37, 36), (37, 37, 5), (37, 37, 1), (300, 331, 17),
        (5, 37, 36), (9, 37, 20), (20, 37, 25), (30, 37, 8), (8, 37, 8),
    ],
)  # fmt: skip
def test_dense_attention_equals_its_definition(kv_heads: int, count: int, tokens: int, span: int) -> None:
    q = torch.randn(count, 6, 40, generator=generator(1))
    k, v = torch.randn(2, kv_heads, tokens, 40, generator=generator(2))
    t = torch.arange(tokens - count, tokens)[:, None]
    at = torch.arange(tokens)[None]
    wanted = plain_attention(q, k, v, (at <= t) & (t - at < span))
    found = dense.attend_causal(q, k, v, span)
    single = plain_attention(q.half().float(), k.half().float(), v.half().float(), (at <= t) & (t - at < span))
    for ours, exact, rounded in zip(found, wanted, single, strict=True):
        assert (ours - exact).abs().max() < 0.1 * (rounded - exact).abs().max(), "float32 must be far below 16-bit error"


@pytest.mark.usefixtures("dense_kernel")
@pytest.mark.parametrize("hidden", [-100, -4, -3, -2, 0, 1, 7, 24, 26, 27, 28, 29, 40])
@pytest.mark.parametrize("count", [1, 4])
def test_a_window_over_what_lies_behind_equals_its_definition(count: int, hidden: int) -> None:
    q = torch.randn(count, 6, 40, generator=generator(1))
    k, v = torch.randn(2, 3, 29, 40, generator=generator(2))
    visible = torch.arange(29)[None] >= hidden + torch.arange(count)[:, None]
    wanted, wanted_lse = reference.masked_attention(q, k.transpose(0, 1), v.transpose(0, 1), visible)
    out, lse = dense.attend_behind(q, k, v, hidden)
    blind = ~visible.any(1)
    assert not out[blind].any() and (lse[blind] == -torch.inf).all()
    torch.testing.assert_close((out, lse[~blind]), (wanted, wanted_lse[~blind]), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("dense_kernel")
@pytest.mark.parametrize("runs", [1, 8, 9, 40])
def test_many_runs_are_merged_on_the_way(runs: int) -> None:
    q = torch.randn(3, 4, 32, generator=generator(1))
    k, v = torch.randn(2, 2, 5 * runs, 32, generator=generator(2))
    parts = dense.SoftmaxParts()
    for start in range(0, 5 * runs, 5):
        parts.add(*dense.attend_all(q, k[:, start : start + 5], v[:, start : start + 5]))
        assert len(parts._outs) <= MOST_PARTS
    torch.testing.assert_close(parts.merged(torch.float32), dense.attend_all(q, k, v), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("dense_kernel")
def test_merging_parts_equals_the_whole_even_where_a_part_is_empty() -> None:
    q = torch.randn(3, 4, 32, generator=generator(1))
    k, v = torch.randn(2, 2, 29, 32, generator=generator(2))
    whole = dense.attend_all(q, k, v)
    parts = [dense.attend_all(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 1), (1, 13), (13, 29))]
    nothing = (torch.zeros(3, 4, 32), torch.full((3, 4), -torch.inf))
    out, lse = merge([p[0] for p in (*parts, nothing)], [p[1] for p in (*parts, nothing)])
    eps = torch.finfo(torch.float32).eps
    assert (out - whole[0]).abs().max() <= 8 * eps and (lse - whole[1]).abs().max() <= 32 * eps
    out, lse = merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert not out.any() and (lse == -torch.inf).all()


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k = torch.randn(2, 4, 32), torch.randn(5, 2, 32)
    out, lse = reference.masked_attention(q, k, k, torch.tensor([[False] * 5, [True] * 5]))
    assert not out[0].any() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()


# --- layout -----------------------------------------------------------------------------------------------------------


@given(length=st.integers(0, 10**7), window=st.integers(0, 4096), tile=st.sampled_from([128, 160]))
def test_packing_takes_whole_tiles_and_never_the_window(length: int, window: int, tile: int) -> None:
    packed = packed_tokens(length, window, tile)
    assert packed % tile == 0 and 0 <= packed <= length
    assert packed == 0 or length - packed >= window
    assert length - packed < window + tile


@pytest.mark.parametrize("key_bits, value_bits", list(itertools.product(WIDTHS, WIDTHS)))
@pytest.mark.parametrize("size, group", [(64, 32), (128, 128)])
def test_a_token_takes_every_byte_of_codes_and_metadata(key_bits: float, value_bits: float, size: int, group: int) -> None:
    page = PageLayout(head_size=size, kv_heads=3, key_bits=key_bits, value_bits=value_bits, group_size=group)
    stored = [layout.stored_bits(b) for b in (key_bits, value_bits)]
    assert 8 * page.bytes_per_token / (2 * 3 * size) == pytest.approx(sum(stored) / 2 + 16 / group, rel=1e-12)
    assert page.tile * page.tiles == layout.PAGE_TOKENS
