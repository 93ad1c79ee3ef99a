"""Rotary position embedding: frequencies of every scaling the Llama family uses, and the rotation itself.

Formulas: linear and dynamic NTK (as in Hugging Face's modeling_rope_utils), YaRN (arXiv 2309.00071), LongRoPE
(arXiv 2402.13753), Llama 3.1. Frequencies and angles are float64: at position 1,000,000 a float32 angle is off by 0.03 rad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.engine.chunks import Chunks, Distances, TrueDistances
from skvq.engine.errors import ModelError, OptionError
from skvq.engine.model_config import FULL_SPAN, ChunkConfig, ModelConfig, RopeConfig, yarn_scale
from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.layout import PAGE_TOKENS
from skvq.kernels.ops import apply_rope, rope_turns

CHUNK_SHARE = 0.8
"""Of the trained length, what a chunk takes. 0.63 to 0.94 differ by 0.01 nats on SmolLM2 at 1.5 times its length."""


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


def scaled(config: ModelConfig, text: str) -> ModelConfig:
    """The model with its RoPE stretched by ``kind:factor`` over the trained length, or by ``kind:factor:length`` over another
    (yarn over 32768 of Qwen3). Raises OptionError if its own is stretched already: two kinds cannot be combined, but for
    ``chunks``, which leaves RoPE as it is.

    Stretched by a fixed factor (chunks, linear, yarn) it counts as good for that much more; dynamic stretches with the context.
    """
    kind, _, factor = text.partition(":")
    if kind not in ("linear", "dynamic", "yarn", "chunks"):
        raise OptionError(
            f"rope scaling {text!r} is not of the form chunks:FACTOR, yarn:FACTOR, dynamic:FACTOR or linear:FACTOR, nor "
            "chunks:FACTOR:LENGTH or yarn:FACTOR:LENGTH"
        )
    factor, over, length = factor.partition(":") if kind in ("yarn", "chunks") else (factor, "", "")
    if over and not (length.isdecimal() and 0 < int(length) <= config.trained_context):
        raise OptionError(
            f"rope scaling {text!r}: {length!r} is not a number of tokens up to {config.trained_context:,}, the trained length"
        )
    if not factor:
        raise OptionError(f"rope scaling {text!r} lacks its factor: give {kind}:4, or what it should be stretched by")
    try:
        stretch = float(factor)
    except ValueError:
        raise OptionError(f"rope scaling {text!r}: {factor!r} is not a number") from None
    if not 1 <= stretch <= 4096:
        raise OptionError(f"rope scaling {text!r}: the factor must lie between 1 and 4096")
    original = int(length) if over else config.trained_context
    if config.chunks:
        raise OptionError(
            f"this model has chunks for contexts above {config.chunks.reach:,} tokens (dual chunk attention): leave "
            f"--rope-scaling {text} out"
        )
    if kind == "chunks":
        return _in_chunks(config, original, int(stretch * original), text)
    if config.rope.kind != "default":
        raise OptionError(f"this model stretches its RoPE itself ({config.rope.kind}): leave --rope-scaling {text} out")
    rope = RopeConfig(kind=kind, theta=config.rope.theta, factor=stretch, original_context=original)
    trained = original if kind == "dynamic" else int(stretch * original)
    return replace(config, rope=rope, trained_context=trained)


def _in_chunks(config: ModelConfig, trained: int, stretched: int, text: str) -> ModelConfig:
    """The model in chunks: it knows distances up to ``trained``, of which a chunk takes ``CHUNK_SHARE`` or, in whole pages,
    less."""
    if min(config.attention_spans) < FULL_SPAN or config.unturned_layers:
        raise OptionError(f"rope scaling {text!r} needs full attention and RoPE in all layers of the model")
    if trained * CHUNK_SHARE < PAGE_TOKENS:
        least = PAGE_TOKENS / CHUNK_SHARE
        raise OptionError(f"rope scaling {text!r} needs a trained length of at least {least:,.0f} tokens, not {trained:,}")
    rope = replace(config.rope, original_context=config.rope.original_context or config.trained_context)
    chunks = ChunkConfig.of_at_most(int(CHUNK_SHARE * trained), trained)
    return replace(config, chunks=chunks, rope=rope, trained_context=stretched)


def beyond_training(context: int, trained: int, stretched: int) -> str:
    """The warning for a context longer than the trained one; the model is ``stretched`` to that many tokens, if at all."""
    so = "output beyond that is unreliable"
    if stretched > trained:
        so = f"--rope-scaling takes it to {stretched:,}, which costs accuracy unless it was fine-tuned for that"
        so += "; output beyond is unreliable" if context > stretched else ""
    return f"{context:,} tokens exceed the {trained:,} that this model was trained for: {so}"


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
        found = _frequencies(config, cut.reach if cut else context)  # for the largest distance there will be
    except (ArithmeticError, ValueError) as error:
        raise ModelError(f"no frequencies can be computed for this RoPE ({error}): {config.rope}") from None
    if not (found.inv_freq.isfinite().all() and math.isfinite(found.scale)):
        raise ModelError(f"the frequencies of this RoPE are not finite: {config.rope}")
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


def _frequencies(config: ModelConfig, context: int) -> RopeFrequencies:
    rope, size = config.rope, config.turned_size
    base = rope.theta
    steps = torch.arange(0, size, 2, dtype=torch.float64) / size
    scale = 1.0
    if rope.kind == "dynamic":
        longest = max(context, config.trained_context)
        stretch = rope.factor * longest / config.trained_context - (rope.factor - 1)
        base *= stretch ** (size / (size - 2))
    inv_freq = base**-steps
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, config.trained_context, inv_freq)
    elif rope.kind == "yarn":
        inv_freq, scale = _yarn(rope, config.trained_context, size, inv_freq)
    elif rope.kind == "longrope":
        inv_freq, scale = _longrope(rope, config.trained_context, context, inv_freq)
    return RopeFrequencies(inv_freq=inv_freq, scale=scale)


def _llama3(rope: RopeConfig, trained: int, inv_freq: Tensor) -> Tensor:
    original = rope.original_context or trained
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    slow = wavelength > original / rope.low_freq_factor
    fast = wavelength < original / rope.high_freq_factor
    return torch.where(slow, inv_freq / rope.factor, torch.where(fast, inv_freq, blended))


def _yarn(rope: RopeConfig, trained: int, size: int, inv_freq: Tensor) -> tuple[Tensor, float]:
    original = rope.original_context or trained

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / (high - low or 0.001)
    extrapolated = 1 - ramp.clamp(0, 1)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    blended = inv_freq / rope.factor * (1 - extrapolated) + inv_freq * extrapolated
    return blended, yarn_scale(rope.factor) if scale is None else scale


def _longrope(rope: RopeConfig, trained: int, context: int, inv_freq: Tensor) -> tuple[Tensor, float]:
    original = rope.original_context or trained
    factors = rope.long_factor if context > original else rope.short_factor
    if len(factors) != len(inv_freq):
        raise ModelError(f"longrope has {len(factors)} factors for {len(inv_freq)} channel pairs")
    scale = rope.attention_factor
    if scale is None:
        scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    return inv_freq / torch.tensor(factors, dtype=torch.float64), scale
