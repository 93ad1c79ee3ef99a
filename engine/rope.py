"""Rotary position embedding: frequencies of every scaling the Llama family uses, and the rotation itself.

Formulas: linear and dynamic NTK (as in Hugging Face's modeling_rope_utils), YaRN (arXiv 2309.00071), LongRoPE
(arXiv 2402.13753), Llama 3.1. Frequencies and angles are float64: at position 1,000,000 a float32 angle is off by 0.03 rad.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.engine.dual_chunks import Chunks, Distances, TrueDistances
from skvq.engine.errors import ModelError
from skvq.engine.model_config import ChunkConfig, ModelConfig
from skvq.engine.rope_frequencies import frequencies_of
from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.ops import apply_rope, rope_turns

MOST_SCALE = 1e19
"""Its square, by which scores grow, is a number of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRope:
    """How a model's queries and keys are turned: in all layers but ``unturned`` (NoPE, arXiv 2305.19466) alike.

    Queries at position t are longer by ``1 + query_beta log(1 + floor(t / query_period))`` (Llama 4, Ministral 3). Where only
    some channels are turned, frequencies have no scale: ``lengths``, squares of it, lengthen these channels of queries alone.
    """

    turned: RopeFrequencies
    still: RopeFrequencies  # all zeros
    unturned: frozenset[int] = frozenset()
    query_beta: float = 0.0
    query_period: int = 1
    lengths: Tensor | None = None  # float32 [D]
    distances: Distances = field(default_factory=TrueDistances)

    def of(self, layer: int) -> RopeFrequencies:
        """Frequencies of a layer."""
        return self.still if layer in self.unturned else self.turned

    def alone(self, layer: int) -> ModelRope:
        """That of a model of this layer alone."""
        return replace(self, turned=self.of(layer), unturned=frozenset())


@dataclass(frozen=True, slots=True)
class StepRope:
    """Cosines and sines of the places (``distances``) of one step, and what queries there are multiplied by."""

    cos: Tensor  # float32 [B, N, 1, D/2]
    sin: Tensor  # as cos
    gain: Tensor | None = None  # float32 [B, N, 1, 1 or D]
    unturned: frozenset[int] = frozenset()
    still: StepRope | None = None  # of layers that are not turned
    distances: Distances = field(default_factory=TrueDistances)

    def of(self, layer: int) -> StepRope:
        """That of a layer."""
        return self.still if self.still and layer in self.unturned else self

    def with_gain(self, q: Tensor) -> Tensor:
        """Queries [B, N, H, D] times their gain, in their dtype."""
        return q if self.gain is None else torch.mul(q, self.gain, out=torch.empty(q.shape, dtype=q.dtype, device=q.device))

    def apply(self, x: Tensor) -> Tensor:
        """RoPE of ``x`` [B, N, heads, D] at its positions, in x's dtype; channels pair as (j, D/2 + j)."""
        return apply_rope(x, self.cos, self.sin)


def widened(x: Tensor, size: int) -> Tensor:
    """Heads [..., D] with ``size`` channels: zeros behind each half, for RoPE pairs the channels of one with the other's. Heads
    that have them stay as they are.

    >>> widened(torch.tensor([1, 2, 3, 4]), 6).tolist()
    [1, 2, 0, 3, 4, 0]
    """
    if x.shape[-1] == size:
        return x
    half = x.shape[-1] // 2
    return F.pad(x.reshape(*x.shape[:-1], 2, half), (0, size // 2 - half)).flatten(-2)


def narrowed(x: Tensor, size: int) -> Tensor:
    """What ``widened`` was given, heads with ``size`` channels."""
    if x.shape[-1] == size:
        return x
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)[..., : size // 2].flatten(-2)


def at_positions(rope: ModelRope, positions: Tensor) -> StepRope:
    """The rotations of ``positions`` [B, N]."""
    gain = rope.distances.gain(positions)
    gain = None if gain is None else gain[..., None, None]
    if rope.query_beta:
        periods = torch.div(positions, rope.query_period, rounding_mode="floor")[..., None, None]
        grown = 1 + rope.query_beta * torch.log1p(periods.float())
        gain = grown if gain is None else gain * grown
    if rope.lengths is not None:
        gain = rope.lengths.expand(*positions.shape, 1, -1) if gain is None else gain * rope.lengths
    still = StepRope(*rope_turns(rope.still, positions), gain) if rope.unturned else None
    places = rope.distances.places(positions)
    return StepRope(*rope_turns(rope.turned, places), gain, rope.unturned, still, rope.distances)


def shifted(x: Tensor, by: int, rope: RopeFrequencies) -> Tensor:
    """``x`` [T, heads, D], after RoPE, moved ``by`` positions on from where each is, in x's dtype; its scale stays."""
    turns = rope_turns(RopeFrequencies(inv_freq=rope.inv_freq, scale=1.0), torch.tensor([[by]], device=x.device))
    return StepRope(*turns).apply(x[None])[0]


def model_rope(config: ModelConfig, context: int, device: torch.device) -> ModelRope:
    """The RoPE of a model for sequences of up to ``context`` tokens.

    Dynamic NTK and LongRoPE depend on the length: they are fixed for ``context``, so that cached keys stay comparable.
    """
    cut = config.cut_at(context)
    try:
        found = frequencies_of(config, cut.reach if cut else context)  # for the largest distance there will be
    except (ArithmeticError, ValueError) as error:
        raise ModelError(f"no frequencies can be computed for this RoPE ({error}): {config.rope}") from None
    if not (found.inv_freq.isfinite().all() and abs(found.scale) < MOST_SCALE):
        raise ModelError(f"the frequencies of this RoPE, or what it scales keys by, are no numbers of float32: {config.rope}")
    pairs, half = len(found.inv_freq), config.head_size // 2
    inv_freq, lengths = F.pad(found.inv_freq, (0, half - pairs)).to(device), None
    if config.rotary_size and found.scale != 1:
        lengths = F.pad(torch.full((2, pairs), found.scale**2), (0, half - pairs), value=1.0).flatten().to(device)
    turned = RopeFrequencies(inv_freq=inv_freq, scale=found.scale if lengths is None else 1.0)
    return ModelRope(
        turned=turned,
        distances=_distances(config.cut_at(context), RopeFrequencies(inv_freq=inv_freq, scale=1.0)),
        still=RopeFrequencies(inv_freq=torch.zeros_like(turned.inv_freq), scale=1.0),
        unturned=frozenset(config.unturned_layers),
        query_beta=config.rope.query_beta,
        query_period=config.rope.original_context or config.trained_context,
        lengths=lengths,
    )


def _distances(cut: ChunkConfig | None, frequencies: RopeFrequencies) -> Distances:
    if cut is None:
        return TrueDistances()
    return Chunks(length=cut.length, reach=cut.reach, gain_from=cut.gain_from, frequencies=frequencies)
