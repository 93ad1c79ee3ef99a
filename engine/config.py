"""Frozen configuration: what a model is, how its cache is kept, how tokens are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from skvq.engine.errors import ModelError, OptionError, nearest, require_known
from skvq.engine.filters import AttentionSinks, FilterRule, check_rule
from skvq.engine.options import is_number, is_whole, option_class
from skvq.kernels.layout import PAGE_TOKENS, stored_bits

FULL_SPAN = 2**31 - 1
"""Attention span of a layer without a sliding window: longer than any context, so it needs no special case."""

METHODS = ("rotate", "reorder", "plain", "fp")
BITS = (1.5, 2.0, 3.0, 4.0, 8.0)
GROUP_SIZES = (32, 64, 128)
MOST_LIKELY = 20
"""Of the likeliest tokens that are told with one that is drawn."""
PREFILLS = ("exact", "streaming")
ON_FULL = ("stop", "shift")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how it is stretched past the trained length.

    ``kind`` is one of ``ROPE_TYPES``; every other field has the meaning it has in Hugging Face's config.json.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_beta: float = 0.0  # ``llama_4_scaling_beta``

    def __post_init__(self) -> None:
        if self.kind not in ROPE_TYPES:
            raise ModelError(f"unknown RoPE type {self.kind!r}{nearest(self.kind, ROPE_TYPES)}")
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ModelError(f"rope theta must be positive, got {self.theta}")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ModelError(f"rope scaling factor must be positive, got {self.factor}")


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by for a stretch of ``factor`` (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkConfig:
    """Dual chunk attention (``engine.chunks``) for contexts above ``reach`` tokens, the largest distance that it leaves.

    length: tokens of a chunk, whole pages. gain_from: tokens from which on queries grow with their position, 0 for none.
    """

    length: int
    reach: int
    gain_from: int = 0

    def __post_init__(self) -> None:
        if self.length % PAGE_TOKENS or not 0 < self.length <= self.reach < 2**31:
            raise ModelError(
                f"chunks of {self.length} tokens with distances up to {self.reach}: the first must be {PAGE_TOKENS} or a "
                "multiple of it, and no more than the second"
            )

    @classmethod
    def of_at_most(cls, tokens: int, reach: int, gain_from: int = 0) -> ChunkConfig:
        """Chunks of as many whole pages as there are in ``tokens``.

        >>> ChunkConfig.of_at_most(262144 - 8192, 262144).length
        253440
        """
        return cls(length=tokens // PAGE_TOKENS * PAGE_TOKENS, reach=reach, gain_from=gain_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """Mixture of experts (arXiv 2401.04088): each layer has ``count`` MLPs, of which a token goes through ``chosen``.

    normed: their weights add to one; else they are what a softmax over all of them gives.
    """

    count: int
    chosen: int
    normed: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.chosen <= self.count < 2**15:
            raise ModelError(f"model config: {self.chosen} experts for each token of {self.count}: from 1 to all there are")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-family model. ``attention_spans[l]`` is how many tokens, itself included, a query of layer l sees;
    ``unturned_layers`` have no RoPE; ``qk_norm``: heads of queries and keys are normed before RoPE (arXiv 2010.04245, Qwen3).
    ``weights_head_size``: of heads as weights make them, if they are cached with more channels (``with_heads_of``).
    ``rotary_size``: channels of a head that RoPE turns, if not all of them (Phi-4-mini); pairs that it leaves lie behind the
    others, in both halves of a head. ``chunks``: how contexts beyond those it was trained for are attended to (Qwen2.5-1M).
    ``intermediate_size``: of the MLP, or of each of the ``experts``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    weights_head_size: int = 0
    rotary_size: int = 0
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    chunks: ChunkConfig | None = None
    experts: ExpertConfig | None = None
    trained_context: int = 4096
    attention_spans: tuple[int, ...] = ()
    unturned_layers: tuple[int, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
            "trained_context",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ModelError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"model config: {self.num_heads} query heads are not a multiple of {self.num_kv_heads} kv heads")
        if self.head_size % 2:
            raise ModelError(f"model config: head size {self.head_size} is odd, but RoPE needs pairs of channels")
        if self.rotary_size % 2 or not 0 <= self.rotary_size < self.head_size:
            raise ModelError(f"model config: RoPE turns {self.rotary_size} channels, not an even number below {self.head_size}")
        if not self.attention_spans:
            object.__setattr__(self, "attention_spans", (FULL_SPAN,) * self.num_layers)
        if len(self.attention_spans) != self.num_layers or min(self.attention_spans) < 1:
            raise ModelError(f"model config: {len(self.attention_spans)} attention spans for {self.num_layers} layers")
        if self.experts and (self.mlp_bias or self.intermediate_size % 8):
            raise ModelError(
                f"model config: experts of {self.intermediate_size} channels{' with biases' if self.mlp_bias else ''}: this "
                "engine has them without biases, of a multiple of 8 channels"
            )
        if self.chunks and (min(self.attention_spans) < FULL_SPAN or self.unturned_layers):
            raise ModelError("model config: dual chunk attention needs full attention and RoPE in all layers")

    @property
    def own_head_size(self) -> int:
        """Channels of a head that weights make: all, but for those that ``with_heads_of`` has added."""
        return self.weights_head_size or self.head_size

    @property
    def turned_size(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.rotary_size or self.own_head_size

    def cut_at(self, context: int) -> ChunkConfig | None:
        """Its chunks, where a context is longer than the distances they leave."""
        return self.chunks if self.chunks and context > self.chunks.reach else None

    def with_heads_of(self, size: int) -> ModelConfig:
        """The same model with channels of zeros added to its heads, for kernels that take no others."""
        return self if size == self.head_size else replace(self, head_size=size, weights_head_size=self.own_head_size)

    @property
    def kv_elements_per_token(self) -> int:
        """The model's own numbers that are cached per token, keys and values of all layers: 2*L*KH*D."""
        return 2 * self.num_layers * self.num_kv_heads * self.own_head_size

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        layers = self.num_layers * self._layer_parameters(self.experts.count if self.experts else 1)
        return layers + self.hidden_size + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def active_parameters(self) -> int:
        """Those of all layers that a token is multiplied by: of experts, the chosen ones."""
        return self.num_layers * self._layer_parameters(self.experts.chosen if self.experts else 1) + self.hidden_size

    def _layer_parameters(self, mlps: int) -> int:
        d, f, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.own_head_size
        q = self.num_heads * self.own_head_size
        layer = d * (q + 2 * kv) + q * d + 3 * d * f * mlps + 2 * d
        layer += d * self.experts.count if self.experts else 0
        layer += (q + 2 * kv) * self.qkv_bias + d * self.output_bias + (2 * f + d) * self.mlp_bias
        return layer + 2 * self.own_head_size * self.qk_norm


Widths = tuple[float, float]
"""Key bits and value bits."""

LayerWidths = Widths | tuple[Widths, ...]
"""Bit widths of a layer: one pair for all its kv heads, or one pair for each."""


def pairs_of(layer: LayerWidths) -> tuple[Widths, ...]:
    """One pair for all kv heads of a layer, or a pair for each.

    >>> pairs_of((2.0, 1.5)), pairs_of(((2.0, 1.5), (3.0, 2.0)))
    (((2.0, 1.5),), ((2.0, 1.5), (3.0, 2.0)))
    """
    heads = tuple(pair for pair in layer if isinstance(pair, tuple))
    return heads or ((layer[0], layer[1]),)  # type: ignore[return-value]


@option_class
@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """How a sequence's keys and values are kept (SKVQ, arXiv 2405.06219, section 3).

    method: ``rotate`` (ours), ``reorder`` (SKVQ), ``plain`` (no transform) or ``fp`` (16 bits, the baseline).
    key_bits, value_bits: 1.5 (three levels, stored at 1.6), 2, 3, 4 or 8; ignored by ``fp``.
    bits_budget: maximum average bits per packed number, codes and metadata counted. Calibration then chooses the bits of each
        kv head of each layer (``reorder``: of each layer), for keys and values separately; replaces key_bits and value_bits.
    layer_bits: (key bits, value bits) of each layer, or instead one such pair for each kv head (not with ``reorder``,
        whose groups span heads); empty if all layers have the same bits, or calibration has not chosen yet.
    group_size: channels that share one scale and one midpoint: 32, 64 or 128, at most the head size.
    window: most recent tokens held in 16 bits; packing goes a tile at a time, so there are ``window`` to
        ``window + tile - 1`` of them (tile is 128 tokens, 160 where any side has 1.5 bits), never fewer.
    filters: rules that keep individual tokens in 16 bits when they leave the window.
    """

    method: str = "rotate"
    key_bits: float = 2.0
    value_bits: float = 2.0
    group_size: int = 64
    window: int = 128
    filters: Sequence[FilterRule] = (AttentionSinks(5),)
    bits_budget: float | None = None
    layer_bits: tuple[LayerWidths, ...] = ()

    def __post_init__(self) -> None:
        require_known(self.method, METHODS, "cache method")
        for name in ("key_bits", "value_bits"):
            object.__setattr__(self, name, _width(getattr(self, name), name))
        object.__setattr__(self, "layer_bits", _layer_widths(self.layer_bits))
        self._check_budget()
        if not is_whole(self.group_size) or self.group_size not in GROUP_SIZES:
            raise OptionError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {self.group_size!r}")
        if not is_whole(self.window) or not 0 <= self.window <= 2**20:
            raise OptionError(f"window must be a number of tokens from 0 to {2**20}, got {self.window!r}")
        if not isinstance(self.filters, (tuple, list)):
            raise OptionError(f"filters must be a tuple of rules, got {self.filters!r}")
        object.__setattr__(self, "filters", tuple(check_rule(rule, f"filter {rule!r}") for rule in self.filters))

    def _check_budget(self) -> None:
        budget = self.bits_budget
        if budget is None:
            return
        if not is_number(budget) or not 0 < budget <= 16:
            raise OptionError(f"bits_budget must be a number of bits above 0 and at most 16, got {budget!r}")
        if (self.key_bits, self.value_bits) != (2.0, 2.0):
            raise OptionError(
                f"bits_budget {budget:g} chooses the bits of each layer, so key_bits {self.key_bits:g} and value_bits "
                f"{self.value_bits:g} cannot be set too: give one or the other"
            )
        object.__setattr__(self, "bits_budget", float(budget))

    @property
    def is_packed(self) -> bool:
        """Whether tokens are quantized when they leave the window; method ``fp`` keeps their 16 bits."""
        return self.method != "fp"

    @property
    def name(self) -> str:
        """In a few words.

        >>> CacheConfig(value_bits=1.5).name
        'rotate K2V1.5'
        """
        if not self.is_packed:
            return self.method
        if self.bits_budget is not None:
            return f"{self.method} budget {self.bits_budget:g}"
        return f"{self.method} {'bits by layer' if self.layer_bits else f'K{self.key_bits:g}V{self.value_bits:g}'}"

    @property
    def is_open(self) -> bool:
        """Whether calibration has yet to choose the bits of each layer."""
        return self.is_packed and self.bits_budget is not None and not self.layer_bits

    @property
    def rules(self) -> tuple[FilterRule, ...]:
        """Filter rules in force, attention sinks first: a 16-bit cache loses nothing, so none is asked."""
        return () if not self.is_packed else tuple(sorted(self.filters, key=lambda rule: type(rule) is not AttentionSinks))

    @property
    def needs_mass(self) -> bool:
        """Whether a rule in force asks for attention mass."""
        return any(rule.needs_attention_mass for rule in self.rules)

    @property
    def code_bits(self) -> float:
        """What the budget leaves for codes: metadata takes two bytes per group."""
        assert self.bits_budget is not None
        return self.bits_budget - 16 / self.group_size

    def bits_of_heads(self, model: ModelConfig) -> tuple[tuple[Widths, ...], ...]:
        """(key bits, value bits) of each kv head of each layer."""
        assert not self.is_open, "the bits of a budget are chosen in calibration"
        layers = self.layer_bits or ((self.key_bits, self.value_bits),) * model.num_layers
        pairs = map(pairs_of, layers)
        return tuple(heads * model.num_kv_heads if len(heads) == 1 else heads for heads in pairs)

    @property
    def by_head(self) -> bool:
        """Whether kv heads of one layer may differ in bits: groups of ``reorder`` span heads."""
        return self.method != "reorder"

    def with_bits(self, key_bits: float, value_bits: float) -> CacheConfig:
        """The same cache with these bits in every layer."""
        return replace(self, key_bits=key_bits, value_bits=value_bits, bits_budget=None, layer_bits=())

    def fitted(self, model: ModelConfig) -> CacheConfig:
        """This config for a model's head size: a group never spans more than a head.

        Raises OptionError if the head size is not a multiple of the group size, or a budget is below the narrowest format.
        """
        if not self.is_packed:
            return self
        group = min(self.group_size, model.head_size)
        if group not in GROUP_SIZES or model.head_size % group:
            fits = [str(size) for size in GROUP_SIZES if model.head_size % size == 0]
            advice = f"choose a group size of {' or '.join(fits)}" if fits else "no group size divides it, choose method 'fp'"
            raise OptionError(f"groups of {self.group_size} channels do not divide heads of {model.head_size}: {advice}")
        if len(self.layer_bits) not in (0, model.num_layers):
            raise OptionError(
                f"layer_bits names {len(self.layer_bits)} layers, the model has {model.num_layers}: give one pair per layer"
            )
        for layer, heads in enumerate(map(pairs_of, self.layer_bits)):
            if len(heads) > 1 and not self.by_head:
                raise OptionError(f"layer_bits gives bits per head in layer {layer}, but groups of {self.method} span heads")
            if len(heads) not in (1, model.num_kv_heads):
                raise OptionError(
                    f"layer_bits names {len(heads)} heads in layer {layer}, the model has {model.num_kv_heads} kv heads: "
                    "give one pair per head"
                )
        fitted = replace(self, group_size=group)
        least = stored_bits(min(BITS)) + 16 / group
        if fitted.is_open and fitted.code_bits < stored_bits(min(BITS)) - 1e-9:
            raise OptionError(
                f"bits_budget {self.bits_budget:.9g} is below {least:.9g}, the minimum for 1.5-bit codes with groups of "
                f"{group}: give a larger budget or larger groups"
            )
        return fitted


@option_class
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. Temperature 0 is greedy; the other filters apply in the order of the fields.

    repeat_penalty divides positive and multiplies negative logits of tokens seen before (CTRL, arXiv 1909.05858).
    top_k 0 and top_p 1 and min_p 0 keep everything; min_p is relative to the likeliest token.
    seed: what is drawn at a position follows from it, the position and the logits; None draws a new seed for each answer.
    stop: texts that end the generation and are not returned.
    prompt_lookup: tokens guessed at a time from what followed before, 0 to 15, and checked in one step (``engine.lookup``):
        faster where an answer quotes its text. The answer is the same but for near ties of the logits.
    logprobs: None, or how many of the likeliest tokens, 0 to 20, are told beside each that is drawn, with their log
        probabilities before any of the above (``Request.logprobs``, ``SequenceCache.logprobs``). Not of an end token, nor of
        those that spell a stop string.
    """

    max_new_tokens: int = 256
    repeat_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = 0
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    prompt_lookup: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = self.stops if isinstance(self.stop, (str, tuple, list)) else None
        checks = {
            "max_new_tokens": (
                is_whole(self.max_new_tokens) and 0 <= self.max_new_tokens < 2**62,
                "a whole number, 0 or more, and below 2^62",
            ),
            "repeat_penalty": (is_number(self.repeat_penalty) and 0.01 <= self.repeat_penalty <= 100, "from 0.01 to 100"),
            "temperature": (is_number(self.temperature) and 0 <= self.temperature <= 1e6, "from 0 (greedy) to 1e6"),
            "top_k": (is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 (all) or more"),
            "top_p": (is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            "min_p": (is_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 (all) to 1"),
            "seed": (
                self.seed is None or (is_whole(self.seed) and -(2**63) <= self.seed < 2**64),
                "a 64-bit whole number, or None",
            ),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "prompt_lookup": (is_whole(self.prompt_lookup) and 0 <= self.prompt_lookup <= 15, "a whole number from 0 to 15"),
            "logprobs": (
                self.logprobs is None or (is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LIKELY),
                f"a whole number from 0 to {MOST_LIKELY}, or None",
            ),
            "stop": (stop is not None and all(isinstance(s, str) and s for s in stop), "non-empty texts"),
        }
        for name, (good, valid) in checks.items():
            if not good:
                raise OptionError(f"{name} must be {valid}, got {getattr(self, name)!r}")
        object.__setattr__(self, "stop", self.stops)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _width(value: object, name: str) -> float:
    if not is_number(value) or value not in BITS:
        raise OptionError(f"{name} must be one of {', '.join(f'{b:g}' for b in BITS)}, got {value!r}")
    return float(value)


def _layer_widths(value: object) -> tuple[LayerWidths, ...]:
    """``layer_bits`` in tuples of floats; a layer whose heads agree is one pair."""
    wrong = f"layer_bits must be a pair (key bits, value bits) for each layer, or one for each of its kv heads, got {value!r}"
    if not isinstance(value, (tuple, list)):
        raise OptionError(wrong)
    layers: list[LayerWidths] = []
    for layer in value:
        if not isinstance(layer, (tuple, list)) or not layer:
            raise OptionError(wrong)
        heads = list(layer) if isinstance(layer[0], (tuple, list)) else [layer]
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in heads):
            raise OptionError(wrong)
        pairs = tuple((_width(k, "layer_bits"), _width(v, "layer_bits")) for k, v in heads)
        layers.append(pairs[0] if len(set(pairs)) == 1 else pairs)
    return tuple(layers)
