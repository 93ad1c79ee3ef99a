"""Beyond the context that a model was trained for: ``--rope-scaling``, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

from skvq.engine.errors import OptionError
from skvq.engine.model_config import FULL_SPAN, ChunkConfig, ModelConfig, RopeConfig
from skvq.kernels.layout import PAGE_TOKENS

CHUNK_SHARE = 0.8
"""Of the trained length, what a chunk takes. 0.63 to 0.94 differ by 0.01 nats on SmolLM2 at 1.5 times its length."""


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


def sees_all(config: ModelConfig) -> bool:
    """Whether all layers have full attention and RoPE."""
    return min(config.attention_spans) == FULL_SPAN and not config.unturned_layers


def can_be_cut(config: ModelConfig) -> bool:
    """Whether ``chunks`` is for this model."""
    return sees_all(config) and not config.chunks and config.trained_context * CHUNK_SHARE >= PAGE_TOKENS


def _in_chunks(config: ModelConfig, trained: int, stretched: int, text: str) -> ModelConfig:
    """The model in chunks: it knows distances up to ``trained``, of which a chunk takes ``CHUNK_SHARE`` or, in whole pages,
    less."""
    if not sees_all(config):
        raise OptionError(f"rope scaling {text!r} needs full attention and RoPE in all layers of the model")
    if trained * CHUNK_SHARE < PAGE_TOKENS:
        least = PAGE_TOKENS / CHUNK_SHARE
        raise OptionError(f"rope scaling {text!r} needs a trained length of at least {least:,.0f} tokens, not {trained:,}")
    rope = replace(config.rope, original_context=config.rope.original_context or config.trained_context)
    chunks = ChunkConfig.of_at_most(int(CHUNK_SHARE * trained), trained)
    return replace(config, chunks=chunks, rope=rope, trained_context=stretched)


def beyond_training(context: int, model: ModelConfig, taken: ModelConfig) -> str:
    """What is said of a context that exceeds the model's trained length; ``taken``: as ``scaled`` has stretched the model."""
    trained, stretched = model.trained_context, taken.trained_context
    so = "output beyond that is unreliable"
    if stretched > trained:
        how = "in chunks it takes" if taken.chunks else "--rope-scaling takes it to"
        cost = "" if taken.chunks else ", which costs accuracy unless it was fine-tuned for that"
        so = f"{how} {stretched:,}{cost}" + ("; output beyond is unreliable" if context > stretched else "")
    elif taken.rope.kind != model.rope.kind:
        so = f"--rope-scaling stretches RoPE with the text ({taken.rope.kind}), which costs accuracy"
    elif can_be_cut(model):
        so += f"; --rope-scaling chunks:{-(-context // trained)} would keep distances within it"
    return f"{context:,} tokens exceed the {trained:,} that this model was trained for: {so}"
