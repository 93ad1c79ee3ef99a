"""Dense attention of many queries over float32 keys and values (FlashAttention-2, arXiv 2307.08691), for prefill.

A task is a kv head and some queries, at most LANES vectors, in blocks of 32 lanes. It goes over the tokens that any of them
sees, KEYS at a time: scores ``K q`` [tokens, lanes], weights, weighted sums of values [D, lanes]. Queries lie side by side, so
neither keys nor values need to be transposed, and a softmax is the same work in every lane. Each task is one thread's, from
its first token to its last: results do not hang on the number of threads.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.flash_simd import BLOCK, STEP, hide, product, soften
from skvq.kernels.numba_cpu.job import offsets, record
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.numeric import NOTHING
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i32, record_at
from skvq.kernels.numba_cpu.softmax import write_lse
from skvq.kernels.numba_cpu.tiles import FAST

FIELDS = (
    "counter", "members", "q", "q_row", "keys", "key_head", "key_row", "values", "value_head", "value_row", "out", "lse",
    "count", "heads", "kv_heads", "size", "tokens", "low", "high", "positions", "work", "work_bytes",
    "w_q", "w_scores", "w_acc", "w_top", "w_total", "w_low", "w_high",
)  # fmt: skip
PARTS = FIELDS[FIELDS.index("w_q") :]
LANES = 128
KEYS = 128
flash_job = record_at(record(*FIELDS))


@njit(**FAST)
def load_queries(job, work, head, first, here, share, blocks):
    """Write the queries times log2(e)/sqrt(D) to ``w_q`` [block][D][32], and what each sees; empty lanes see nothing."""
    size = job.size
    factor = np.float32(1.4426950408889634 / np.sqrt(size))
    lows, highs = i32(work + job.w_low), i32(work + job.w_high)
    for lane in range(blocks * BLOCK):
        column = f32(work + job.w_q + lane // BLOCK * size * STEP + 4 * (lane % BLOCK))
        n = first + lane // share
        if lane < here * share:
            given = f32(job.q + n * job.q_row + 4 * size * (head * share + lane % share))
            for d in range(size):
                column[BLOCK * d] = given[d] * factor
            lows[lane] = max(0, job.low + n)
            highs[lane] = min(job.tokens, job.high + n)
        else:
            for d in range(size):
                column[BLOCK * d] = np.float32(0)
            lows[lane] = highs[lane] = 0


@njit(**FAST)
def store_results(job, work, head, first, here, share):
    """Write normalized sums to ``out`` [N, H, D] and log-sum-exps to ``lse`` [N, H]."""
    size = job.size
    tops, totals = f32(work + job.w_top), f32(work + job.w_total)
    for lane in range(here * share):
        column = f32(work + job.w_acc + lane // BLOCK * size * STEP + 4 * (lane % BLOCK))
        at = (first + lane // share) * job.heads + head * share + lane % share
        to, total = f32(job.out + 4 * size * at), totals[lane]
        factor = np.float32(1) / total if total > np.float32(0) else np.float32(0)
        for d in range(size):
            to[d] = column[BLOCK * d] * factor
        write_lse(job.lse + 4 * at, tops[lane], total)


@njit(**FAST)
def attend_task(job, work, head, first, here):
    """All that ``here`` queries from ``first`` on see, in one kv head."""
    size, share = job.size, job.heads // job.kv_heads
    blocks = (here * share + BLOCK - 1) // BLOCK
    load_queries(job, work, head, first, here, share, blocks)
    tops, totals, acc = f32(work + job.w_top), f32(work + job.w_total), f32(work + job.w_acc)
    for lane in range(blocks * BLOCK):
        tops[lane], totals[lane] = NOTHING, np.float32(0)
    for i in range(blocks * BLOCK * size):
        acc[i] = np.float32(0)
    start, stop = max(0, job.low + first), min(job.tokens, job.high + first + here - 1)
    all_see, all_saw = job.low + first + here - 1, job.high + first  # tokens from the one to before the other are seen by all
    for token in range(start, stop, KEYS):
        count = min(KEYS, stop - token)
        keys = job.keys + head * job.key_head + token * job.key_row
        values = job.values + head * job.value_head + token * job.value_row
        for block in range(blocks):
            lane, part = 4 * BLOCK * block, size * STEP * block
            scores = work + job.w_scores
            product(count, work + job.w_q + part, size, keys, job.key_row, 4, scores, False)
            if token < all_see or token + count > all_saw:
                hide(scores, token, count, work + job.w_low + lane, work + job.w_high + lane)
            soften(scores, count, work + job.w_top + lane, work + job.w_total + lane, work + job.w_acc + part, size)
            product(size, scores, count, values, 4, job.value_row, work + job.w_acc + part, True)
    store_results(job, work, head, first, here, share)


def build_flash(stamp):
    """Kernel of ``flash``. Threads take tasks from a counter, the last queries first: they see most."""

    def flash(address):
        if stamp == 0:
            return
        job = flash_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        runs = (job.count + job.positions - 1) // job.positions
        while True:
            task = fetch_add(address, 1)
            if task >= runs * job.kv_heads:
                break
            first = (runs - 1 - task // job.kv_heads) * job.positions
            attend_task(job, work, task % job.kv_heads, first, min(job.positions, job.count - first))

    return flash


FLASH = Entry(build_flash, FIELDS)


def flash(q: Tensor, k: Tensor, v: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Query n of ``q`` [N, H, D] sees tokens ``low + n .. high + n - 1`` of k, v [KH, T, D], as far as there are such.

    float32. Output [N, H, D] and log-sum-exp [N, H], new; zeros and -inf of a query that sees nothing.
    """
    count, heads, size = q.shape
    kv_heads, tokens, _ = k.shape
    assert q.dtype == k.dtype == v.dtype == torch.float32 and k.shape == v.shape == (kv_heads, tokens, size), (k.shape, v.shape)
    assert heads % kv_heads == 0 and max(abs(low), abs(high)) + count < 2**31, (heads, kv_heads, low, high)
    q = q if q.stride()[1:] == (size, 1) else q.contiguous()
    k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
    positions = max(1, LANES // (heads // kv_heads))
    lanes = -(-positions * (heads // kv_heads) // BLOCK) * BLOCK
    sizes = {
        "w_q": 4 * size * lanes,
        "w_scores": STEP * KEYS,
        "w_acc": 4 * size * lanes,
        "w_top": 4 * lanes,
        "w_total": 4 * lanes,
        "w_low": 4 * lanes,
        "w_high": 4 * lanes,
    }
    where, nbytes = offsets(sizes, PARTS)
    threads = min(torch.get_num_threads(), -(-count // positions) * kv_heads)
    work = workspace(threads * nbytes)
    out, lse = torch.empty(count, heads, size, dtype=torch.float32), torch.empty(count, heads, dtype=torch.float32)
    FLASH(
        threads, 0, 0, q.data_ptr(), 4 * q.stride(0), k.data_ptr(), 4 * k.stride(0), 4 * k.stride(1), v.data_ptr(),
        4 * v.stride(0), 4 * v.stride(1), out.data_ptr(), lse.data_ptr(), count, heads, kv_heads, size, tokens, low, high,
        positions, work.data_ptr(), nbytes, *where,
    )  # fmt: skip
    return out, lse
