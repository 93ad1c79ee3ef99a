"""Dense attention on the CPU, also by AMX: its definition, at every edge of blocks and tasks; the same bytes on any number of
threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skvq.kernels.numba_cpu.flash import KEYS, LANES, LANES_BY_TILES, flash
from skvq.kernels.reference import masked_attention

FAR = 2**30


@pytest.fixture(autouse=True, params=[2, 64], ids=["vectors", "tiles"])
def times(request: pytest.FixtureRequest) -> int:
    """How much larger the error may be than that of float32 torch: two bfloat16 hold 16 bits where float32 has 24."""
    if request.param > 2:
        request.getfixturevalue("by_tiles")
    return int(request.param)


def inputs(count: int, heads: int, kv_heads: int, size: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a larger tensor each, so that strides are none of a new one; what lies beside them is poison."""
    generator = torch.Generator().manual_seed(count + heads + size + tokens)
    q = torch.full((count, heads + 2, size), torch.nan)[:, 1:-1]
    k = torch.full((kv_heads, tokens + 2, size), torch.nan)[:, 1:-1]
    v = torch.full((tokens, kv_heads + 1, size), torch.nan)[:, 1:].transpose(0, 1)
    for tensor in (q, k, v):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return q, k, v


def check(times: int, q: Tensor, k: Tensor, v: Tensor, low: int, high: int) -> None:
    """float64 is the judge: the error is at most ``times`` that of float32 torch."""
    n, t = torch.arange(len(q))[:, None], torch.arange(k.shape[1])[None]
    visible = (t >= low + n) & (t < high + n)
    exact_v, single = v.transpose(0, 1), masked_attention(q, k.transpose(0, 1), v.transpose(0, 1), visible)
    score = torch.einsum("nhd,thd->nht", q.double(), k.double().transpose(0, 1).repeat_interleave(q.shape[1] // len(k), 1))
    score = (score / q.shape[2] ** 0.5).masked_fill(~visible[:, None], -torch.inf)
    lse = score.logsumexp(-1)
    weight = torch.exp(score - lse.clamp_min(-1e300)[..., None])
    out = torch.einsum("nht,thd->nhd", weight, exact_v.double().repeat_interleave(q.shape[1] // len(k), 1))
    found, found_lse = flash(q, k, v, low, high)
    blind = ~visible.any(1)
    assert not found[blind].any() and (found_lse[blind] == -torch.inf).all()
    assert found.dtype == found_lse.dtype == torch.float32
    if blind.all():
        return
    seen = ~blind
    for ours, exact, torchs in ((found, out, single[0]), (found_lse[seen], lse[seen], single[1][seen])):
        error, allowed = (ours - exact).abs().max(), times * (torchs - exact).abs().max()
        assert error <= max(float(allowed), times * 1e-6), (float(error), float(allowed))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (9, 3), (8, 1), (7, 1), (4, 4), (40, 1), (130, 1)])
@pytest.mark.parametrize("size", [64, 128, 40])
def test_every_sharing_of_heads(times: int, heads: int, kv_heads: int, size: int) -> None:
    check(times, *inputs(45, heads, kv_heads, size, 150), -FAR, 150 - 45 + 1)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_hidden(wrong: float) -> None:
    """A broken query breaks its own sums, a broken key those of all that see it, and nothing else."""
    q, k, v = inputs(70, 4, 2, 64, 300)
    q[3, 1, 5] = wrong
    k[1, 260, 7] = wrong
    out = flash(q, k, v, -FAR, 231)[0].isfinite().all(-1)
    expected = torch.ones(70, 4, dtype=torch.bool)
    expected[3, 1] = False
    expected[30:, 2:] = False
    assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [1, KEYS - 1, KEYS, KEYS + 1, 3 * KEYS + 5])
@pytest.mark.parametrize("count", [1, LANES // 2 - 1, LANES // 2, LANES // 2 + 1, LANES + 3, LANES_BY_TILES // 2 + 1])
@pytest.mark.parametrize("size", [30, 32])  # by vectors wherever it is, and by tiles where those are asked for
def test_the_edges_of_tasks_and_blocks(times: int, count: int, tokens: int, size: int) -> None:
    q, k, v = inputs(count, 4, 2, size, tokens)
    check(times, q, k, v, -FAR, tokens - count + 1)
    for low, high in ((-FAR, FAR), (-FAR, -5), (7, FAR), (tokens - 3, FAR), (-10, 5), (3, 4), (5, 5)):
        check(times, q, k, v, low, high)


def test_scores_far_apart(times: int) -> None:
    """The running maximum rises and stays; weights of what is far below it are zero, not garbage."""
    q, k, v = inputs(40, 2, 1, 64, 400)
    for scale in (30.0, 300.0):
        check(times, scale * q, k, v, -FAR, 361)
        check(times, scale * q, k * torch.linspace(0, 1, 400)[:, None], v, -FAR, 361)


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    q, k, v = inputs(200, 6, 3, 64, 500)
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(flash(q, k, v, -FAR, 301))
    finally:
        torch.set_num_threads(threads)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


def test_a_kv_head_by_itself_is_what_it_is_among_others() -> None:
    """Exact prefill by groups of heads gives the same bytes as with all heads."""
    q, k, v = inputs(100, 6, 3, 64, 300)
    whole = flash(q, k, v, -FAR, 201)
    for head in range(3):
        own, kv = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        for found, wanted in zip(flash(q[:, own], k[kv], v[kv], -FAR, 201), whole, strict=True):
            assert torch.equal(found, wanted[:, own])
