"""What a backend computes and the tensors it is given: the contract that ``reference`` specifies in torch.

Letters: B sequences of the batch, N tokens of this step, T cached tokens, H query heads, KH kv heads, D head size,
G groups in a head, P pages, S sequence slots, F full-precision slots of a sequence. Query head h reads kv head
``h // (H / KH)``. All tensors of a bundle lie on one device. Nothing here is ever copied: kernels write in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from skvq.kernels.experts import Experts
from skvq.kernels.graphs import Graphs
from skvq.kernels.layout import PageLayout
from skvq.kernels.linear import Linear

Codec = TypeVar("Codec", contravariant=True)

MOST_PARTS = 8
"""Partial softmaxes that one launch merges on a card, and ``dense.SoftmaxParts`` holds before it merges them: a chunk's own
tokens, and the blocks before it up to 131,072 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPages:
    """One layer's share of the arena. Layouts of the last dimension: ``layout.py``."""

    layout: PageLayout
    key_codes: Tensor  # uint8 [P, KH, key_bytes]
    value_codes: Tensor  # uint8 [P, KH, value_bytes]
    meta: Tensor  # int32 [P, KH, meta_words]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPages:
    """One layer's share of a 16-bit arena (method ``fp``): keys after RoPE, token-major."""

    keys: Tensor  # float16 or bfloat16 [P, KH, 1280, D]
    values: Tensor  # as keys


@dataclass(frozen=True, slots=True, kw_only=True)
class FullSlots:
    """One layer's full-precision tokens: first the retained slots, then the window as a ring.

    ``positions`` is the only word on what a slot holds: a token's position in its sequence, or a negative number for nothing.
    """

    keys: Tensor  # float16 or bfloat16 [S, KH, F, D], after RoPE
    values: Tensor  # as keys
    positions: Tensor  # int32 [S, F]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Whose turn it is: rows of the batch and how far each sequence is packed.

    A query at position t sees packed tokens ``0 .. packed-1`` that are not flagged as retained and full-precision slots
    with ``0 <= position <= t``; of both only those with ``t - position < span``.
    """

    slots: Tensor  # int64 [B], sequence slot of each row
    positions: Tensor  # int32 [B, N], position of each query
    packed: Tensor  # int32 [B], packed tokens of each row, whole tiles
    page_table: Tensor  # int32 [S, pages of the longest sequence]
    max_packed: int  # upper bound of `packed`, known to the host
    span: int  # attention span of this layer, `FULL_SPAN` if unlimited


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeFrequencies:
    """Channel pairs ``(j, D/2 + j)`` turn by ``position * inv_freq[j]`` and are scaled by ``scale`` (yarn, longrope)."""

    inv_freq: Tensor  # float64 [D/2]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How one side (keys or values) of one layer is quantized. Groups are [KH, G], or [KH * G] under labels."""

    unit: Tensor  # float32, power of two by group: metadata bytes count in it
    clip: Tensor  # float32, clip factor alpha by group: the first range is alpha times [min, max]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSide(Side):
    """A side whose codes are chosen together: they minimize ``e^T metric e`` over a head, e the error in the stored basis.

    ``factor`` is the Cholesky factor of the metric, upper, its rows divided by their diagonal: metric = F^T diag F.
    """

    metric: Tensor  # float32 [KH, D, D], symmetric positive definite
    factor: Tensor  # float32 [KH, D, D], unit upper triangular
    has_metric: bool  # False: it counts as the identity, every code is rounded on its own


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCodec:
    """Contiguous groups inside each head, keys stored after RoPE (methods ``rotate`` and ``plain``).

    Stored is x, the quantized ``y = key_basis (RoPE_t(k) - RoPE_t(key_mean))`` and ``y = value_basis (v - value_mean)``.
    Read is ``RoPE_t(k) ~ query_basis^T x + RoPE_t(key_mean)``, so a score is ``(query_basis q) . x + q . RoPE_t(key_mean)``,
    and ``v ~ output_basis x + value_mean``, so a sum of values whose weights p add to w is
    ``output_basis (sum p x) + w value_mean``. Reading need not be the exact inverse of storing: calibration fits it to what
    quantization does. All matrices act on column vectors of a head.
    """

    keys: HeadSide
    values: HeadSide
    key_mean: Tensor  # float32 [KH, D], before RoPE; pairs of zeros cost nothing
    key_basis: Tensor  # float32 [KH, D, D]
    query_basis: Tensor  # float32 [KH, D, D]
    value_mean: Tensor  # float32 [KH, D]
    value_basis: Tensor  # float32 [KH, D, D]
    output_basis: Tensor  # float32 [KH, D, D]
    rope: RopeFrequencies
    has_key_mean: bool  # False: key_mean is all zeros, a kernel may leave its term out
    has_basis: bool  # False: every basis is the identity and the means are zero (method `plain`)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCodec:
    """Groups of varying size over all KH*D channels of a layer, keys stored before RoPE (method ``reorder``, SKVQ).

    A channel's group is its label, 0 .. KH*G - 1; the metadata of group j lies with kv head ``j // G`` as its group ``j % G``.
    """

    keys: Side
    values: Side
    key_labels: Tensor  # int64 [KH * D]
    value_labels: Tensor  # int64 [KH * D]
    rope: RopeFrequencies


class Ops(Protocol):
    """Work of a layer. Inputs are never written, except where a method says so; norms are root-mean-square norms over the last
    dimension, computed in float32 (arXiv 1910.07467)."""

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        """``linear`` of the norm of x."""

    def norm_heads(self, q: Tensor, k: Tensor, query_norm: Tensor, key_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm of each head of q [B, N, H, D] and of k [B, N, KH, D], times their weights [D]."""

    def after_attention(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, gate_up: Linear, down: Linear
    ) -> Tensor:
        """``y + down(silu(gate) * up)`` of ``y = x + output(attended)`` and ``gate, up = gate_up(norm of y)``."""

    def after_attention_experts(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, experts: Experts
    ) -> Tensor:
        """The same where each token has experts of its own: ``y + sum of weight_e down_e(silu(gate_e) * up_e)`` over those that
        the router chooses for it."""

    def rope_to_slots(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, full: FullSlots, slots: Tensor, ring_slots: Tensor
    ) -> Tensor:
        """q [B, 1, H, D] after RoPE by cos and sin float32 [B, 1, 1, D/2], channels pairing as (j, D/2 + j).

        k [B, 1, KH, D] after RoPE and v are written to the full-precision slots ``ring_slots`` [B] of the sequence slots
        ``slots`` [B].
        """

    def rope_to_buffer(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor:
        """q [1, N, H, D] after RoPE by cos and sin float32 [1, N, 1, D/2].

        k [1, N, KH, D] after RoPE and v are written to tokens ``first .. first+N-1`` of ``keys`` and ``values`` [KH, T, D], of
        their dtype.
        """

    def turn(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE on q [B, N, H, D] by cos and sin float32 [B, N, 1, D/2]."""

    def merge(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One softmax of partial ones over disjoint sets of tokens: outputs [B, N, H, D] of one dtype and log-sum-exps float32
        [B, N, H], the first of them finite. The first output and log-sum-exp may be written."""


class BackendUnavailable(Exception):
    """The backend is unknown, or cannot be used on this device; the message says why."""


class PackedKernels(Protocol[Codec]):
    """Arithmetic on packed pages of one kind of codec. ``first``, ``count`` and T are whole tiles; ``page_row`` is the
    sequence's row of the page table."""

    def pack(
        self, pages: PackedPages, codec: Codec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        """Quantize T tokens, and write codes and metadata of tokens ``first .. first+T-1``.

        ``keys`` after RoPE and ``values`` are [T, KH, D] in the cache's 16-bit dtype; ``retained`` bool [T] flags those
        that are held elsewhere.
        """

    def unpack(
        self,
        pages: PackedPages,
        codec: Codec,
        page_row: Tensor,
        first: int,
        count: int,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """The inverse: keys after RoPE and values [count, KH, D] as attention sees them, means and bases undone. Computed in
        float32 and rounded to ``dtype``."""

    def attend(self, q: Tensor, pages: PackedPages, codec: Codec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        """``softmax(q k^T / sqrt(D)) v`` over packed tokens and full-precision slots, in one softmax.

        ``q`` is [B, N, H, D] after RoPE. Returns the output [B, N, H, D] in its dtype and the log-sum-exp float32 [B, N, H]; a
        query that sees nothing gets zeros and -inf.
        """


class Backend(Protocol):
    """Arithmetic on the arena: ``heads`` for methods ``rotate`` and ``plain``, ``labels`` for ``reorder``, ``attend_plain`` for
    ``fp``.

    ``ops`` and graphs are what ``kernels.ops.Unfused`` gives to a backend that has no better.
    """

    name: str
    ops: Ops
    heads: PackedKernels[HeadCodec]
    labels: PackedKernels[LabelCodec]

    def head_size_for(self, head_size: int) -> int:
        """How many channels a model's heads of this size should be given, zeros in those that are more, to be computed fast."""

    def captures(self, head_size: int) -> bool:
        """Whether a decode step of a model with heads of this size is launches only, so that a graph can hold it: the host
        waits for nothing and reads no number."""

    def graphs(self, device: torch.device, max_packed: int) -> Graphs:
        """What holds steps of sequences of up to ``max_packed`` packed tokens; asked for only where it ``captures`` them."""

    def attend_plain(self, q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        """``PackedKernels.attend`` over pages of 16 bits."""
