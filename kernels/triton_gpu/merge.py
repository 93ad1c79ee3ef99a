# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""One softmax from partial ones (``reference.merge``), each part read once, in the form that attention left it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import MOST_PARTS


@triton.jit
def add_part(out_ptr, lse_ptr, at, row, inside, d, channels, total, acc):
    """``acc`` and one part's rows [R, D], weighed by its share of the softmax."""
    share = tl.exp(tl.load(lse_ptr + row, mask=inside, other=float("-inf")) - total)
    rows = tl.load(out_ptr + at[:, None] + d[None, :], mask=inside[:, None] & channels[None, :], other=0.0)
    return acc + share[:, None] * rows.to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    own_ptr, own_lse_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr, out6_ptr, out7_ptr,
    lse1_ptr, lse2_ptr, lse3_ptr, lse4_ptr, lse5_ptr, lse6_ptr, lse7_ptr, merged_ptr, total_ptr,
    count, heads, repeat, size, own_head, own_repeat, own_token, stride_head, stride_repeat, stride_token,
    COUNT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows: query n of head h is row ``h * count + n``.

    The first part has strides of its own, the other COUNT - 1 share theirs; log-sum-exps are float32 [H, N]. Writes rows
    [N, H, size] and float32 [N, H]. Reads and writes each number once.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < heads * count
    head, n = row // count, row % count
    d = tl.arange(0, D)
    top = tl.load(own_lse_ptr + row, mask=inside, other=0.0)
    parts = (lse1_ptr, lse2_ptr, lse3_ptr, lse4_ptr, lse5_ptr, lse6_ptr, lse7_ptr)
    for i in tl.static_range(COUNT - 1):
        top = tl.maximum(top, tl.load(parts[i] + row, mask=inside, other=0.0))
    finite = tl.maximum(top, -3.4028234663852886e38)  # where nothing is seen: weights of nothing are zero
    weight = tl.exp(tl.load(own_lse_ptr + row, mask=inside, other=0.0) - finite)
    for i in tl.static_range(COUNT - 1):
        weight += tl.exp(tl.load(parts[i] + row, mask=inside, other=0.0) - finite)
    total = finite + tl.log(weight)
    tl.store(total_ptr + n * heads + head, total, mask=inside)
    total = tl.maximum(total, -3.4028234663852886e38)
    kv_head, r = (head // repeat).to(tl.int64), (head % repeat).to(tl.int64)
    own = kv_head * own_head + r * own_repeat + n.to(tl.int64) * own_token
    at = kv_head * stride_head + r * stride_repeat + n.to(tl.int64) * stride_token
    acc = add_part(own_ptr, own_lse_ptr, own, row, inside, d, d < size, total, tl.zeros([BLOCK, D], tl.float32))
    outs = (out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr, out6_ptr, out7_ptr)
    for i in tl.static_range(COUNT - 1):
        acc = add_part(outs[i], parts[i], at, row, inside, d, d < size, total, acc)
    place = (n.to(tl.int64) * heads + head) * size
    there = inside[:, None] & (d < size)[None, :]
    tl.store(merged_ptr + place[:, None] + d[None, :], acc.to(merged_ptr.dtype.element_ty), mask=there)


def merge_parts(outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs [KH, rep, N, D] of any strides, log-sum-exps float32 [KH, rep, N]: one ``dtype`` [N, H, D], float32 [N, H]."""
    assert len(outs) == len(lses) > 0, (len(outs), len(lses))
    kv_heads, repeat, count, size = outs[0].shape
    assert all(o.shape == outs[0].shape and o.stride(3) == 1 for o in outs), [o.shape for o in outs]
    assert all(x.shape == outs[0].shape[:3] and x.dtype == torch.float32 for x in lses), [x.shape for x in lses]
    heads = kv_heads * repeat
    if len(outs) > MOST_PARTS:
        out, lse = merge_parts(outs[:MOST_PARTS], lses[:MOST_PARTS], torch.float32)
        own = (out.view(count, kv_heads, repeat, size).permute(1, 2, 0, 3), lse.T.reshape(kv_heads, repeat, count))
        return merge_parts([own[0], *outs[MOST_PARTS:]], [own[1], *lses[MOST_PARTS:]], dtype)
    alike = all(o.stride() == outs[-1].stride() and o.dtype == outs[-1].dtype for o in outs[1:])
    others = list(outs[1:]) if alike else [o.to(outs[-1].dtype).contiguous() for o in outs[1:]]
    parts = [outs[0], *others]
    whole = [lse.contiguous() for lse in lses]
    merged = torch.empty(count, heads, size, dtype=dtype, device=outs[0].device)
    total = torch.empty(count, heads, dtype=torch.float32, device=outs[0].device)
    spare = [parts[-1]] * (MOST_PARTS - len(parts)), [whole[-1]] * (MOST_PARTS - len(parts))
    block = 16
    merge_kernel[(triton.cdiv(heads * count, block),)](
        parts[0], whole[0], *parts[1:], *spare[0], *whole[1:], *spare[1], merged, total,
        count, heads, repeat, size, *parts[0].stride()[:3], *parts[-1].stride()[:3],
        COUNT=len(parts), D=triton.next_power_of_2(size), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return merged, total
