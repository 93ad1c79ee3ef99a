"""What a user chooses: how a model's cache is kept, how tokens are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skvq.engine.errors import OptionError, require_known, shortened
from skvq.engine.filters import AttentionSinks, FilterRule, check_rule
from skvq.engine.model_config import ModelConfig
from skvq.engine.options import is_number, is_whole, option_class
from skvq.kernels.layout import stored_bits

METHODS = ("rotate", "reorder", "plain", "fp")
BITS = (1.5, 2.0, 3.0, 4.0, 8.0)
GROUP_SIZES = (32, 64, 128)
MOST_GUESSES = 15
"""Of tokens that prompt lookup guesses at a time."""
MOST_LIKELY = 20
"""Of the likeliest tokens that are told with one that is drawn."""
PREFILLS = ("exact", "streaming")
ON_FULL = ("stop", "shift")


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
            raise OptionError(f"window must be a whole number of tokens from 0 to {2**20}, got {self.window!r}")
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

    def mean_bits(self, model: ModelConfig) -> Widths:
        """Key bits and value bits, means over layers and heads."""
        pairs = [pair for heads in self.bits_of_heads(model) for pair in heads] if self.is_packed else [(16.0, 16.0)]
        key_bits, value_bits = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return key_bits, value_bits

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
                f"{group}: give a larger budget{' or larger groups' if group < model.head_size else ''}"
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
    json_schema: the answer is JSON of this schema, an object or its text (https://json-schema.org; ``{}`` is any JSON).
    regex: a regular expression that the whole answer matches, without references back and conditions on what is around. An
        answer with a form may reach max_new_tokens before its end. Both need ``skvq[grammar]`` (``engine.grammar``).
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
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
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
            "regex": (self.regex is None or _is_text(self.regex), "a text, or None"),
            "prompt_lookup": (
                is_whole(self.prompt_lookup) and 0 <= self.prompt_lookup <= MOST_GUESSES,
                f"a whole number from 0 to {MOST_GUESSES}",
            ),
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
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.json_schema is not None and self.regex is not None:
            raise OptionError("json_schema goes without regex: give one form of the answer")
        if self.ignore_eos and self.form:
            raise OptionError("ignore_eos goes without json_schema and regex, which say where an answer ends")

    @property
    def form(self) -> tuple[str, str] | None:
        """The option that says what form an answer has, and what it says, if one does."""
        if self.regex is not None:
            return "regex", self.regex
        return None if self.json_schema is None else ("json_schema", str(self.json_schema))

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _is_text(value: object) -> bool:
    """Whether a value is a text of whole characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _schema_text(value: object) -> str:
    """A JSON schema as text. Raises OptionError unless it is an object."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if isinstance(found, Mapping):
            return json.dumps(dict(found), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        pass
    shown = shortened(value) if isinstance(value, str) else type(value).__name__
    raise OptionError(f"json_schema must be a JSON object such as {{'type': 'object'}}, or its text, got {shown!r}")


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
