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

from skvq.kernels.numba_cpu.amx import SIDE, clear, close_tiles, multiply_tiles, open_tiles
from skvq.kernels.numba_cpu.amx import STEP as TILES
from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.flash_amx import hide_rows, keys_to_tiles, queries_to_tiles, soften_to_tiles, values_to_tiles
from skvq.kernels.numba_cpu.flash_simd import BLOCK, STEP, hide, soften
from skvq.kernels.numba_cpu.job import offsets, record
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.numeric import NOTHING
from skvq.kernels.numba_cpu.permission import has_amx
from skvq.kernels.numba_cpu.products import product
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i32, record_at
from skvq.kernels.numba_cpu.softmax import write_lse
from skvq.kernels.numba_cpu.tiles import FAST

FIELDS = (
    "counter", "members", "q", "q_row", "keys", "key_head", "key_row", "values", "value_head", "value_row", "out", "lse",
    "count", "heads", "kv_heads", "size", "tokens", "low", "high", "positions", "work", "work_bytes",
    "w_q", "w_scores", "w_acc", "w_top", "w_total", "w_low", "w_high",
    "w_keys", "w_values", "w_weights", "w_turn", "w_row", "w_none",  # of AMX
)  # fmt: skip
PARTS = FIELDS[FIELDS.index("w_q") :]
LANES, LANES_BY_TILES = 128, 384
"""Of a task, at most. By tiles more, for keys and values are taken apart for each."""
KEYS = 128
flash_job = record_at(record(*FIELDS))


@njit(**FAST)
def load_queries(job, work, head, first, here, share, blocks):
    """Write the queries times log2(e)/sqrt(D) to ``w_q`` [block][D][32]; empty lanes are zeros."""
    size = job.size
    factor = np.float32(1.4426950408889634 / np.sqrt(size))
    for lane in range(blocks * BLOCK):
        column = f32(work + job.w_q + lane // BLOCK * size * STEP + 4 * (lane % BLOCK))
        n = first + lane // share
        if lane < here * share:
            given = f32(job.q + n * job.q_row + 4 * size * (head * share + lane % share))
            for d in range(size):
                column[BLOCK * d] = given[d] * factor
        else:
            for d in range(size):
                column[BLOCK * d] = np.float32(0)


@njit(**FAST)
def start_state(job, work, first, here, share, blocks):
    """What each lane sees, empty ones nothing, and its maximum and sums before any token."""
    lows, highs = i32(work + job.w_low), i32(work + job.w_high)
    tops, totals, acc = f32(work + job.w_top), f32(work + job.w_total), f32(work + job.w_acc)
    for lane in range(blocks * BLOCK):
        n = first + lane // share
        lows[lane] = highs[lane] = 0
        if lane < here * share:
            lows[lane], highs[lane] = max(0, job.low + n), min(job.tokens, job.high + n)
        tops[lane], totals[lane] = NOTHING, np.float32(0)
    for i in range(blocks * BLOCK * job.size):
        acc[i] = np.float32(0)


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
def hide_block(job, work, block, token, count):
    """Hide scores of tokens that not all lanes of a block see."""
    lane = 4 * BLOCK * block
    hide(work + job.w_scores, token, count, work + job.w_low + lane, work + job.w_high + lane)


@njit(**FAST)
def load_tokens(job, work, keys, values, count):
    """Keys and values are read where they lie."""


@njit(**FAST)
def load_tokens_as_tiles(job, work, keys, values, count):
    """Keys and values of a run of tokens, for all blocks of a task."""
    keys_to_tiles(keys, job.key_row, job.size, count, work + job.w_keys)
    values_to_tiles(job, work, values, count, work + job.w_values)


@njit(**FAST)
def attend_block(job, work, block, token, count, keys, values, edge):
    """A block's lanes attend to a run of tokens."""
    size, part, lane, scores = job.size, job.size * STEP * block, 4 * BLOCK * block, work + job.w_scores
    product(count, work + job.w_q + part, STEP, size, keys, job.key_row, 4, scores, STEP, False)
    if edge:
        hide_block(job, work, block, token, count)
    acc = work + job.w_acc + part
    soften(scores, count, work + job.w_top + lane, work + job.w_total + lane, acc, size)
    product(size, scores, STEP, count, values, 4, job.value_row, acc, STEP, True)


@njit(**FAST)
def attend_block_by_tiles(job, work, block, token, count, keys, values, edge):
    """The same by AMX."""
    part, scores, weights = job.size * STEP * block, work + job.w_scores, work + job.w_weights
    rows, channels = (count + SIDE - 1) // SIDE, job.size // SIDE  # in tiles by two, and steps
    for p in range(rows):
        tiles = work + job.w_keys + p * channels * TILES
        multiply_tiles(tiles, work + job.w_q + part, channels, scores + SIDE * STEP * p, STEP, False)
    if edge:
        hide_block(job, work, block, token, count)
    hide_rows(scores, count, rows)
    acc, lane = work + job.w_acc + part, 4 * BLOCK * block
    soften_to_tiles(scores, rows, work + job.w_top + lane, work + job.w_total + lane, acc, job.size, weights)
    for p in range(channels):
        tiles = work + job.w_values + p * rows * TILES
        multiply_tiles(tiles, weights, rows, acc + SIDE * STEP * p, STEP, True)


def _make_attend_task(load_queries, load_tokens, attend_block):
    @njit(**FAST)
    def attend_task(job, work, head, first, here):
        """All that ``here`` queries from ``first`` on see, in one kv head."""
        share = job.heads // job.kv_heads
        blocks = (here * share + BLOCK - 1) // BLOCK
        load_queries(job, work, head, first, here, share, blocks)
        start_state(job, work, first, here, share, blocks)
        start, stop = max(0, job.low + first), min(job.tokens, job.high + first + here - 1)
        all_see, all_saw = job.low + first + here - 1, job.high + first  # tokens from the one to before the other: seen by all
        for token in range(start, stop, KEYS):
            count = min(KEYS, stop - token)
            keys = job.keys + head * job.key_head + token * job.key_row
            values = job.values + head * job.value_head + token * job.value_row
            load_tokens(job, work, keys, values, count)
            for block in range(blocks):
                attend_block(job, work, block, token, count, keys, values, token < all_see or token + count > all_saw)
        store_results(job, work, head, first, here, share)

    return attend_task


attend_task = _make_attend_task(load_queries, load_tokens, attend_block)
attend_task_by_tiles = _make_attend_task(queries_to_tiles, load_tokens_as_tiles, attend_block_by_tiles)


@njit(**FAST)
def next_task(job, address):
    """First query (-1: none is left), kv head and queries of the next task; the last queries come first: they see most."""
    task = fetch_add(address, 1)
    runs = (job.count + job.positions - 1) // job.positions
    first = (runs - 1 - task // job.kv_heads) * job.positions
    return first, task % job.kv_heads, min(job.positions, job.count - first)


def build_flash(stamp):
    """Kernel of ``flash``. Threads take tasks from a counter."""

    def flash(address):
        if stamp == 0:
            return
        job = flash_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        while True:
            first, head, here = next_task(job, address)
            if first < 0:
                break
            attend_task(job, work, head, first, here)

    return flash


def build_flash_amx(stamp):
    """The same by AMX."""

    def flash_amx(address):
        if stamp == 0:
            return
        job = flash_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        clear(work + job.w_none, STEP)
        open_tiles()
        while True:
            first, head, here = next_task(job, address)
            if first < 0:
                break
            attend_task_by_tiles(job, work, head, first, here)
        close_tiles()

    return flash_amx


FLASH, FLASH_AMX = Entry(build_flash, FIELDS), Entry(build_flash_amx, FIELDS)


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
    by_tiles = size % SIDE == 0 and has_amx()
    positions = max(1, (LANES_BY_TILES if by_tiles else LANES) // (heads // kv_heads))
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
    tiles = {
        "w_keys": 4 * size * KEYS,
        "w_values": 4 * size * KEYS,
        "w_weights": STEP * KEYS,
        "w_turn": 64 * size,
        "w_row": 4 * size,
        "w_none": STEP,
    }
    sizes |= tiles if by_tiles else dict.fromkeys(tiles, 0)
    where, nbytes = offsets(sizes, PARTS)
    threads = min(torch.get_num_threads(), -(-count // positions) * kv_heads)
    work = workspace(threads * nbytes)
    out, lse = torch.empty(count, heads, size, dtype=torch.float32), torch.empty(count, heads, dtype=torch.float32)
    (FLASH_AMX if by_tiles else FLASH)(
        threads, 0, 0, q.data_ptr(), 4 * q.stride(0), k.data_ptr(), 4 * k.stride(0), 4 * k.stride(1), v.data_ptr(),
        4 * v.stride(0), 4 * v.stride(1), out.data_ptr(), lse.data_ptr(), count, heads, kv_heads, size, tokens, low, high,
        positions, work.data_ptr(), nbytes, *where,
    )  # fmt: skip
    return out, lse
