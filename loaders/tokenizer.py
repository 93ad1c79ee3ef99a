"""The tokenizer of a folder, in whichever form it has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig
from skvq.loaders.added_tokens import declared_tokens, listed_tokens, nameless_tokens, special_tokens, with_tokens
from skvq.loaders.fast_tokenizer import FastTokenizer
from skvq.loaders.fields import Fields, read_by_library, read_json, reason
from skvq.loaders.file_tokenizer import FileTokenizer, TokenizerSettings
from skvq.loaders.hf import read_config
from skvq.loaders.spm_tokenizer import SentencePieceTokenizer, open_sentencepiece
from skvq.loaders.tekken import read_tekken

MOST_IDS = 1 << 24
PREFIXED = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


def load_tokenizer(folder: Path) -> FileTokenizer:
    """The tokenizer of a folder: tokenizer.json, else tokenizer.model, else tekken.json.

    Raises ModelError, one line, if there is none or it is broken.
    """
    config = read_config(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder, config)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, config)
    if (folder / "tekken.json").is_file():
        return _from_tekken(folder, config)
    raise ModelError(f"{folder} holds no tokenizer.json, tokenizer.model or tekken.json: copy one from the model's repository")


def _from_json(folder: Path, config: ModelConfig) -> FileTokenizer:
    path, options = folder / "tokenizer.json", _options(folder)
    named = special_tokens(options)
    special = {name: token.content for name, token in named.items()}
    pipeline = read_pipeline(path)
    more = [*named.values(), *nameless_tokens(options)]
    listed = listed_tokens(folder, {token.content for token in more})
    pipeline = with_tokens(pipeline, declared_tokens(options), listed, more, options.where)
    bos = pipeline.token_to_id(special["bos_token"]) if "bos_token" in special else config.bos_token_id
    eos = pipeline.token_to_id(special["eos_token"]) if "eos_token" in special else None
    with read_by_library(f"{path} is not a tokenizer"):
        before = _before_text(pipeline)
    if before in ((), (bos,)):
        before = _if(options.flag("add_bos_token", bool(before)), bos)
    return FastTokenizer(pipeline, _settings(folder, config, options, special, bos, eos, before))


def _before_text(pipeline: Pipeline) -> tuple[int, ...]:
    """What its post-processor writes before a text: BOS, or GLM's two tokens."""
    plain, whole = (pipeline.encode("a", add_special_tokens=special).ids for special in (False, True))
    places = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
    return tuple(whole[: places[0]]) if plain and places else ()


def _if(wanted: bool, bos: int | None) -> tuple[int, ...]:
    return (bos,) if wanted and bos is not None else ()


def read_pipeline(path: Path) -> Pipeline:
    """The pipeline of a tokenizer.json, without truncation and padding. ModelError if it is broken."""
    with read_by_library(f"{path} is not a tokenizer"):
        if PREFIXED.search(path.read_bytes()):  # of which the library makes an end to this process
            raise ValueError("pieces that begin with a prefix (continuing_subword_prefix) are not supported")
        pipeline = Pipeline.from_file(str(path))
        pipeline.no_padding()
        pipeline.no_truncation()
        pipeline.encode("", add_special_tokens=True)
        if getattr(pipeline.model, "dropout", None):  # for training: a text would have other ids each time
            pipeline.model.dropout = None
        largest = max(pipeline.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= MOST_IDS:  # the library takes memory for all ids below
            raise ValueError(f"it has a token of id {largest:,}, and no model {MOST_IDS:,} tokens")
    return pipeline


def _from_sentencepiece(folder: Path, config: ModelConfig) -> FileTokenizer:
    options = _options(folder)
    legacy = options.flag("legacy", True)
    processor, pieces = open_sentencepiece(folder / "tokenizer.model", prefixes=legacy)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    special_texts = {token.content for token in (*special_tokens(options).values(), *nameless_tokens(options))}
    added = listed_tokens(folder, special_texts) | declared_tokens(options)
    known = {piece: index for index, piece in enumerate(pieces)} | {token.content: index for index, token in added.items()}
    named = {name: token.content for name, token in special_tokens(options).items()}
    ids |= {name: known[text] for name, text in named.items() if text in known}
    special = {name: pieces[index] for name, index in ids.items() if 0 <= index < len(pieces)} | named
    bos = ids["bos_token"] if ids["bos_token"] >= 0 else None
    eos = ids["eos_token"] if ids["eos_token"] >= 0 else None
    settings = _settings(folder, config, options, special, bos, eos, _if(options.flag("add_bos_token", True), bos))
    prefix = " " if not legacy and options.flag("add_prefix_space", True) else ""
    return SentencePieceTokenizer(processor, pieces, added, settings, prefix=prefix)


def _from_tekken(folder: Path, config: ModelConfig) -> FileTokenizer:
    pipeline, template = read_tekken(folder / "tekken.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    bos, eos = (pipeline.token_to_id(special[name]) for name in ("bos_token", "eos_token"))
    settings = _settings(folder, config, _options(folder), special, bos, eos, _if(True, bos))
    return FastTokenizer(pipeline, replace(settings, chat_template=settings.chat_template or template))


def _settings(
    folder: Path,
    config: ModelConfig,
    options: Fields,
    special: Mapping[str, str],
    bos: int | None,
    eos: int | None,
    before_text: tuple[int, ...],
) -> TokenizerSettings:
    ids = (*config.eos_token_ids, *(() if eos is None else (eos,)))
    return TokenizerSettings(
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ids)),
        before_text=before_text,
        chat_template=_chat_template(folder, options),
        model_vocab=config.vocab_size,
        where=str(folder),
        special_tokens=special,
    )


def _options(folder: Path) -> Fields:
    """tokenizer_config.json; special_tokens_map.json fills in what it lacks and, as in `transformers`, overrules it where it
    declares no added tokens; empty where neither exists."""
    config, names = (
        {key: value for key, value in read_json(folder / name).data.items() if value not in (None, "")}
        if (folder / name).is_file()
        else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    merged = names | config if "added_tokens_decoder" in config else config | names
    return Fields(merged, str(folder / "tokenizer_config.json"))


def _chat_template(folder: Path, options: Fields) -> str | None:
    """chat_template.jinja, else chat_template.json, else the one (of several: the default) in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read ({reason(error)})") from error
    if (folder / "chat_template.json").is_file():
        options = read_json(folder / "chat_template.json")
    value = options.data.get("chat_template")
    if isinstance(value, list):
        value = next((one.get("template") for one in value if isinstance(one, dict) and one.get("name") == "default"), None)
    return value if isinstance(value, str) else None
