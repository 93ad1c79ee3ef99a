"""From the name of a model to its weights and its tokenizer, whatever files it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ModelConfig
from skvq.loaders.checkpoint import SafetensorsSource
from skvq.loaders.dummy import DummySource, dummy_tokenizer
from skvq.loaders.file_tokenizer import FileTokenizer
from skvq.loaders.gguf_file import GgufSource
from skvq.loaders.gguf_tokenizer import build_tokenizer
from skvq.loaders.hub import config_of, dummy_kind, resolve, scheme_named
from skvq.loaders.hub_gguf import rounds
from skvq.loaders.model_files import ModelFiles
from skvq.loaders.model_names import split_name
from skvq.loaders.names import EMBEDDING, HEAD
from skvq.loaders.rounded import RoundedSource
from skvq.loaders.source import WeightSource
from skvq.loaders.text import Tokenizer
from skvq.loaders.tokenizer import load_tokenizer


def open_source(files: ModelFiles) -> WeightSource:
    """The weights of a resolved model, checked but not read."""
    return _rounded(_stored(files), files)


def open_files(files: ModelFiles) -> tuple[WeightSource, FileTokenizer]:
    """Weights and tokenizer of a resolved model; a GGUF header, which has both, is read once."""
    source = _stored(files)
    if isinstance(source, GgufSource):
        return _rounded(source, files), build_tokenizer(source.metadata, source.config)
    return _rounded(source, files), load_tokenizer(files.path)


def _stored(files: ModelFiles) -> GgufSource | SafetensorsSource:
    return GgufSource(files.path) if files.kind == "gguf" else SafetensorsSource(files.path)


def _rounded(source: WeightSource, files: ModelFiles) -> WeightSource:
    return RoundedSource(source) if files.rounded else source


def dummy_source(model: str, config: ModelConfig) -> DummySource:
    """Random weights for a model of that name: in blocks where it names them, or a quantized checkpoint has them."""
    scheme = scheme_named(model)
    if scheme is not None:
        return DummySource(config, kind=scheme.kind, whole=() if scheme.embeds else (EMBEDDING, HEAD))
    return DummySource(config, kind=dummy_kind(model))


def stand_in(model: str, *, download: bool) -> WeightSource | None:
    """Dummy weights of the shape of a model that has yet to be fetched, so that it is seen beforehand whether it fits; None if
    its files are here, or only they can tell its shape."""
    try:
        resolve(model, download=False)
    except ModelError:
        name, tag = split_name(model)
        known = not tag or rounds(name, tag, download=download)
        return dummy_source(model, config_of(name, download=download)) if download and known else None
    return None


def open_model(
    model: str,
    *,
    dummy_weights: bool = False,
    download: bool = True,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[WeightSource, Tokenizer]:
    """Weights and tokenizer of an alias, folder, GGUF file or hub repository; of ``NAME:Q8_0`` rounded to 8 bits.

    ``dummy_weights``: random weights of that model's shape and a tokenizer of bytes; only its config is needed. Behind a colon
    the type of their blocks may follow (``mistral-7b:Q4_K``). ``chat_template_kwargs``: ``FileTokenizer.template_kwargs``.
    Raises ModelError, one line, for everything that is missing, broken or unknown.
    """
    if dummy_weights:
        config = config_of(model, download=download)
        return dummy_source(model, config), dummy_tokenizer(config.vocab_size)
    files = resolve(model, download=download)
    source, tokenizer = open_files(files)
    tokenizer.template_kwargs = chat_template_kwargs
    return source, tokenizer
