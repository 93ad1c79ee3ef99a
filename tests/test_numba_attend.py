"""Attention of the numba backend against the specification: every format, shape and mask, and what must not change a result."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import Case, attend, compare, fused, make_case, torch_attention

from skvq.kernels.numba_cpu import NumbaCpu

METHODS = ("heads", "labels", "plain")
BACKEND = NumbaCpu()

pytestmark = pytest.mark.usefixtures("one_thread")


def in_float32(case: Case) -> Case:
    return replace(case, q=case.q.float())


def assert_accurate(method: str, case: Case) -> None:
    """The rule of flash-attention: error against float32 at most twice that of torch in 16 bits (fused); log-sum-exp alike."""
    out, lse, exact, exact_lse = compare(BACKEND, case, method)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    theirs, ours = (float((x.float() - exact).square().mean().sqrt()) for x in (torch_attention(case, method, fused), out))
    assert ours <= 2 * theirs, (ours, theirs)
    # and with exact queries the arithmetic itself is far better than 16 bits
    wide, _ = attend(BACKEND, in_float32(case), method)
    assert float((wide - exact).square().mean().sqrt()) <= theirs, (ours, theirs)
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse))
    finite = torch.isfinite(exact_lse)
    torch.testing.assert_close(lse[finite], exact_lse[finite], rtol=1e-4, atol=2e-3)


FORMATS = [
    (2.0, 2.0, 128, 128), (2.0, 2.0, 64, 128), (2.0, 2.0, 64, 64), (2.0, 2.0, 32, 64), (1.5, 1.5, 128, 128), (1.5, 1.5, 64, 64),
    (2.0, 1.5, 128, 128), (1.5, 4.0, 32, 128), (3.0, 3.0, 64, 64), (3.0, 2.0, 32, 128), (4.0, 4.0, 64, 128), (4.0, 3.0, 32, 64),
    (8.0, 8.0, 128, 128), (8.0, 2.0, 64, 64), (3.0, 8.0, 48, 96), (2.0, 4.0, 96, 96), (1.5, 8.0, 9, 72), (4.0, 2.0, 40, 40),
]  # fmt: skip


@pytest.mark.parametrize("key_bits, value_bits, group, size", FORMATS)
@pytest.mark.parametrize("method", ["heads", "labels"])
def test_every_format(method: str, key_bits: float, value_bits: float, group: int, size: int) -> None:
    case = make_case(size=size, key_bits=key_bits, value_bits=value_bits, group_size=group, packed=(3, 11), repeat=3)
    assert_accurate(method, case)


@pytest.mark.parametrize("key_bits, value_bits", [(2.0, 2.0), (3.0, 4.0), (8.0, 3.0)])
@pytest.mark.parametrize("method", ["heads", "labels"])
def test_whole_bits_in_tiles_of_160(method: str, key_bits: float, value_bits: float) -> None:
    """A layer without trits in a cache where another has them."""
    case = make_case(
        size=64, key_bits=key_bits, value_bits=value_bits, group_size=32, packed=(3, 9), has_key_mean=True, among_trits=True
    )
    assert case.layout.tile == 160
    assert_accurate(method, case)


@pytest.mark.parametrize("repeat, kv_heads, queries", [(1, 3, 1), (1, 2, 3), (2, 1, 3), (5, 2, 1), (7, 1, 2), (4, 2, 19)])
@pytest.mark.parametrize("method", METHODS)
def test_query_heads_and_several_queries(method: str, repeat: int, kv_heads: int, queries: int) -> None:
    case = make_case(size=64, group_size=32, repeat=repeat, kv_heads=kv_heads, queries=queries, packed=(9, 2))
    assert_accurate(method, case)


@pytest.mark.parametrize("method", ["heads", "labels"])
def test_threads_that_come_first_together(method: str) -> None:
    """Each makes the tables that it finds missing; all must use those that stay."""
    case = make_case(size=64, group_size=32, packed=(9, 2), has_key_mean=method == "heads")
    expected = attend(BACKEND, case, method)[0]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            for _ in range(40):
                backend = NumbaCpu()
                found = [pool.submit(attend, backend, case, method) for _ in range(3)]
                assert all(torch.equal(one.result()[0], expected) for one in found)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [64, 40])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_number_is_not_hidden(method: str, size: int, wrong: float) -> None:
    """A key or value of the window that is broken breaks the heads that see it, and no others; an infinite key those too in
    whose sums it would weigh nothing."""
    for name in ("keys", "values"):
        case = make_case(size=size, group_size=size // 2, repeat=2, kv_heads=2, packed=(9, 2))
        broken = getattr(case.full, name).clone()
        where = tuple((case.full.positions >= 0).nonzero()[-1].tolist())  # a slot, and a place in it that is seen
        broken[where[0], 1, where[1], size - 1] = wrong
        case = replace(case, full=replace(case.full, **{name: broken}))
        out, _, exact, _ = compare(BACKEND, case, method)
        whole = out.isfinite().all(-1)
        assert whole[:, :, :2].all() and not whole.all() and not (whole & ~exact.isfinite().all(-1)).any()
        assert torch.equal(whole, exact.isfinite().all(-1)) or wrong == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    assert_accurate(method, make_case(dtype=dtype, packed=(12,)))


@pytest.mark.parametrize("has_key_mean, has_basis", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("tiles, size", [(12, 64), (11, 128)])
def test_means_and_bases(has_key_mean: bool, has_basis: bool, tiles: int, size: int) -> None:
    case = make_case(
        size=size, has_key_mean=has_key_mean, has_basis=has_basis, packed=(tiles,), key_bits=1.5 if size == 64 else 2.0
    )
    assert_accurate("heads", case)
    some = case.heads.key_mean.clone()
    some[0, 3:] = 0  # few active pairs in one head
    assert_accurate("heads", replace(case, heads=replace(case.heads, key_mean=some)))


def test_key_means_that_dwarf_the_keys() -> None:
    """Key biases of Qwen reach hundreds; their share of the scores is exact at positions far out."""
    case = make_case(has_key_mean=True, packed=(12,))
    mean = torch.zeros_like(case.heads.key_mean)
    mean[:, 40], mean[:, 104], mean[:, 2] = 90.0, -350.0, 4.0
    assert_accurate("heads", replace(case, heads=replace(case.heads, key_mean=mean)))


@pytest.mark.parametrize("span", [1, 36, 37, 38, 39, 164, 165, 166, 300, 1400, 1500])
@pytest.mark.parametrize("method", METHODS)
def test_spans(method: str, span: int) -> None:
    assert_accurate(method, make_case(size=64, group_size=64, queries=2, span=span, packed=(11,)))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_visible(method: str) -> None:
    case = make_case(packed=(3, 1), size=64, window=9)
    hidden = replace(case, full=replace(case.full, positions=torch.full_like(case.full.positions, -1)))
    step = replace(case.step, packed=torch.zeros_like(case.step.packed))
    out, lse = attend(BACKEND, replace(hidden, step=step), method)
    assert (out == 0).all() and (lse == -torch.inf).all()
    if method != "plain":
        hidden.pages.meta.fill_(0x38383838 | 0x80)
        out, lse = attend(BACKEND, hidden, method)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_singles_and_pages_may_lie_anywhere(method: str) -> None:
    case = make_case(packed=(1, 13, 4), queries=2, has_key_mean=True)
    out, lse = attend(BACKEND, case, method)
    for row in range(3):
        one = slice(row, row + 1)
        step = replace(case.step, slots=case.step.slots[one], positions=case.step.positions[one], packed=case.step.packed[one])
        single, single_lse = attend(BACKEND, replace(case, q=case.q[one].contiguous(), step=step), method)
        torch.testing.assert_close(single, out[one], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(single_lse, lse[one], rtol=1e-5, atol=1e-5)
    order = torch.randperm(len(case.pages.meta), generator=torch.Generator().manual_seed(1))
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order))
    pages = replace(case.pages, **{name: getattr(case.pages, name)[order] for name in ("key_codes", "value_codes", "meta")})
    plain = replace(case.plain, keys=case.plain.keys[order], values=case.plain.values[order])
    table = moved[case.step.page_table.long()].to(torch.int32)
    moved_case = replace(case, pages=pages, plain=plain, step=replace(case.step, page_table=table))
    again = attend(BACKEND, moved_case, method)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("method, threads", list(itertools.product(METHODS, (1, 2, 3))))
def test_any_number_of_threads(method: str, threads: int) -> None:
    case = make_case(packed=(40, 3), size=64)
    out, _ = attend(BACKEND, in_float32(case), method)
    torch.set_num_threads(threads)
    again, _ = attend(BACKEND, in_float32(case), method)
    torch.set_num_threads(1)
    torch.testing.assert_close(again, out, rtol=1e-3, atol=1e-4)


def test_threads_where_torch_has_no_openmp_of_gnu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's torch, say: Python threads call the same function, which runs without the interpreter's lock."""
    case = make_case(packed=(40, 3), size=64)
    out, _ = attend(BACKEND, in_float32(case), "heads")
    monkeypatch.setattr(BACKEND._launcher._team, "_parallel", None)
    torch.set_num_threads(3)
    again, _ = attend(BACKEND, in_float32(case), "heads")
    torch.set_num_threads(1)
    torch.testing.assert_close(again, out, rtol=1e-3, atol=1e-4)


def test_a_layer_of_the_arena_is_read_where_it_lies() -> None:
    """Pages of one layer are a view with strides of its own; nothing is copied."""
    case = make_case(packed=(3,), size=64)
    out, _ = attend(BACKEND, case, "heads")
    wide = {}
    for name in ("key_codes", "value_codes", "meta"):
        t = getattr(case.pages, name)
        wide[name] = torch.full((len(t), 3, *t.shape[1:]), 0x55, dtype=t.dtype)[:, 1]
        wide[name].copy_(t)
    again, _ = attend(BACKEND, replace(case, pages=replace(case.pages, **wide)), "heads")
    assert torch.equal(again, out)
