"""cuDNN's attention, up to twice as fast as flash attention on Hopper, used where it applies and agrees with flash.

What torch's op does was read in its sources (2.10 to 2.13): log-sum-exp natural, float32 [B, H, N, 1]; as many query as kv
heads (no ``enable_gqa``); a causal mask aligned to the upper left, so only whole rectangles are asked of it, without a mask.
cuDNN makes a plan for every shape and stride, in tenths of a second, and torch keeps it under strides of 32 bits: hence
``blocks``, numbers of queries that are powers of two, and keys that lie by token.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.kernels.notices import notice

BLOCK_TOKENS = 1024
"""Fewest keys in a call: the chunk of prefill, so that what lies before one is blocks and nothing else."""

LEAST_QUERIES = 128
MOST_CHANNELS = 128
FLASH_CHANNELS = 256
"""Most that torch's flash attention takes of a head."""


def blocks(tokens: int) -> list[tuple[int, int]]:
    """Start and stop of runs of keys: powers of two of at least BLOCK_TOKENS, longest first, then what is left, if anything.

    A prompt of any length so has calls of few lengths: 11 of them up to a million tokens.

    >>> blocks(27000)
    [(0, 16384), (16384, 24576), (24576, 26624), (26624, 27000)]
    """
    found, start = [], 0
    while tokens - start >= BLOCK_TOKENS:
        stop = start + (1 << (tokens - start).bit_length() - 1)
        found.append((start, stop))
        start = stop
    return [*found, (start, tokens)] if start < tokens else found


class CudnnAttention:
    """The attention of cuDNN on a card of a compute capability.

    Each new shape is computed by flash attention too and compared; once one differs, or cuDNN raises, a line on stderr says so
    and nothing is asked of it any more. Hopper alone: flash attention is at home on Ampere, and on Blackwell some releases of
    cuDNN are wrong without a word (pytorch issue 193893).
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self.trusted = capability[0] == 9
        self._checked: set[tuple[object, ...]] = set()

    def takes(self, q: Tensor, count: int) -> bool:
        """Whether ``count`` queries, which are q [H, N, D] with those that share a kv head in a row, are worth ``blocks``."""
        return (
            self.trusted
            and q.dtype in (torch.float16, torch.bfloat16)
            and q.shape[2] % 8 == 0
            and q.shape[2] <= MOST_CHANNELS
            and count >= LEAST_QUERIES
            and count.bit_count() == 1
        )

    def takes_block(self, k: Tensor) -> bool:
        """Whether keys [H, T, D] are a block of those lengths, and near enough to each other for strides of 32 bits."""
        reach = sum((size - 1) * stride for size, stride in zip(k.shape, k.stride(), strict=True))
        return self.trusted and k.shape[1] >= BLOCK_TOKENS and k.shape[1].bit_count() == 1 and reach < 2**31

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Every query of q [H, N, D] sees every token of k, v [H, T, D], all of one 16-bit dtype: output, and natural
        log-sum-exp float32 [H, N]."""
        try:
            out, lse = cudnn_attention(q, k, v)
        except RuntimeError as error:
            self._refuse(q, k, f"failed ({(str(error).splitlines() or ['no message'])[0][:200]})")
            return flash_attention(q, k, v)
        kind = (q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride())
        if kind in self._checked:
            return out, lse
        wanted, wanted_lse = flash_attention(q, k, v)
        apart, lse_apart = row_error(out, wanted), float((lse - wanted_lse).abs().max())
        allowed = 4 * torch.finfo(q.dtype).eps
        if not (apart <= allowed and lse_apart <= allowed):  # a nan is neither
            off = f"{apart:.2g}, log-sum-exp {lse_apart:.2g}, {allowed:.2g} allowed"
            self._refuse(q, k, f"differs from flash attention by {off}")
            return wanted, wanted_lse
        self._checked.add(kind)
        return out, lse

    def _refuse(self, q: Tensor, k: Tensor, what: str) -> None:
        self.trusted = False
        dtype, (heads, count, size) = str(q.dtype).removeprefix("torch."), q.shape
        shape = f"{dtype}, {heads} heads of {size}, {count} queries, {k.shape[1]} keys"
        notice(f"cuDNN's attention ({shape}) {what}; prefill continues with flash attention")


@functools.cache
def cudnn_on(device: torch.device) -> CudnnAttention:
    """The instance for a device: what it has found out holds for the whole process."""
    return CudnnAttention(torch.cuda.get_device_capability(device))


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN, unchecked: arguments and results of ``CudnnAttention.attend``."""
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(q[None], k[None], v[None], None, True, 0.0, False, False)
    return out[0], lse.reshape(q.shape[:2])


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Torch's flash attention on a card: arguments and results of ``CudnnAttention.attend``; ``causal`` where N = T. In
    float32, or for heads of more than 256, its memory-efficient attention. Both want heads of a multiple of 8: they are padded.
    """
    size, aten = q.shape[2], torch.ops.aten
    scale = size**-0.5
    if size % 8:
        q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
    q, k, v = q[None], k[None], v[None]
    if q.dtype == torch.float32 or size > FLASH_CHANNELS:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out[0, :, :, :size], lse[0, :, : q.shape[2]].float()


def row_error(got: Tensor, wanted: Tensor) -> float:
    """Largest distance of two rows of [H, N, D], as a share of the head's largest row."""
    wanted = wanted.float()
    apart = (got.float() - wanted).norm(dim=-1).amax(-1)
    return float((apart / wanted.norm(dim=-1).amax(-1).clamp_min(torch.finfo(torch.float32).tiny)).max())
