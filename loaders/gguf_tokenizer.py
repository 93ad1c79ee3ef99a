"""Vocabularies inside GGUF files -> a `tokenizers` pipeline that gives the ids of the model's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError, nearest
from skvq.engine.model_config import ModelConfig
from skvq.loaders.fast_tokenizer import SPACE, FastTokenizer
from skvq.loaders.fields import Fields, read_by_library
from skvq.loaders.file_tokenizer import TokenizerSettings
from skvq.loaders.gguf_config import CONTROL, end_tokens

NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6

MAX_PIECE = 512
"""Characters of the longest piece that is split in search of merges; real vocabularies end at a few dozen."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """How a byte-level vocabulary cuts text: by one pattern after another, or, without, as GPT-2. digits: each digit first."""

    patterns: tuple[str, ...] = ()
    digits: bool = False
    compose: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

_LLAMA3 = _Rules(patterns=(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), whole_words=True, adds_bos=True)
_CL100K = replace(_LLAMA3, whole_words=False, adds_bos=False)
_QWEN2 = _Rules(patterns=(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), compose=True)
_TEKKEN = _Rules(patterns=("|".join([*_CASED_WORDS, r"\p{N}", _CASED_REST]),), whole_words=True, adds_bos=True)
_O200K = _Rules(patterns=("|".join([*(f"{word}{_CONTRACTIONS}?" for word in _CASED_WORDS), r"\p{N}{1,3}", _CASED_REST]),))
_DEFAULT = _Rules(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
"""What llama.cpp does where a file names no pre-tokenizer that it knows."""
PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": _CL100K,
    "dbrx": _CL100K,
    "chatglm-bpe": _CL100K,
    "glm4": _CL100K,
    "tekken": _TEKKEN,
    "gpt-4o": _O200K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _Rules(digits=True),
    "gpt-2": _Rules(),
    "default": _DEFAULT,
}
KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")
"""Added tokens of Phi-3 that do not take in the white space behind them, as its others do; files do not tell."""


def build_tokenizer(fields: Fields, config: ModelConfig) -> FastTokenizer:
    """The tokenizer that ``tokenizer.ggml.*`` metadata describe."""
    kind = fields.text("tokenizer.ggml.model")
    tokens, kinds = _tokens(fields)
    if kind == "gpt2":
        rules = _rules(fields, tokens)
        adds_bos, build = rules.adds_bos, partial(_byte_level, tokens, _merges(fields), rules)
    elif kind == "llama":
        scores = _scores(fields, len(tokens))
        prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
        adds_bos, build = True, partial(_sentencepiece, tokens, kinds, scores, _space_of(tokens, kinds) if prefix else "never")
    else:
        raise ModelError(f"{fields.where}: unknown tokenizer {kind[:80]!r}; known: gpt2, llama")
    with read_by_library(f"{fields.where}: its {len(tokens)} tokens do not form a vocabulary"):
        pipeline = build()
        control = {*np.flatnonzero(kinds == CONTROL).tolist(), *end_tokens(tokens, kinds)}
        users = [index for index in np.flatnonzero(kinds == USER_DEFINED).tolist() if index not in control]
        of_phi3 = kind == "llama" and fields.data.get("general.architecture") == "phi3"

        def added(index: int, special: bool) -> AddedToken:
            text = tokens[index]
            return AddedToken(text, normalized=False, special=special, rstrip=of_phi3 and text not in KEEP_SPACE)

        pipeline.add_special_tokens([added(i, True) for i in sorted(control) if tokens[i]])
        pipeline.add_tokens([added(i, False) for i in users if tokens[i]])
    adds_bos = fields.flag("tokenizer.ggml.add_bos_token", adds_bos)
    return FastTokenizer(pipeline, _settings(fields, config, tokens, adds_bos))


def spm_merges(vocab: dict[str, int], scores: Any) -> list[tuple[str, str]]:
    """Merges of a SentencePiece BPE vocabulary: every way to split a piece into two, the best piece first.

    SentencePiece merges the neighbouring pair whose union scores highest; a list of merges in that order does the same.
    """
    found = []
    for piece, index in vocab.items():
        if len(piece) > MAX_PIECE:
            raise ValueError(f"token {index} has {len(piece)} characters")
        cuts = [cut for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab]
        cuts.sort(key=lambda cut: (vocab[piece[:cut]], vocab[piece[cut:]]))
        found += [(-float(scores[index]), index, piece[:cut], piece[cut:]) for cut in cuts]
    return [(a, b) for _, _, a, b in sorted(found, key=lambda item: item[:2])]


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], rules: _Rules) -> Pipeline:
    vocab = {token: index for index, token in enumerate(tokens)}
    pipeline = Pipeline(models.BPE(vocab=vocab, merges=merges, ignore_merges=rules.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.patterns))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rules.compose:
        pipeline.normalizer = normalizers.NFC()
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _space_of(tokens: list[str], kinds: Any) -> str:
    """Where a space goes before text: wherever a special token has cut it (``always``), or only at its start (``first``), as
    with Mistral's since instructions have tokens of their own (``legacy: false`` in its folders; GGUF files do not tell).
    """
    instruction = tokens.index("[INST]") if "[INST]" in tokens else None
    return "first" if instruction is not None and kinds[instruction] == CONTROL else "always"


def _sentencepiece(tokens: list[str], kinds: Any, scores: Any, prefix: str) -> Pipeline:
    """``prefix``: where a space goes before text, ``always``, ``first`` or ``never``."""
    vocab = {token: index for index, token in enumerate(tokens)}
    mergeable = {token: index for token, index in vocab.items() if kinds[index] == NORMAL}
    unknown = np.flatnonzero(kinds == UNKNOWN)
    model = models.BPE(
        vocab=vocab,
        merges=spm_merges(mergeable, scores),
        unk_token=tokens[unknown[0]] if len(unknown) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    pipeline = Pipeline(model)
    spaces = normalizers.Replace(" ", SPACE)
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix == "always" else spaces
    if prefix == "first":
        pipeline.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix != "never" else steps)
    return pipeline


def _settings(fields: Fields, config: ModelConfig, tokens: list[str], adds_bos: bool) -> TokenizerSettings:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.data.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: tokens[index] for name, index in ids.items() if isinstance(index, int) and 0 <= index < len(tokens)}
    has_template = isinstance(fields.data.get("tokenizer.chat_template"), str)
    return TokenizerSettings(
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        before_text=(config.bos_token_id,) if adds_bos and config.bos_token_id is not None else (),
        chat_template=fields.text("tokenizer.chat_template") if has_template else None,
        model_vocab=config.vocab_size,
        where=fields.where,
        special_tokens=special,
    )


def _rules(fields: Fields, tokens: list[str]) -> _Rules:
    """What ``pre`` names. Files of before May 2024 name none, Llama 3's and Qwen2's among them. ModelError for any other."""
    if fields.has("tokenizer.ggml.pre"):
        name = fields.text("tokenizer.ggml.pre")
    elif "<|begin_of_text|>" in tokens:
        name = "llama-bpe"
    elif fields.data.get("general.architecture") == "qwen2":
        name = "qwen2"
    else:
        raise ModelError(
            f"{fields.where}: tokenizer.ggml.pre is missing, so how its tokens cut a text is not known: download a newer file"
        )
    if name not in PRE_TOKENIZERS:
        raise ModelError(f"{fields.where}: unknown pre-tokenizer {name[:80]!r}{nearest(name[:80], PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _tokens(fields: Fields) -> tuple[list[str], Any]:
    """Spellings and kinds of all tokens; a file without kinds has normal tokens only."""
    tokens = fields.data.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelError(f"{fields.where}: tokenizer.ggml.tokens is missing: the file holds no vocabulary")
    kinds = fields.data.get("tokenizer.ggml.token_type", np.full(len(tokens), NORMAL))
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise ModelError(f"{fields.where}: tokenizer.ggml.token_type must give {len(tokens)} kinds, one for each token")
    return tokens, kinds


def _merges(fields: Fields) -> list[tuple[str, str]]:
    lines = fields.data.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise ModelError(f"{fields.where}: tokenizer.ggml.merges is missing: a byte-level vocabulary needs it")
    pairs = [tuple(str(line).split(" ")) for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"{fields.where}: tokenizer.ggml.merges holds a line that is not two pieces")
    return [(pair[0], pair[1]) for pair in pairs]


def _scores(fields: Fields, count: int) -> Any:
    scores = fields.data.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != count:
        raise ModelError(f"{fields.where}: tokenizer.ggml.scores must give {count} scores, one for each token")
    return scores
