"""GGUF metadata -> ModelConfig, of the architectures in ``ARCHITECTURES``; most of Mistral's models are `llama` there."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from skvq.engine.errors import ModelError
from skvq.engine.model_config import FULL_SPAN, ExpertConfig, ModelConfig, RopeConfig, yarn_scale
from skvq.loaders.fields import Fields, config_of, shorten
from skvq.loaders.gguf_header import GgufHeader
from skvq.loaders.names import MAX_LAYERS

ARCHITECTURES = {
    "chatglm": "glm",
    "llama": "llama",
    "mistral3": "ministral3",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
}
"""Name in a file -> family of the model."""
WITH_EXPERTS = ("llama", "qwen3moe")
"""Those whose layers may have experts; of ``llama`` they do in Mixtral."""
TURNED_IN_PART = ("chatglm", "phi3")
"""Those of whose heads RoPE may turn a part."""
END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "</s>")
"""Tokens that end an answer, whether or not ``eos_token_id`` names them (llama.cpp does the same)."""

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TABLES = (FREQS, SHORT, LONG)
"""What divides RoPE's frequencies: one table of Llama 3, two of Phi-3."""
LLAMA3_ORIGINAL_CONTEXT = 8192
CONTROL = 3


def parse_gguf_config(header: GgufHeader, where: str, tables: Mapping[str, NDArray[np.float32]]) -> ModelConfig:
    """ModelConfig of a header; ``tables`` are the file's ``ROPE_TABLES`` by name, [D/2] each."""
    fields = Fields(header.metadata, where)
    arch = fields.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(f"{where}: unknown architecture {arch[:80]!r}; known: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(fields, arch)
    hidden, heads = fields.integer(f"{arch}.embedding_length"), _uniform(fields, f"{arch}.attention.head_count", None)
    layers = fields.integer(f"{arch}.block_count")
    if layers > MAX_LAYERS:
        raise ModelError(f"{where}: block_count is {layers}, this engine supports at most {MAX_LAYERS}")
    head_size = fields.integer(f"{arch}.attention.key_length", max(1, hidden // heads))
    turned = fields.integer(f"{arch}.rope.dimension_count", head_size)
    rotary_size = turned if arch in TURNED_IN_PART and turned < head_size else 0
    values = fields.integer(f"{arch}.attention.value_length", head_size)
    if values != head_size:
        raise ModelError(f"{where}: {arch}.attention.value_length is {values}, but the head size is {head_size}: not supported")
    if turned != (rotary_size or head_size):
        raise ModelError(f"{where}: {arch}.rope.dimension_count is {turned}, but the head size is {head_size}: not supported")
    vocab = _vocab_size(header, where)
    context = fields.integer(f"{arch}.context_length")
    rope = _rope(fields, arch, context, tables, turned // 2)
    window = f"{arch}.attention.sliding_window"
    experts = _experts(fields, arch)
    span = fields.integer(window) if fields.has(window) and fields.number(window) else FULL_SPAN
    return config_of(
        ModelConfig,
        where,
        family="mixtral" if arch == "llama" and experts else ARCHITECTURES[arch],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_uniform(fields, f"{arch}.{'expert_' * (arch == 'qwen3moe')}feed_forward_length", None),
        experts=experts,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_uniform(fields, f"{arch}.attention.head_count_kv", heads),
        head_size=head_size,
        rotary_size=rotary_size,
        norm_eps=fields.positive(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope=rope,
        trained_context=context,
        attention_spans=(span,) * layers,
        unturned_layers=tuple(range(3, layers, 4)) if arch == "smollm3" else (),
        tie_embeddings="output.weight" not in header.tensors,
        qkv_bias=not header.tensors.keys().isdisjoint(("blk.0.attn_q.bias", "blk.0.attn_qkv.bias")),
        output_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        qk_norm=arch in ("qwen3", "qwen3moe"),
        bos_token_id=next(iter(_ids(fields, ("bos",), vocab)), None),
        eos_token_ids=_end_ids(fields, vocab),
    )


def _experts(fields: Fields, arch: str) -> ExpertConfig | None:
    """As llama.cpp has them, the weights of the chosen ones add to one."""
    key = f"{arch}.expert_count"
    if arch not in WITH_EXPERTS or not fields.has(key) or fields.number(key) == 0:
        return None
    chosen = fields.integer(f"{arch}.expert_used_count")
    return config_of(ExpertConfig, fields.where, count=fields.integer(key), chosen=chosen)


def llama3_factors(head_size: int, rope: RopeConfig) -> NDArray[np.float64]:
    """What the llama3 scaling divides each frequency by, [D/2]: the content of a file's ``rope_freqs.weight``."""
    frequency = rope.theta ** -(np.arange(0, head_size, 2) / head_size)
    turns = rope.original_context * frequency / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = 1 / ((1 - smooth) / rope.factor + smooth)
    return np.where(turns < rope.low_freq_factor, rope.factor, np.where(turns > rope.high_freq_factor, 1.0, blend))


def _rope(fields: Fields, arch: str, context: int, tables: Mapping[str, NDArray[np.float32]], pairs: int) -> RopeConfig:
    theta = fields.positive(f"{arch}.rope.freq_base", 10_000.0)
    kind = fields.text(f"{arch}.rope.scaling.type", "linear" if fields.has(f"{arch}.rope.scale_linear") else "none")
    for name, table in tables.items():
        if not (np.isfinite(table).all() and (table > 0).all()):
            raise ModelError(f"{fields.where}: {name} holds values that are not positive finite numbers: download it again")
        if len(table) != pairs:
            raise ModelError(
                f"{fields.where}: {name} has {len(table)} factors for {pairs} pairs of channels: download it again"
            )
        if kind not in ("none", "longrope") and not np.allclose(table, 1.0):
            raise ModelError(f"{fields.where}: {name} together with {kind[:80]} scaling is not supported")
    if kind == "longrope" or (kind == "none" and (SHORT in tables or LONG in tables)):
        missing = [name for name in (SHORT, LONG) if name not in tables]
        if missing:
            raise ModelError(f"{fields.where}: RoPE has no {' and no '.join(missing)}: download the file again")
        return _longrope(fields, arch, theta, context, tables)
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{fields.where}: unknown RoPE scaling {kind[:80]!r}; known: none, linear, yarn, llama3, longrope")
    freqs = tables.get(FREQS)
    if freqs is not None and not np.allclose(freqs, 1.0):
        return _rope_of_factors(freqs, theta, context)
    factor = fields.number(f"{arch}.rope.scaling.factor", fields.number(f"{arch}.rope.scale_linear", 1.0)) or 1.0
    if kind == "none" or factor == 1.0:
        return RopeConfig(theta=theta, original_context=context)
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=factor, original_context=context)
    extra = fields.positive(f"{arch}.rope.scaling.attn_factor", 1.0)
    log_multiplier = fields.number(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_context=fields.integer(f"{arch}.rope.scaling.original_context_length", context),
        beta_fast=fields.positive(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.positive(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
        mscale=1.0 if log_multiplier else 0.0,
        mscale_all_dim=log_multiplier,
        attention_factor=None if extra == 1.0 else extra * yarn_scale(factor),
        query_beta=fields.number(f"{arch}.attention.temperature_scale", 0.0),
    )


def _longrope(fields: Fields, arch: str, theta: float, context: int, tables: Mapping[str, NDArray[np.float32]]) -> RopeConfig:
    return RopeConfig(
        kind="longrope",
        theta=theta,
        original_context=fields.integer(f"{arch}.rope.scaling.original_context_length", context),
        attention_factor=fields.positive(f"{arch}.rope.scaling.attn_factor", 1.0),
        short_factor=tuple(map(float, tables[SHORT])),
        long_factor=tuple(map(float, tables[LONG])),
    )


def _rope_of_factors(freqs: NDArray[np.float32], theta: float, context: int) -> RopeConfig:
    """The llama3 config that gives these factors, else the factors themselves as a longrope that never switches."""
    llama3 = RopeConfig(kind="llama3", theta=theta, factor=float(freqs.max()), original_context=LLAMA3_ORIGINAL_CONTEXT)
    if np.allclose(llama3_factors(2 * len(freqs), llama3), freqs, rtol=1e-4):
        return llama3
    factors = tuple(float(value) for value in freqs)
    return RopeConfig(
        kind="longrope",
        theta=theta,
        original_context=context,
        attention_factor=1.0,
        short_factor=factors,
        long_factor=factors,
    )


def _refuse_unsupported(fields: Fields, arch: str) -> None:
    """What would load and then compute something else than the model; a value of 0 says that it has none of it."""
    experts = (f"{arch}.expert_count", "experts")
    scale = (f"{arch}.attention.scale", "its own attention scale")
    for key, what in (scale,) if arch in WITH_EXPERTS else (experts, scale):
        value = fields.data.get(key, 0)
        if not isinstance(value, (int, float)) or value:
            raise ModelError(f"{fields.where}: {key} is {shorten(repr(value))}: a model with {what} is not supported")


def _uniform(fields: Fields, key: str, default: int | None) -> int:
    """An integer, or an array that holds the same integer for every layer."""
    value = fields.data.get(key)
    if isinstance(value, np.ndarray):
        different = np.unique(value)
        if len(different) != 1:
            raise ModelError(f"{fields.where}: {key} differs between layers ({len(different)} values): not supported")
        return Fields({key: different[0].item()}, fields.where).integer(key)
    return fields.integer(key, default)


def _vocab_size(header: GgufHeader, where: str) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{where}: token_embd.weight is missing or not a matrix: the file is not a complete language model")
    return embedding.shape[0]


def _ids(fields: Fields, names: tuple[str, ...], vocab: int) -> list[int]:
    values = [fields.data.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    return [value for value in values if isinstance(value, int) and 0 <= value < vocab]


def _end_ids(fields: Fields, vocab: int) -> tuple[int, ...]:
    ids = _ids(fields, ("eos", "eot", "eom"), vocab)
    tokens, kinds = fields.data.get("tokenizer.ggml.tokens"), fields.data.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(kinds) == len(tokens):
        ids += [index for index in end_tokens(tokens, kinds) if index < vocab]
    return tuple(dict.fromkeys(ids))


def end_tokens(tokens: list[str], kinds: NDArray[np.int32]) -> list[int]:
    """Ids of ``END_TOKENS``: control tokens, and such as only look like it, ``<|im_end|>``, of whatever kind."""
    return [
        index
        for index, token in enumerate(tokens)
        if token in END_TOKENS and (kinds[index] == CONTROL or token.startswith("<|"))
    ]
