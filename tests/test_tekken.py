"""tekken.json against the definition of byte-level BPE by ranks, and what a broken file gives."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from config_json import write_config
from loader_fixtures import WORDS, refused, tiny_config

from skvq.loaders.tekken import FIRST_SPECIAL
from skvq.loaders.tokenizer import load_tokenizer

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = 24
MORE = [b"th", b"he", b" t", b"the", b" the", b"qu", b"ick", b"ic", b"\xf0\x9f", b"\xf0\x9f\x98\x80", b"  ", b" \xe6", b"quick"]
"""Some in an order in which their parts come later: such a token is found only as a whole word."""


def folder_of(folder: Path, **changes: Any) -> Path:
    """A model's folder whose vocabulary is all bytes and ``MORE``, two of which lie beyond its size."""
    pieces = [bytes([value]) for value in range(256)] + MORE + [b"zz", b"zzz"]
    size = SPECIALS + 256 + len(MORE)
    data = {
        "config": {"pattern": PATTERN, "default_vocab_size": size, "default_num_special_tokens": SPECIALS, "version": "v7"},
        "vocab": [{"rank": n, "token_bytes": b64encode(piece).decode(), "token_str": None} for n, piece in enumerate(pieces)],
    }
    write_config(folder, tiny_config(vocab_size=size))
    (folder / "tekken.json").write_text(json.dumps(data | changes))
    return folder


def by_ranks(word: bytes) -> list[int]:
    """Byte-level BPE: a word that is a token stays whole; else neighbours are joined, the union of the lowest rank first."""
    ranks = {bytes([value]): value for value in range(256)} | {piece: 256 + n for n, piece in enumerate(MORE)}
    if word in ranks:
        return [SPECIALS + ranks[word]]
    parts = [bytes([value]) for value in word]
    while True:
        unions = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not unions:
            return [SPECIALS + ranks[part] for part in parts]
        at = min(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ids_are_those_of_the_ranks(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path))
    text = WORDS + "zz quick thick\n\n  x/\n//  "
    cut = re.findall(r"[^\r\n\w]?[^\W\d_]+|\d| ?[^\s\w]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", text)
    assert "".join(cut) == text
    wanted = [token for word in cut for token in by_ranks(word.encode())]
    assert tokenizer.encode(text, bos=False) == wanted
    assert tokenizer.encode(text) == [1, *wanted]
    assert tokenizer.decode(wanted) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, (2,), SPECIALS + 256 + len(MORE))


def test_special_tokens_come_first_listed_or_not(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path))
    assert tokenizer.encode("[INST]a[/INST]<SPECIAL_23>", bos=False) == [3, SPECIALS + 97, 4, 23]
    listed = [{"rank": n, "token_str": text, "is_control": True} for n, text in enumerate([*FIRST_SPECIAL[:3], "[THINK]"])]
    tokenizer = load_tokenizer(folder_of(tmp_path, special_tokens=listed))
    assert tokenizer.encode("[THINK]a<SPECIAL_4>", bos=False) == [3, SPECIALS + 97, 4]


def test_conversations_are_written_as_mistral_does(tmp_path: Path) -> None:
    """`mistral_common` 1.13 gives this text for these messages (InstructTokenizerV7 over Tekken)."""
    tokenizer = load_tokenizer(folder_of(tmp_path))
    said = [("system", "Be brief."), ("user", "Hi there"), ("assistant", "Hello!"), ("user", "2+2?")]
    text = "[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi there[/INST]Hello!</s>[INST]2+2?[/INST]"
    messages = [{"role": role, "content": content} for role, content in said]
    assert tokenizer.encode_chat(messages) == tokenizer.encode(text)
    assert tokenizer.encode_turn([messages[-1]]) == tokenizer.encode("</s>[INST]2+2?[/INST]", bos=False)
    refused(lambda: tokenizer.encode_chat([{"role": "tool", "content": "x"}]), "system, user and assistant")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1]['content'] }}")
    said = tokenizer.encode(messages[1]["content"], bos=False)
    assert load_tokenizer(tmp_path).encode_chat(messages) == said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab": []}, ("not a vocabulary",)),
        (
            {"vocab": [{"rank": n, "token_bytes": "AA=="} for n in range(300)]},
            ("not a vocabulary", "there twice"),
        ),
        ({"vocab": [{"rank": n, "token_bytes": "?"} for n in range(300)]}, ("not a vocabulary",)),
        ({"vocab": 3}, ("not a vocabulary",)),
        (
            {"config": {"pattern": ".", "default_vocab_size": 2 * 10**9 + 256, "default_num_special_tokens": 2 * 10**9}},
            ("not a vocabulary", "2,000,000,000"),
        ),
        ({"special_tokens": [{"rank": 0}]}, ("not a vocabulary", "token_str")),
        ({"config": {"pattern": "("}}, ("default_vocab_size is missing",)),
        ({"config": 3}, ("config must be an object",)),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(lambda: load_tokenizer(folder_of(tmp_path, **changes)), "tekken.json", *words)
