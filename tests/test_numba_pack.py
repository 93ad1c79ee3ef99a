"""Packing and unpacking of the numba backend: the bytes of the specification, and nothing written beside them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import Case, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import PackedPages
from skvq.kernels.layout import LEVELS
from skvq.kernels.numba_cpu import NumbaCpu

BACKEND = NumbaCpu()
PARTS = ("key_codes", "value_codes", "meta")

pytestmark = pytest.mark.usefixtures("one_thread")


def poisoned(pages: PackedPages, seed: int) -> PackedPages:
    gen = torch.Generator().manual_seed(seed)
    fresh = {name: torch.empty_like(getattr(pages, name)) for name in PARTS}
    for t in fresh.values():
        t.view(torch.uint8).random_(generator=gen)
    return replace(pages, **fresh)


def pack_both(case: Case, method: str, keys: Tensor, values: Tensor, retained: Tensor, first: int) -> list[PackedPages]:
    codec, row = getattr(case, method), case.step.page_table[case.step.slots[0]]
    made = []
    for backend in (reference.Reference(), BACKEND):
        pages = poisoned(case.pages, 3)
        getattr(backend, method).pack(pages, codec, row, first, keys, values, retained)
        made.append(pages)
    return made


def tokens(case: Case, count: int, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (count, case.layout.kv_heads, case.layout.head_size)
    keys, values = (torch.randn(shape, generator=gen) * 2).half(), torch.randn(shape, generator=gen).half()
    keys[3], keys[7], values[4], values[9] = 0, 60.0, 0, -1.5  # constant tokens: the scale is the smallest there is
    keys[11, 0, 5] = 300.0
    return keys, values, torch.rand(count, generator=gen) < 0.1


def assert_same_bytes(expected: PackedPages, got: PackedPages, written: int) -> None:
    """At least 99.9 % of the bytes written are the specification's, and no other byte has changed."""
    for name in PARTS:
        a, b = (getattr(p, name).flatten().view(torch.uint8) for p in (expected, got))
        differing = int((a != b).sum())
        share = written / (1280 * len(expected.meta))
        assert differing <= 1e-3 * share * a.numel(), (name, differing, share * a.numel())


def assert_same_but_for_ties(
    case: Case, expected: PackedPages, got: PackedPages, first: int, count: int, *, together: int = 0
) -> None:
    """A rounding tie of one byte of metadata moves every code of its group, so in few tokens it is groups that count; or all
    channels whose codes are chosen ``together``.

    At most one of these in a thousand (and one) has other numbers, and no byte differs that they do not explain.
    """
    row, group = case.step.page_table[case.step.slots[0]], together or case.layout.group_size
    one, other = (torch.stack(reference.unpack_heads(p, case.heads, row, first, count)) for p in (expected, got))
    ties = (one != other).unflatten(-1, (-1, group)).any(-1)
    assert ties.sum() <= 1 + 1e-3 * ties.numel(), (int(ties.sum()), ties.numel())
    parts = [[getattr(p, name).flatten().view(torch.uint8) for name in PARTS] for p in (expected, got)]
    explained = group + 2 * (group // case.layout.group_size)
    assert sum(int((a != b).sum()) for a, b in zip(*parts, strict=True)) <= ties.sum() * explained


FORMATS = [
    (k, v, g, d)
    for d in (128, 64)
    for g in (128, 64, 32)
    if g <= d
    for k, v in [(1.5, 2.0), (2.0, 1.5), (3.0, 4.0), (8.0, 3.0)]
]


@pytest.mark.parametrize(
    "key_bits, value_bits, group, size", [*FORMATS, (2.0, 3.0, 48, 96), (1.5, 1.5, 9, 72), (4.0, 8.0, 40, 40)]
)
@pytest.mark.parametrize("method", ["heads", "labels"])
def test_packed_bytes(method: str, key_bits: float, value_bits: float, group: int, size: int) -> None:
    case = make_case(size=size, key_bits=key_bits, value_bits=value_bits, group_size=group, packed=(12,), has_key_mean=True)
    tile = case.layout.tile
    keys, values, retained = tokens(case, 2 * tile)
    expected, got = pack_both(case, method, keys, values, retained, 7 * tile)
    assert_same_bytes(expected, got, 2 * tile)


@pytest.mark.parametrize("key_bits, value_bits", [(2.0, 2.0), (3.0, 4.0), (8.0, 3.0)])
@pytest.mark.parametrize("method", ["heads", "labels"])
def test_packed_bytes_of_whole_bits_in_tiles_of_160(method: str, key_bits: float, value_bits: float) -> None:
    case = make_case(
        size=64, key_bits=key_bits, value_bits=value_bits, group_size=32, packed=(9,), has_key_mean=True, among_trits=True
    )
    keys, values, retained = tokens(case, 2 * 160)
    expected, got = pack_both(case, method, keys, values, retained, 7 * 160)
    assert_same_bytes(expected, got, 2 * 160)
    row = case.step.page_table[case.step.slots[0]]
    codec = case.heads if method == "heads" else case.labels
    unpacked = [getattr(b, method).unpack(got, codec, row, 7 * 160, 2 * 160) for b in (reference.Reference(), BACKEND)]
    for one, other in zip(*unpacked, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key_bits, value_bits, group, size", [(2.0, 2.0, 64, 64), (1.5, 4.0, 32, 64), (2.0, 3.0, 48, 96)])
def test_codes_chosen_together(key_bits: float, value_bits: float, group: int, size: int) -> None:
    case = make_case(size=size, key_bits=key_bits, value_bits=value_bits, group_size=group, packed=(3,), has_metric=True)
    tile = case.layout.tile
    keys, values, retained = tokens(case, tile)
    expected, got = pack_both(case, "heads", keys, values, retained, tile)
    assert_same_but_for_ties(case, expected, got, tile, tile, together=size)


def test_long_stretches_equal_short_ones() -> None:
    """More tokens than are held in float32 at once."""
    case = make_case(size=64, packed=(31,), has_key_mean=True)
    tile = case.layout.tile
    keys, values, retained = tokens(case, 23 * tile)
    row = case.step.page_table[case.step.slots[0]]
    whole, parts = poisoned(case.pages, 1), poisoned(case.pages, 1)
    BACKEND.heads.pack(whole, case.heads, row, 2 * tile, keys, values, retained)
    for at in range(0, 23 * tile, tile):
        part = slice(at, at + tile)
        BACKEND.heads.pack(parts, case.heads, row, 2 * tile + at, keys[part], values[part], retained[part])
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in PARTS)


@pytest.mark.parametrize("bits, group, size", list(itertools.product(sorted(LEVELS), (32, 128), (64, 128))))
@pytest.mark.parametrize("method", ["heads", "labels"])
def test_unpacked_numbers(method: str, bits: float, group: int, size: int) -> None:
    case = make_case(size=size, key_bits=bits, value_bits=bits, group_size=group, packed=(12,), has_basis=False)
    tile, row = case.layout.tile, case.step.page_table[case.step.slots[0]]
    first, count = 2 * tile, 9 * tile
    codec = getattr(case, method)
    expected = getattr(reference.Reference(), method).unpack(case.pages, codec, row, first, count)
    got = getattr(BACKEND, method).unpack(case.pages, codec, row, first, count)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)  # values: decoding alone
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6 * float(expected[0].abs().max()))


def test_means_and_bases_are_undone() -> None:
    case = make_case(size=96, group_size=48, key_bits=3.0, packed=(11,), has_key_mean=True)
    row = case.step.page_table[case.step.slots[0]]
    expected = reference.unpack_heads(case.pages, case.heads, row, 128, 1280)
    got = BACKEND.heads.unpack(case.pages, case.heads, row, 128, 1280)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(sorted(LEVELS)), size=st.sampled_from([8, 24, 32, 64, 80]), heads=st.integers(1, 3),
    tiles=st.integers(1, 3), first=st.integers(0, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(bits: float, size: int, heads: int, tiles: int, first: int, seed: int) -> None:
    case = make_case(
        size=size,
        kv_heads=heads,
        key_bits=bits,
        value_bits=bits,
        group_size=size // 2,
        packed=(12,),
        seed=seed,
        has_basis=False,
    )
    tile = case.layout.tile
    gen = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(tiles * tile, heads, size, generator=gen) for _ in range(2))
    retained = torch.rand(tiles * tile, generator=gen) < 0.2
    expected, got = pack_both(case, "heads", keys, values, retained, first % 5 * tile)
    assert_same_but_for_ties(case, expected, got, first % 5 * tile, tiles * tile)
