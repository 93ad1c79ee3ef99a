"""Hugging Face's config.json -> ModelConfig, with the defaults that the `transformers` library gives to absent keys."""

from __future__ import annotations

from pathlib import Path

from skvq.engine.errors import ModelError
from skvq.engine.model_config import FULL_SPAN, ROPE_TYPES, ChunkConfig, ModelConfig, RopeConfig, yarn_scale
from skvq.loaders.families import (
    ARCHITECTURES,
    BY_LAYER,
    FAMILIES,
    QK_NORMED,
    QWENS,
    SLIDING,
    WINDOW_IF_USED,
    WRAPPED,
    Family,
)
from skvq.loaders.fields import Fields, config_of, read_json, shorten
from skvq.loaders.names import MAX_LAYERS
from skvq.loaders.quantized.choose import scheme_of


def read_config(folder: str | Path) -> ModelConfig:
    """Parse ``folder/config.json`` and add the end-of-sequence ids of ``generation_config.json``.

    Ids outside the vocabulary are dropped: they can never be sampled. Raises ModelError, one line, for everything else.
    """
    fields = read_json(Path(folder) / "config.json")
    generation = Path(folder) / "generation_config.json"
    extra = read_json(generation).token_ids("eos_token_id") if generation.is_file() else ()
    return parse_config(fields, extra)


def parse_config(fields: Fields, more_eos_ids: tuple[int, ...] = ()) -> ModelConfig:
    """ModelConfig of a parsed config.json. ModelError for unknown architectures, RoPE types and malformed values."""
    scheme_of(fields)  # raises for what is not read
    fields = text_fields(fields)
    family = _family(fields)
    _refuse_unsupported(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if not (fields.has("head_dim") or family.head_size) and hidden % heads:
        raise ModelError(f"{fields.where}: head_dim is missing and hidden_size {hidden} is not a multiple of {heads} heads")
    head_size = fields.integer("head_dim", family.head_size or hidden // heads)
    layers = fields.integer("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ModelError(f"{fields.where}: num_hidden_layers is {layers}, this engine supports at most {MAX_LAYERS}")
    vocab = fields.integer("vocab_size")
    may_bias = family.name in ("llama", "seed_oss", "smollm3", "glm", *QK_NORMED)
    qkv_bias = may_bias and fields.flag("attention_bias", family.qkv_bias)
    output_bias = qkv_bias and family.name != "glm"
    if family.name == "seed_oss":
        output_bias = fields.flag("attention_out_bias", False)
    kv_default = heads if "num_key_value_heads" in fields.data else family.kv_heads or heads
    context = fields.integer("max_position_embeddings", family.context)
    rotary_size = _rotary_size(fields, family, head_size)
    rope = _rope(fields, context, rotary_size or head_size, family)
    return config_of(
        ModelConfig,
        fields.where,
        family=family.name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(fields, family),
        experts=family.experts(fields) if family.experts else None,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", kv_default),
        head_size=head_size,
        rotary_size=rotary_size,
        norm_eps=fields.positive("rms_norm_eps", family.norm_eps),
        rope=rope,
        chunks=_chunks(fields),
        trained_context=_trained_context(rope, context),
        attention_spans=_attention_spans(fields, family, layers),
        unturned_layers=_unturned_layers(fields, layers) if family.name == "smollm3" else (),
        tie_embeddings=fields.flag("tie_word_embeddings", family.tie_embeddings),
        qkv_bias=family.name == "qwen2" or qkv_bias,
        output_bias=output_bias,
        mlp_bias=family.name in ("llama", "seed_oss", "smollm3") and fields.flag("mlp_bias", False),
        qk_norm=family.name in QK_NORMED,
        bos_token_id=_bos(fields, family, vocab),
        eos_token_ids=_eos(fields, family, vocab, more_eos_ids),
    )


def _intermediate_size(fields: Fields, family: Family) -> int:
    """Channels of an MLP, or of each expert."""
    return (
        fields.integer("moe_intermediate_size", family.expert_size)
        if family.expert_size
        else fields.integer("intermediate_size")
    )


def _rotary_size(fields: Fields, family: Family, head_size: int) -> int:
    """Channels of a head that RoPE turns, the first of them; 0 for all."""
    rope = _rope_section(fields)
    part = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", family.rotary_part))
    if part == 1:
        return 0
    size = int(head_size * part)
    if family.name not in ("phi3", "glm") or size % 2 or not 0 < size < head_size:
        raise ModelError(
            f"{rope.where}: partial_rotary_factor is {part:g}: this engine turns whole heads, and of Phi-3's and GLM's "
            "families an even number of channels"
        )
    return size


def _rope(fields: Fields, context: int, turned: int, family: Family) -> RopeConfig:
    """RopeConfig from ``rope_parameters`` (transformers 5), or ``rope_scaling`` and ``rope_theta`` (before).

    turned: channels of a head that it turns.
    """
    rope = _rope_section(fields)
    if not rope.data:
        rope = Fields(family.rope, rope.where)
    nested = [key for key, value in rope.data.items() if isinstance(value, dict)]
    if nested:
        raise ModelError(f"{rope.where}: separate RoPE settings per layer type ({', '.join(nested[:3])}) are not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "su" or (kind == "yarn" and family.name == "phi3"):  # its names in the first files of Phi-3
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise ModelError(f"{rope.where}: unknown RoPE type {kind[:80]!r}; known: {', '.join(ROPE_TYPES)}")
    original = rope.integer("original_max_position_embeddings", context)
    if kind in ("llama3", "yarn", "longrope"):
        original = fields.integer("original_max_position_embeddings", family.original_context or original)
    factors = ("short_factor", "long_factor") if kind == "longrope" else ()
    lists = {key: rope.numbers(key, turned // 2) for key in factors}
    stretched = kind in ("linear", "dynamic", "llama3")
    beta = rope.number("llama_4_scaling_beta", 0.0)
    factor = rope.positive("factor", None if stretched else _implied_factor(kind, context, original))
    return RopeConfig(
        kind=kind,
        theta=rope.positive("rope_theta", fields.positive("rope_theta", family.theta)),
        factor=factor,
        original_context=context if kind in ("default", "linear", "dynamic") and not beta else original,
        low_freq_factor=rope.positive("low_freq_factor", 1.0),
        high_freq_factor=rope.positive("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        attention_factor=_attention_factor(rope, kind, factor),
        truncate=rope.flag("truncate", True),
        query_beta=beta,
        **lists,
    )


def _rope_section(fields: Fields) -> Fields:
    """``rope_parameters``, or ``rope_scaling`` where a config has both: it was added by hand, to stretch what is there."""
    parameters, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    added = {key: value for key, value in scaling.data.items() if value is not None}
    if "type" in added:
        added.setdefault("rope_type", added["type"])
    if not added:
        return parameters
    kept = {key: parameters.data[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters.data}
    return Fields(kept | added, scaling.where)


def _attention_factor(rope: Fields, kind: str, factor: float) -> float | None:
    """What attention is scaled by, if the config says so; ``attn_factor`` multiplies YaRN's own (vLLM, SGLang)."""
    if kind == "yarn" and rope.has("attn_factor") and not rope.has("attention_factor"):
        return rope.positive("attn_factor") * yarn_scale(factor)
    return rope.positive("attention_factor") if rope.has("attention_factor") else None


def text_fields(fields: Fields) -> Fields:
    """The fields of the language model: all, or of a wrapped one its ``text_config``."""
    if _architecture(fields) not in WRAPPED:
        return fields
    text = {"model_type": "mistral", **fields.section("text_config").data, "architectures": None}
    if fields.has("tie_word_embeddings"):
        text["tie_word_embeddings"] = fields.flag("tie_word_embeddings", False)
    return Fields(text, f"{fields.where}: text_config")


def _architecture(fields: Fields) -> str:
    """The architecture that a config.json names; where it names none, that of its ``model_type``."""
    names, kind = fields.data.get("architectures"), str(fields.data.get("model_type"))
    if not names:
        by_type = {family.name: name for name, family in FAMILIES.items()} | {type_: name for name, type_ in WRAPPED.items()}
        return by_type.get(kind, kind)
    return str(names[0] if isinstance(names, list) else names)


def _family(fields: Fields) -> Family:
    name = _architecture(fields)
    if name not in FAMILIES:
        raise ModelError(f"{fields.where}: unknown architecture {name[:80]!r}; known: {', '.join(ARCHITECTURES)}")
    return FAMILIES[name]


def _refuse_unsupported(fields: Fields) -> None:
    """What would load and then compute something else than the model."""
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{fields.where}: hidden_act is {shorten(repr(activation))}, this engine supports only 'silu'")


def _implied_factor(kind: str, context: int, original: int) -> float:
    """Stretch of a config that names none: the ratio of the two contexts for yarn and longrope, else 1."""
    return context / original if kind in ("yarn", "longrope") else 1.0


def _chunks(fields: Fields) -> ChunkConfig | None:
    """Dual chunk attention, as Qwen2.5-1M has it; a chunk is cut to whole pages."""
    dual = fields.section("dual_chunk_attention_config")
    if not dual.data:
        return None
    reach, trained = dual.integer("chunk_size"), "original_max_position_embeddings"
    gain_from = dual.integer(trained) if dual.has(trained) else 0
    return ChunkConfig.of_at_most(reach - dual.integer("local_size"), reach, gain_from)


def _trained_context(rope: RopeConfig, context: int) -> int:
    """Tokens the model answers well for."""
    if rope.kind == "yarn":
        return max(context, int(min(rope.original_context * rope.factor, 2**31 - 1)))
    return context


def _attention_spans(fields: Fields, family: Family, layers: int) -> tuple[int, ...]:
    """Tokens each layer's queries see."""
    declared = fields.has("sliding_window") or (family.sliding_window and "sliding_window" not in fields.data)
    used = family.name not in WINDOW_IF_USED or fields.flag("use_sliding_window", False)
    if not (declared and used) or family.name in ("llama", "seed_oss", "glm"):
        return (FULL_SPAN,) * layers
    window = fields.integer("sliding_window", family.sliding_window or None)
    kinds = fields.data.get("layer_types") if family.name in BY_LAYER else None
    if kinds is None and family.name in SLIDING:
        return (window,) * layers
    if kinds is None and family.name in QWENS:
        first = fields.data.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ModelError(f"{fields.where}: max_window_layers must be a number of layers, got {first!r}")
        return tuple(window if index >= first else FULL_SPAN for index in range(layers))
    spans = {"sliding_attention": window, "full_attention": FULL_SPAN}
    if not isinstance(kinds, list) or len(kinds) != layers or any(not isinstance(k, str) or k not in spans for k in kinds):
        raise ModelError(f"{fields.where}: layer_types must list {layers} entries, each one of {', '.join(spans)}")
    return tuple(spans[kind] for kind in kinds)


def _unturned_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """Layers without RoPE: those that ``no_rope_layers`` has a 0 for, else the last of every ``no_rope_layer_interval``."""
    turned = fields.data.get("no_rope_layers")
    if turned is None:
        every = fields.integer("no_rope_layer_interval", 4)
        return tuple(range(every - 1, layers, every))
    if not isinstance(turned, list) or len(turned) < layers or any(one not in (0, 1) for one in turned):
        raise ModelError(f"{fields.where}: no_rope_layers must list {layers} entries, each 0 or 1")
    return tuple(layer for layer in range(layers) if not turned[layer])


def _bos(fields: Fields, family: Family, vocab: int) -> int | None:
    ids = fields.token_ids("bos_token_id") if "bos_token_id" in fields.data else (family.bos,)
    return next((token for token in ids if token is not None and 0 <= token < vocab), None)


def _eos(fields: Fields, family: Family, vocab: int, more: tuple[int, ...]) -> tuple[int, ...]:
    assumed = () if more else family.eos
    ids = fields.token_ids("eos_token_id") if "eos_token_id" in fields.data else assumed
    return tuple(dict.fromkeys(token for token in (*ids, *more) if 0 <= token < vocab))
