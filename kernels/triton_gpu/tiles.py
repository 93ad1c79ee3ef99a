# mypy: ignore-errors
# ruff: noqa: N803, RET505, RUF005, SIM108
"""Parts of the attention loop over packed tiles: loads, dots on codes, the key mean, sums undone and written."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.loaders import pair_rows, perm4, planes

NEVER = tl.constexpr(-1.0e30)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2^x; one instruction where assembly is at hand (``tl.exp2`` spends three more on denormal results)."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def first_of_pairs(x, ROWS: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr):
    """Real columns of ``x`` [ROWS, NH * PAD]; with PAD 2 every other column is idle."""
    if PAD == 2:
        real, _ = tl.split(tl.reshape(x, [ROWS, NH, 2]))
        return real
    else:
        return x


@triton.jit
def weight_columns(w, TRITS: tl.constexpr, ROWS: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr):
    """fp16 columns of the weights ``w`` [ROWS, NH] for the second dot; for trits a high and a low half of each."""
    high = w.to(tl.float16)
    if TRITS:
        low = (w - high.to(tl.float32)).to(tl.float16)
        return tl.reshape(tl.join(high, low), [ROWS, NH * PAD])
    elif PAD == 2:
        return tl.reshape(tl.join(high, tl.zeros_like(high)), [ROWS, NH * PAD])
    else:
        return high


@triton.jit
def load_planes(
    base, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, BLOCKS: tl.constexpr,
    SKIP: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, CUMULATIVE: tl.constexpr, NORMAL: tl.constexpr,
    PERMUTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Planes of BLOCKS byte blocks [ROWS, COLUMNS] in channel order: plane p, block j is entry ``p * BLOCKS + j``.

    Byte (r, c) of block j lies at ``base + first + j * SKIP + r * ROW + c * COLUMN``. PERMUTED: rows in ``perm4`` order.
    """
    r = perm4(tl.arange(0, ROWS), PERMUTED)
    at = first + r[:, None] * ROW + tl.arange(0, COLUMNS)[None, :] * COLUMN
    by_block = ()
    for j in tl.static_range(BLOCKS):
        raw = tl.load(base + (at + j * SKIP))
        by_block = by_block + (planes(raw, WIDTH, OFFSET, CUMULATIVE, NORMAL, ASM),)
    out = ()
    for p in tl.static_range(len(by_block[0])):
        for j in tl.static_range(BLOCKS):
            out = out + (by_block[j][p],)
    return out


@triton.jit
def load_rows(base, ROWS: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Tuple of the fragments [EACH, N] of q, ROWS / EACH of them, stored by column or by row.

    By column they come as the tensor core's second operand wants them, and stay in registers; by row they stay in shared
    memory, at the cost of register moves: better where five shares of a tile need the registers.
    """
    at = tl.arange(0, EACH)[:, None] * (1 if BY_COLUMN else N) + tl.arange(0, N)[None, :] * (EACH if BY_COLUMN else 1)
    out = ()
    for i in tl.static_range(ROWS // EACH):
        out = out + (tl.load(base + i * EACH * N + at),)
    return out


@triton.jit
def zero_rows(COUNT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([ROWS, N], tl.float32),)
    return out


@triton.jit
def dots(a, b, sums):
    """``sums`` plus the dots of ``a`` with ``b``; each group's sum takes an equal share of them, in order."""
    each: tl.constexpr = len(a) // len(sums)
    out = ()
    for g in tl.static_range(len(sums)):
        s = sums[g]
        for i in tl.static_range(each):
            s = tl.dot(a[g * each + i], b[g * each + i], s)
        out = out + (s,)
    return out


@triton.jit
def dots_each(a, weights, scale, accumulators):
    """``accumulators * scale + a . weights`` entry by entry; the entries of ``weights`` serve equal shares of ``a``."""
    each: tl.constexpr = len(a) // len(weights)
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.dot(a[i], weights[i // each], accumulators[i] * scale),)
    return out


@triton.jit
def bit_rows(base, ROWS: tl.constexpr, NORMAL: tl.constexpr, PERMUTED: tl.constexpr):
    """Planes of single bits of 8 bytes a row, in pairs: column ``2 b + i`` of entry p is bit ``2 p + i`` of byte b.

    Every byte is loaded twice. ``pair_rows`` would do without, but of such operands Triton 3.7 contracts one half twice.
    """
    r = perm4(tl.arange(0, ROWS), PERMUTED)
    c = tl.arange(0, 16)
    raw = tl.load(base + r[:, None] * 8 + (c // 2)[None, :])
    out = ()
    for p in tl.static_range(4):
        mask = ((1 << 2 * p) << (c % 2)).to(tl.uint8)[None, :]
        half = (raw & mask).to(tl.uint16)
        if NORMAL:
            out = out + ((half | 0x6400).to(tl.float16, bitcast=True) - (mask.to(tl.float16) + 1024.0).to(tl.float16),)
        else:
            out = out + (half.to(tl.float16, bitcast=True),)
    return out


@triton.jit
def key_scores(
    base, SUB: tl.constexpr, q_low, q_high, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    SHARE: tl.constexpr, NORMAL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Raw scores ``q . code`` of share SUB of a tile: G tensors [SHARE, N]."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    row: tl.constexpr = D * low // 8
    wide: tl.constexpr = row if row < D // G else D // G
    cumulative: tl.constexpr = low == 2 and BITS == 2 and G == 1 and not NORMAL
    offset: tl.constexpr = 0 if BITS == 3 else 2 ** (BITS - 1)
    part = load_planes(
        base, SUB * SHARE * row, SHARE, wide, row, 1, row // wide, wide, low, offset, cumulative, NORMAL, ASM, ASM
    )
    s = dots(part, q_low, zero_rows(G, SHARE, q_low[0].shape[1]))
    if BITS == 3:
        first: tl.constexpr = TILE * row + SUB * SHARE * (D // 8)
        if D == 64:
            part = bit_rows(base + first, SHARE, NORMAL, ASM)
        else:
            part = load_planes(base, first, SHARE, D // 8, D // 8, 1, 1, 0, 1, 1, False, NORMAL, ASM, ASM)
        s = dots(part, q_high, s)
    return s


@triton.jit
def key_scores_trits(base, q_low, N: tl.constexpr, D: tl.constexpr, G: tl.constexpr, NORMAL: tl.constexpr, ASM: tl.constexpr):
    """Raw scores ``q . code`` of the five shares of 32 tokens of a tile of trits: five tuples of G tensors [32, N]."""
    prefix = zero_rows(5 * G, 32, N)
    for i in tl.static_range(D // 32):
        part = load_planes(base, i * 32, 32, 32, D, 1, 1, 0, 15, 0, False, NORMAL, ASM, ASM)
        new = ()
        for j in tl.static_range(5 * G):
            if j // 5 == i * G // (D // 32):
                new = new + (tl.dot(part[j % 5], q_low[i], prefix[j]),)
            else:
                new = new + (prefix[j],)
        prefix = new
    out = ()
    for k in tl.static_range(5):
        score = ()
        for g in tl.static_range(G):
            score = score + ((prefix[g * 5 + k] - 3.0 * prefix[g * 5 + k - 1]) if k > 0 else prefix[g * 5],)
        out = out + (score,)
    return out


@triton.jit
def value_share(
    base, SUB: tl.constexpr, weights, scale, low_sums, high_sums, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    TILE: tl.constexpr, SHARE: tl.constexpr, NORMAL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add share SUB of a tile to the sums of every plane: (low_sums, high_sums) * scale + codes . weights."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    rows: tl.constexpr = D * low // 8
    wide: tl.constexpr = rows if rows < D // G else D // G
    cumulative: tl.constexpr = low == 2 and BITS == 2 and G == 1 and not NORMAL
    offset: tl.constexpr = 0 if BITS == 3 else 2 ** (BITS - 1)
    part = load_planes(
        base, SUB * SHARE, wide, SHARE, TILE, 1, rows // wide, wide * TILE, low, offset, cumulative, NORMAL, False, ASM
    )
    low_sums = dots_each(part, weights, scale, low_sums)
    if BITS == 3:
        part = load_planes(base, rows * TILE + SUB * SHARE, D // 8, SHARE, TILE, 1, 1, 0, 1, 1, False, NORMAL, False, ASM)
        if D == 64:
            part = pair_rows(part)
        high_sums = dots_each(part, weights, scale, high_sums)
    return low_sums, high_sums


@triton.jit
def value_trits(
    base, weights, scales, factor, sums, D: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr,
    NORMAL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add a tile of trits to the sums: ``sum_k P_k (D_k - 3 D_(k-1)) = sum_k (P_k - 3 P_(k+1)) D_k``, P in two halves."""
    columns = ()
    for g in tl.static_range(G):
        for k in tl.static_range(5):
            w = weights[k] * scales[k * G + g][:, None]
            if k < 4:
                w -= 3.0 * (weights[k + 1] * scales[(k + 1) * G + g][:, None])
            columns = columns + (weight_columns(w, True, 32, NH, PAD),)
    out = ()
    for i in tl.static_range(D // 32):
        codes = load_planes(base, i * 1024, 32, 32, 32, 1, 1, 0, 15, 0, False, NORMAL, False, ASM)
        acc = sums[i] * factor
        for k in tl.static_range(5):
            acc = tl.dot(codes[k], columns[i * G // (D // 32) * 5 + k], acc)
        out = out + (acc,)
    return out


@triton.jit
def mean_scores(
    turn, place_cos, place_sin, step_cos, step_sin, cosines, sines, SHARES: tl.constexpr, STEPS: tl.constexpr,
    D: tl.constexpr, NH: tl.constexpr,
):  # fmt: skip
    """``q . RoPE_t(mean)`` of the tokens of a part, a tuple of SHARES tensors [tokens, NH], up to a scale.

    ``sum_j A_j cos(w_j t) + B_j sin(w_j t)`` with t = base + 32 a + j: A and B (``cosines``, ``sines`` [D/2, NH]) are turned to
    each 32-token step of the part and contracted with one table of 32 places; pairs of steps share the columns of a dot.
    """
    j = tl.arange(0, D // 2)
    base_cos, base_sin = tl.load(turn + j)[:, None], tl.load(turn + D // 2 + j)[:, None]
    out = ()
    if STEPS == 4:
        cos = base_cos * step_cos[0] - base_sin * step_sin[0]  # [D/2, 4]
        sin = base_sin * step_cos[0] + base_cos * step_sin[0]
        cos = tl.expand_dims(tl.reshape(cos, [D // 2, 2, 2]), 2)  # [D/2, 2, 1, 2]
        sin = tl.expand_dims(tl.reshape(sin, [D // 2, 2, 2]), 2)
        a = tl.expand_dims(tl.expand_dims(cosines, 1), 3)  # [D/2, 1, NH, 1]
        b = tl.expand_dims(tl.expand_dims(sines, 1), 3)
        with_cos = tl.reshape((a * cos + b * sin).to(tl.float16), [D // 2, 4 * NH])
        with_sin = tl.reshape((b * cos - a * sin).to(tl.float16), [D // 2, 4 * NH])
        z = tl.dot(place_sin, with_sin, tl.dot(place_cos, with_cos))
        out = (tl.reshape(tl.permute(tl.reshape(z, [32, 2, NH, 2]), (1, 3, 0, 2)), [128, NH]),)
    else:
        for n in tl.static_range(3 if SHARES == 5 else 1):
            cos = tl.expand_dims(base_cos * step_cos[n] - base_sin * step_sin[n], 1)  # [D/2, 1, 2]
            sin = tl.expand_dims(base_sin * step_cos[n] + base_cos * step_sin[n], 1)
            a = tl.expand_dims(cosines, 2)  # [D/2, NH, 1]
            b = tl.expand_dims(sines, 2)
            with_cos = tl.reshape((a * cos + b * sin).to(tl.float16), [D // 2, 2 * NH])
            with_sin = tl.reshape((b * cos - a * sin).to(tl.float16), [D // 2, 2 * NH])
            z = tl.dot(place_sin, with_sin, tl.dot(place_cos, with_cos))
            first, second = tl.split(tl.reshape(z, [32, NH, 2]))
            out = out + (first, second)
        if SHARES == 1:
            out = (tl.reshape(tl.permute(tl.join(out[0], out[1]), (2, 0, 1)), [64, NH]),)
    return out


@triton.jit
def high_rows(y, PLANE: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr):
    """Sums [16, NH] of the high bit of 3-bit codes in channel order, times four."""
    y = first_of_pairs(y, 16, NH, PAD)
    if D == 64:
        a, b = tl.split(tl.permute(tl.reshape(y, [8, 2, NH]), (0, 2, 1)))
        a, b = a * (4.0 / 4**PLANE), b * (2.0 / 4**PLANE)
        return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [16, NH])
    else:
        return y * (4.0 / 2**PLANE)


@triton.jit
def store_sums(
    out, low_sums, high_sums, mids, unit_ptr, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    NH: tl.constexpr, PAD: tl.constexpr, NORMAL: tl.constexpr, META: tl.constexpr, stride_column,
):  # fmt: skip
    """Undo the places of the planes and write ``(sum p vs (code - half) + p vm) * unit`` of every channel."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    blocks: tl.constexpr = D * low // (8 * EACH) if BITS != 15 else 1
    cumulative: tl.constexpr = BITS == 2 and G == 1 and not NORMAL
    one: tl.constexpr = 1.0 if NORMAL else 16777216.0
    h = tl.arange(0, NH)
    r = tl.arange(0, EACH)
    for i in tl.static_range(len(low_sums)):
        x = low_sums[i]
        if cumulative and i > 0:
            x = x - low_sums[i - 1]
        if BITS == 15:
            x, rest = tl.split(tl.reshape(x, [EACH, NH, 2]))
            x += rest
        else:
            x = first_of_pairs(x, EACH, NH, PAD)
        x = x * (one / (1 if BITS == 15 else 2 ** (low * (i // blocks))))
        if BITS == 3:
            if EACH == 32:
                above = high_rows(high_sums[2 * i], 2 * i, NH, PAD, D), high_rows(high_sums[2 * i + 1], 2 * i + 1, NH, PAD, D)
                x += one * tl.reshape(tl.permute(tl.join(above[0], above[1]), (2, 0, 1)), [32, NH])
            else:
                x += one * high_rows(high_sums[i], i, NH, PAD, D)
        x = (x + mids[i * EACH // (D // G)][None, :]) * (tl.load(unit_ptr + i * EACH // (D // G)) * META)
        tl.store(out + h[None, :] * stride_column + (i * EACH + r)[:, None], x)
