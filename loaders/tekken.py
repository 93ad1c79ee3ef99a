"""Mistral's own vocabulary file, tekken.json -> a `tokenizers` pipeline that gives the ids of `mistral_common`.

Repositories such as Mistral Small 3.2's have this and no tokenizer.json. Special tokens come first, those that are not listed
as ``<SPECIAL_n>``, then byte sequences by rank, as many as ``default_vocab_size`` has room for.
"""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError
from skvq.loaders.fast_tokenizer import byte_alphabet
from skvq.loaders.fields import Fields, read_json, reason
from skvq.loaders.gguf_tokenizer import spm_merges

FIRST_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Of files that list none (v3, v7)."""

MOST_SPECIAL = 1 << 16

CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]
{%- elif message['role'] == 'user' %}[INST]{{ message['content'] }}[/INST]
{%- elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}
{%- else %}{{ raise_exception('only system, user and assistant messages are supported') }}{% endif %}{% endfor %}"""
"""Conversations of files from v7 on, for repositories that leave them to `mistral_common`."""


def read_tekken(path: Path) -> tuple[Pipeline, str | None]:
    """The pipeline of a tekken.json, and how it writes conversations, if that is known. ModelError if it is broken."""
    fields = read_json(path)
    config = fields.section("config")
    pattern, version = config.text("pattern"), config.text("version", "v3")
    size, specials = config.integer("default_vocab_size"), config.integer("default_num_special_tokens")
    try:
        if not 0 <= specials <= min(size, MOST_SPECIAL) or size > specials + len(fields.data["vocab"]):
            raise ValueError(f"{len(fields.data['vocab']):,} and {specials:,} special tokens are not {size:,}")
        tokens = [*_special_tokens(fields, specials), *_spelled(fields.data["vocab"], size - specials)]
        vocab = {token: index for index, token in enumerate(tokens)}
        assert len(vocab) == size, f"{size - len(vocab)} tokens are missing or there twice"
        mergeable = {token: index for token, index in vocab.items() if index >= specials}
        merges = spm_merges(mergeable, -np.arange(size))
        pipeline = Pipeline(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        pipeline.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:specials]])
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
        pipeline.decoder = decoders.ByteLevel()
    except Exception as error:
        raise ModelError(f"{path} is not a vocabulary of Mistral's ({reason(error)}): download it again") from error
    return pipeline, None if version in ("v1", "v2", "v3") else CHAT_TEMPLATE


def _special_tokens(fields: Fields, count: int) -> list[str]:
    """Their spellings by id."""
    listed = fields.data.get("special_tokens")
    given = dict(enumerate(FIRST_SPECIAL)) if listed is None else {item["rank"]: item["token_str"] for item in listed}
    return [given.get(index, f"<SPECIAL_{index}>") for index in range(count)]


def _spelled(vocab: list[dict[str, object]], count: int) -> list[str]:
    """The first ``count`` byte sequences by rank, in the alphabet of byte-level pipelines."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    bytes_of = {item["rank"]: b64decode(str(item["token_bytes"]), validate=True) for item in vocab[:count]}
    return ["".join(letters[byte] for byte in bytes_of[rank]) for rank in range(count)]
