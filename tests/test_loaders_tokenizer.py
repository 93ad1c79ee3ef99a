"""Tokenizers against the libraries and models they reproduce: ids, text, streams and chat formats."""

from __future__ import annotations

import io
import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
import sentencepiece
from config_json import write_config
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from loader_fixtures import (
    WORDS,
    byte_level_pipeline,
    llama_cpp,
    one_line,
    random_weights,
    refused,
    tiny_config,
    write_checkpoint,
)
from tokenizers import Regex, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.errors import ModelError, SkvqError
from skvq.loaders.chat import render_chat, render_turn
from skvq.loaders.dummy import dummy_tokenizer
from skvq.loaders.fast_tokenizer import FastTokenizer
from skvq.loaders.fields import Fields
from skvq.loaders.gguf_config import CONTROL, end_tokens
from skvq.loaders.gguf_tokenizer import BYTE, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, build_tokenizer
from skvq.loaders.hub import resolve
from skvq.loaders.model_files import ModelFiles
from skvq.loaders.open import open_files, open_model
from skvq.loaders.text import TextStream, Tokenizer
from skvq.loaders.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
STRICT = """{{- bos_token }}
{%- if messages[0].role == 'assistant' %}{{ raise_exception('who\nspoke?') }}{% endif %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    [{{ message.role | upper }}] {{ message | tojson }} <b>{{ message.content | trim }}</b>
{% endfor %}
{%- if tools is not none %}tools{% endif %}{{ eos_token if not add_generation_prompt }}"""
TURNS = [
    {"role": "system", "content": "Bé brief & <kind>."},
    {"role": "skip", "content": "unseen"},
    {"role": "user", "content": " 1 < 2? \n"},
]
SAMPLES = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock; we'RE here.",
    "def f(x):\n\treturn x**2  # 3.14\n\n\n  y\r\n",
    "<a href='x'>T&amp;</a>",
    "naïve — déjà vu 日本語 العربية 😀👩\u200d👧",
    "a\x00b\u2581c   d  ",
    "cafe\u0301 decomposed",
]
WITHOUT_SPECIALS = st.characters(codec="utf-8", exclude_characters="<")  # hypothesis tries texts that are in our source
TEXTS = st.text(WITHOUT_SPECIALS, max_size=60) | st.lists(st.sampled_from(SAMPLES), max_size=3).map("".join)


def save_folder(folder: Path, pipeline: Any, options: dict[str, Any] | None = None) -> ModelFiles:
    write_config(folder, tiny_config())
    pipeline.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | (options or {})))
    return ModelFiles(folder, "safetensors")


def with_bos(pipeline: Any) -> Any:
    bos = pipeline.token_to_id("<s>")
    pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return pipeline


def theirs_of(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_files(resolve("smollm2-135m"))[1]


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return save_folder(tmp_path_factory.mktemp("bytes"), with_bos(byte_level_pipeline()), {"chat_template": CHATML})


@pytest.fixture(scope="module")
def spm_model() -> bytes:
    """A SentencePiece BPE like Llama's: byte fallback, no normalization, a space before the text."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split("\n") * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["[TOOL]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory: pytest.TempPathFactory, spm_model: bytes) -> ModelFiles:
    folder = tmp_path_factory.mktemp("spm")
    write_config(folder, tiny_config())
    (folder / "tokenizer.model").write_bytes(spm_model)
    (folder / "chat_template.jinja").write_text(CHATML)
    return ModelFiles(folder, "safetensors")


def spm_fields(model: bytes, **changes: Any) -> Fields:
    """The GGUF metadata that llama.cpp's converter writes for a SentencePiece model."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = range(sp.get_piece_size())
    kinds = [
        CONTROL if sp.is_control(i) else UNKNOWN if sp.is_unknown(i) else BYTE if sp.is_byte(i)
        else USER_DEFINED if sp.id_to_piece(i) == "[TOOL]" else NORMAL
        for i in size
    ]  # fmt: skip
    data = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in size],
        "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in size], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": CHATML,
    }
    return Fields(data | changes, "m.gguf")


def test_smollm2_gives_the_ids_of_llama_cpp(smollm2: Tokenizer) -> None:
    """Recorded from llama.cpp (llama-cpp-python 0.3.36, special tokens parsed)."""
    known = {
        "Hello world 123 <|im_end|>": [19556, 905, 216, 33, 34, 35, 216, 2],
        SAMPLES[3].replace("\r\n", "").replace("3.14", "3.14159 1234"): [
            1604, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34, 216, 907, 216, 35, 30, 33, 36, 33, 37, 41, 216, 33,
            34, 35, 36, 1116, 3805, 329,
        ],
        "<a href='x'>T&amp;</a>\n<!-- 12 -->": [
            44, 81, 31680, 2069, 104, 23, 46, 68, 22, 1613, 43, 9617, 81, 46, 198, 44, 17, 423, 216, 33, 34, 29255,
        ],
        "emoji 😀👩\u200d👩\u200d👧 ñ 日本語 العربية e\u0301": [
            391, 33777, 40303, 218, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 5549, 126,
            17097, 241, 115, 40993, 179, 120, 248, 27819, 34966, 20602, 31462, 23339, 43463, 297, 151, 219,
        ],
        "  lead   trail  ": [216, 1022, 256, 11231, 256],
    }  # fmt: skip
    for text, ids in known.items():
        assert smollm2.encode(text) == ids, text
    assert smollm2.bos_token_id == 1 and smollm2.eos_token_ids == (2, 0) and smollm2.vocab_size == 49152


def test_smollm2_equals_llama_cpp_on_a_book(smollm2: Tokenizer) -> None:
    server, text = llama_cpp(resolve("smollm2-135m", download=False).path), built_in_corpus()[:100_000]
    asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        assert smollm2.encode(text) == json.load(answer)["tokens"]


def test_smollm2_chat(smollm2: Tokenizer) -> None:
    ids = smollm2.encode_chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert ids == smollm2.encode("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == 3 and ids.count(2) == 2
    assert smollm2.token_bytes(2) == b""


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    """But for the few bytes that its vocabulary lacks (0xF1, 0xF2 ...), which its own tokenizer drops as well."""
    known = {smollm2.token_bytes(index) for index in range(1000)}
    assume(all(bytes([byte]) in known for byte in text.encode()))
    assert smollm2.decode(smollm2.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_tokenizer_json_equals_transformers(byte_folder: ModelFiles, text: str) -> None:
    ours, theirs = load_tokenizer(byte_folder.path), theirs_of(byte_folder.path)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True) == text


def test_added_tokens_that_are_not_special_stay_in_the_text(tmp_path: Path) -> None:
    pipeline = byte_level_pipeline(size=300)
    pipeline.add_tokens(["<tool_call>", "two words", "día", "日"])
    pipeline.add_special_tokens(["<|hidden|>"])
    files = save_folder(tmp_path, pipeline)
    ours, theirs = load_tokenizer(files.path), theirs_of(tmp_path)
    text = "a <tool_call>two words日<|hidden|> quick"
    ids = theirs.encode(text)
    assert ours.encode(text) == ids and {300, 301, 303, 304} < set(ids)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text.replace("<|hidden|>", "")
    # transformers takes the letters of an added token for its spelling of bytes where all of them could be: "d\ufffda"
    assert ours.decode(ours.encode("día")) == "día"


IM_END = {"content": "<|im_end|>", "special": True, "rstrip": True}


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token": "<|im_end|>"},
        {"added_tokens_decoder": {"320": IM_END}},
        {"additional_special_tokens": ["<|im_end|>"]},
        {"extra_special_tokens": {"image_token": "<|im_end|>"}},
    ],
)
@pytest.mark.parametrize("known", ["no", "a piece", "added"])
def test_tokens_that_only_the_config_names_are_found_as_by_transformers(
    tmp_path: Path, options: dict[str, Any], known: str
) -> None:
    """Fine-tunes whose tokenizer.json was left as it was."""
    pipeline = byte_level_pipeline(size=320)
    if known == "a piece":
        data = json.loads(pipeline.to_str())
        data["model"]["vocab"]["<|im_end|>"] = 320
        pipeline = type(pipeline).from_str(json.dumps(data))
    elif known == "added":
        pipeline.add_tokens(["<|im_end|>"])
    files = save_folder(tmp_path, pipeline, options)
    write_config(tmp_path, tiny_config(vocab_size=321))
    ours, theirs, text = load_tokenizer(files.path), theirs_of(tmp_path), "Hello <|im_end|> x"
    assert ours.encode(text) == theirs.encode(text) and ours.encode(text).count(320) == 1
    assert (320 in ours.eos_token_ids) == (options.get("eos_token") == "<|im_end|>")
    if known != "added" or "added_tokens_decoder" in options:
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_a_token_that_the_file_has_under_another_id_stays_there(tmp_path: Path) -> None:
    files = save_folder(tmp_path, byte_level_pipeline(), {"added_tokens_decoder": {"9": IM_END | {"content": "</s>"}}})
    assert load_tokenizer(files.path).encode("a</s>", bos=False)[-1] == byte_level_pipeline().token_to_id("</s>")


def test_a_token_with_an_id_of_its_own_is_refused(tmp_path: Path) -> None:
    for index in ("400", "0"):
        save_folder(tmp_path, byte_level_pipeline(), {"added_tokens_decoder": {index: IM_END}})
        refused(lambda: load_tokenizer(tmp_path), "<|im_end|>", f"the id {index}", "download both again")


@pytest.mark.parametrize(("option", "expected"), [(None, True), (False, False), (True, True)])
def test_the_first_token_follows_the_model_s_own_rule(tmp_path: Path, option: bool | None, expected: bool) -> None:
    options = {} if option is None else {"add_bos_token": option}
    ours = load_tokenizer(save_folder(tmp_path, with_bos(byte_level_pipeline()), options).path)
    assert (ours.encode("quick")[0] == ours.bos_token_id) == expected
    assert ours.encode("quick", bos=False)[0] != ours.bos_token_id


def test_all_that_a_post_processor_writes_before_a_text(tmp_path: Path) -> None:
    """As GLM-4's two tokens; what it writes behind is left out."""
    pipeline = byte_level_pipeline()
    ids = [(token, pipeline.token_to_id(token)) for token in ("<s>", "</s>")]
    pipeline.post_processor = processors.TemplateProcessing(single="<s> </s> $A </s>", special_tokens=ids)
    save_folder(tmp_path, pipeline, {"add_bos_token": False})
    ours = load_tokenizer(tmp_path)
    assert ours.encode("ab") == [ids[0][1], ids[1][1], *ours.encode("ab", bos=False)]


@pytest.mark.parametrize("declares", [False, True])
def test_which_file_names_the_end(tmp_path: Path, declares: bool) -> None:
    """special_tokens_map.json, as in transformers, unless tokenizer_config.json declares added tokens; an empty name is none of
    them."""
    pipeline = byte_level_pipeline()
    pipeline.add_special_tokens(["<a>", "<b>"])
    declared = {"added_tokens_decoder": {}} if declares else {}
    save_folder(tmp_path, pipeline, {"eos_token": "<a>", "bos_token": "", **declared})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<b>", "bos_token": "<a>"}))
    ours = load_tokenizer(tmp_path)
    assert ours.eos_token_ids[-1] == pipeline.token_to_id("<a>" if declares else "<b>")
    assert ours.bos_token_id == pipeline.token_to_id("<a>")


def test_without_a_rule_nothing_is_added(tmp_path: Path) -> None:
    ours = load_tokenizer(save_folder(tmp_path, byte_level_pipeline()).path)
    assert ours.encode("quick") == ours.encode("quick", bos=False)


def test_truncation_and_padding_saved_in_the_file_are_switched_off(tmp_path: Path) -> None:
    pipeline = byte_level_pipeline()
    pipeline.enable_truncation(4)
    pipeline.enable_padding(length=64)
    ours = load_tokenizer(save_folder(tmp_path, pipeline).path)
    assert ours.decode(ours.encode(WORDS)) == WORDS and len(ours.encode("a")) == 1


@pytest.mark.parametrize("template", [CHATML, STRICT])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("place", ["config", "list", "jinja"])
def test_chat_equals_transformers(tmp_path: Path, template: str, prompt: bool, place: str) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    places: dict[str, dict[str, Any]] = {"config": {"chat_template": template}, "list": {"chat_template": named}, "jinja": {}}
    files = save_folder(tmp_path, with_bos(byte_level_pipeline()), places[place])
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(template)
    want = theirs_of(tmp_path).apply_chat_template(TURNS, add_generation_prompt=prompt, tokenize=True, return_dict=False)
    assert load_tokenizer(files.path).encode_chat(TURNS, add_generation_prompt=prompt) == want


LLAMA_3 = """{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>

{{ message['content'] | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}"""
LLAMA_2 = """{% if messages[0].role == 'system' %}{% set first = '<<SYS>>' + messages[0].content + '<</SYS>>' %}
{%- set messages = messages[1:] %}{% endif %}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + first | default('') + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content | trim + eos_token }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, LLAMA_2])
def test_a_turn_is_what_a_conversation_has_in_addition(template: str) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    first, answer, next_ = [{"role": r, "content": c} for r, c in (("user", "Hi."), ("assistant", "Hello."), ("user", "Bye?"))]
    whole = render_chat(template, [first, answer, next_], names, add_generation_prompt=True)
    begin = render_chat(template, [first], names, add_generation_prompt=True)
    said = " Hello." if template is LLAMA_2 else "Hello."
    assert begin + said + render_turn(template, [next_], names) == whole


def test_what_a_template_marks_for_training_is_rendered() -> None:
    marked = CHATML.replace("+ message['content'] +", "}}{% generation %}{{ message['content'] }}{% endgeneration %}{{")
    assert "endgeneration" in marked
    plain, found = (render_chat(t, TURNS, {}, add_generation_prompt=True) for t in (CHATML, marked))
    assert found == plain


def test_a_template_is_given_what_a_user_gives_it(tmp_path: Path) -> None:
    """As Qwen3's ``enable_thinking``, in a first question and in later ones."""
    thinks = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"
    save_folder(tmp_path, with_bos(byte_level_pipeline()), {"chat_template": thinks})
    write_checkpoint(tmp_path, tiny_config(), random_weights(tiny_config()))
    _, plain = open_model(str(tmp_path))
    _, quick = open_model(str(tmp_path), chat_template_kwargs={"enable_thinking": False})
    shut = plain.encode("<think>\n\n</think>", bos=False)
    assert quick.encode_chat(TURNS) == plain.encode_chat(TURNS) + shut
    assert quick.encode_turn(TURNS[-1:]) == plain.encode_turn(TURNS[-1:]) + shut


ASKED = {"role": "user", "content": "Weather?"}
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    "said",
    [
        CALLED,
        CALLED | {"content": None},
        {"role": "assistant", "content": "Hi.", "tool_calls": None},
        *({"role": "assistant", "content": "Hi.", name: "Hm."} for name in ("reasoning_content", "reasoning", "thinking")),
    ],
)
def test_what_an_answer_lacks_and_what_was_thought_is_as_in_transformers(tmp_path: Path, said: dict[str, Any]) -> None:
    template = """{% for m in messages %}{{ m.role }}|{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}
{% if m.tool_calls is defined %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"""
    save_folder(tmp_path, byte_level_pipeline(), {"chat_template": template})
    want = theirs_of(tmp_path).apply_chat_template([ASKED, said], tokenize=True, return_dict=False)
    assert load_tokenizer(tmp_path).encode_chat([ASKED, said], add_generation_prompt=False) == want


def test_a_template_that_asks_whether_there_is_content_is_answered(tmp_path: Path) -> None:
    """DeepSeek-R1's way, which an absent content would break; in others it must not be the word None."""
    asks = """{% for m in messages %}{% if m['content'] is none %}calls {{ m['tool_calls'][0]['function']['name'] }}
{% else %}{{ 'says ' + m['content'] }}{% endif %}{% endfor %}"""
    for said in (CALLED, CALLED | {"content": None}):
        assert "calls w" in render_chat(asks, [ASKED, said], {}, add_generation_prompt=False)
        assert "None" not in render_chat("{% for m in messages %}{{ m.content }}{% endfor %}", [ASKED, said], {},
                                         add_generation_prompt=False)  # fmt: skip
    with pytest.raises(ModelError, match="UndefinedError"):
        render_chat("{{ messages[0].nothing.deeper }}", [ASKED, CALLED], {}, add_generation_prompt=False)


def test_templates_are_given_special_tokens_by_name(tmp_path: Path) -> None:
    """Those that have one in every model, and what a file makes up; new ones get their ids in this order."""
    names = {"cls_token": "<cls>", "extra_special_tokens": {"image_token": "<img>"}}
    save_folder(
        tmp_path, byte_level_pipeline(), names | {"chat_template": "{{ image_token }}|{{ cls_token }}{{ messages[0].content }}"}
    )
    write_config(tmp_path, tiny_config(vocab_size=330))
    want = theirs_of(tmp_path).apply_chat_template([ASKED], tokenize=True, return_dict=False)
    assert load_tokenizer(tmp_path).encode_chat([ASKED]) == want and set(want[::2]) >= {320, 321}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_a_special_token_count(tmp_path: Path, file: str, flag: str) -> None:
    save_folder(tmp_path, byte_level_pipeline())
    token = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, flag: True}
    options = json.loads((tmp_path / file).read_text()) if (tmp_path / file).is_file() else {}
    own = {"__type": "AddedToken"} if file == "tokenizer_config.json" else {}
    (tmp_path / file).write_text(json.dumps(options | {"pad_token": token | own}))
    write_config(tmp_path, tiny_config(vocab_size=321))
    text = "fox <|im_end|> \nx<|im_end|>y"
    assert load_tokenizer(tmp_path).encode(text, bos=False) == theirs_of(tmp_path).encode(text, add_special_tokens=False)


def broken(kind: str) -> Any:
    data = json.loads(with_bos(byte_level_pipeline()).to_str())
    if kind == "prefix":
        data["model"]["continuing_subword_prefix"] = "x"
    else:
        data["post_processor"]["special_tokens"] = {}
    return data


@pytest.mark.parametrize(("kind", "fragment"), [("prefix", "continuing_subword_prefix"), ("post", "PanicException")])
def test_what_the_library_panics_at_is_one_line(tmp_path: Path, kind: str, fragment: str) -> None:
    save_folder(tmp_path, byte_level_pipeline())
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken(kind)))
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.json", fragment)


def test_templates_whose_name_is_none_are_left_out(tmp_path: Path) -> None:
    templates = [{"name": ["default"], "template": "no"}, {"name": "default", "template": CHATML}]
    save_folder(tmp_path, byte_level_pipeline(), {"chat_template": templates})
    assert load_tokenizer(tmp_path).chat_template == CHATML


READS_PARTS = [
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}",
    "{{ m.content[0]['text'] }}",
]


@pytest.mark.parametrize("reads", READS_PARTS)
def test_a_template_that_reads_parts_is_given_parts(reads: str) -> None:
    """As Llama Guard 3's, which would judge an empty conversation."""
    template = f"{{% for m in messages %}}{{{{ m.role }}}}: {reads};{{% endfor %}}"
    said = [{"role": r, "content": c} for r, c in (("user", "Hi there."), ("assistant", "Hello."), ("user", "Bye?"))]
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in said]
    for messages in (said, in_parts):
        assert (
            render_chat(template, messages, {}, add_generation_prompt=True) == "user: Hi there.;assistant: Hello.;user: Bye?;"
        )
    assert render_turn(template, said[2:], {}) == ";user: Bye?;"


def test_content_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    first, second = ([{"role": "user", "content": content}] for content in (parts, "Be brief."))
    assert render_chat(CHATML, first, {}, add_generation_prompt=True) == render_chat(
        CHATML, second, {}, add_generation_prompt=True
    )


def test_messages_that_a_template_refuses_in_the_middle_begin_a_conversation() -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    assert render_turn(LLAMA_2, messages, names) == "<s>[INST] <<SYS>>Be brief.<</SYS>>Hi. [/INST]"
    assert render_turn("{{ messages[-1].content }}", messages, names) == "Hi.", "a template without answers"


@pytest.mark.parametrize(
    ("template", "messages", "fragments"),
    [
        (None, TURNS, ["no chat template"]),
        (STRICT, [{"role": "assistant", "content": ""}], ["who"]),
        ("{% for %}", TURNS, ["TemplateSyntaxError"]),
        ("{{ messages[0].nothing.deeper }}", TURNS, ["UndefinedError"]),
        ("{{ ''.__class__.__mro__ }}", TURNS, ["SecurityError"]),
        (CHATML, [{"role": "user"}], ["message 0", "content"]),
        (CHATML, [{"role": "user", "content": [{"type": "image_url"}]}], ["message 0", "image_url", "reads text"]),
        (CHATML, [{"role": "user", "content": ["x"]}], ["message 0", "'x'"]),
        (CHATML, ["hi"], ["message 0"]),
        (CHATML, [], ["at least one"]),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_one_line(
    tmp_path: Path, template: str | None, messages: Any, fragments: list[str]
) -> None:
    options = {} if template is None else {"chat_template": template}
    ours = load_tokenizer(save_folder(tmp_path, byte_level_pipeline(), options).path)
    refused(lambda: ours.encode_chat(messages), *fragments)
    refused(lambda: ours.encode_turn(messages), *fragments)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_sentencepiece_files_and_gguf_vocabularies_equal_sentencepiece(
    spm_folder: ModelFiles, spm_model: bytes, text: str
) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    want = sp.encode(text)
    file = load_tokenizer(spm_folder.path)
    assert file.encode(text) == [sp.bos_id(), *want] and file.encode(text, bos=False) == want
    assert file.decode(want) == sp.decode(want)
    built = build_tokenizer(spm_fields(spm_model), tiny_config())
    assert built.encode(text, bos=False) == want and built.encode(text)[0] == 1
    assert built.decode(want) == file.decode(want)


def test_where_instructions_are_tokens_only_the_first_text_has_a_space(spm_model: bytes) -> None:
    """As in Mistral's vocabularies from v0.3 on; with ``[INST]`` as text every piece has one."""
    fields = spm_fields(spm_model)
    tokens, kinds = list(fields.data["tokenizer.ggml.tokens"]), fields.data["tokenizer.ggml.token_type"].copy()
    place = next(index for index, kind in enumerate(kinds) if kind == 1 and index > 300)
    tokens[place], kinds[place] = "[INST]", 3
    changed = {**fields.data, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    named = build_tokenizer(Fields(changed, fields.where), tiny_config())
    plain = build_tokenizer(fields, tiny_config())
    first, later = plain.encode("the quick", bos=False), plain.encode("</s>the quick", bos=False)[1:]
    assert later == first
    assert named.encode("the quick", bos=False) == first
    assert (
        named.encode("[INST] the quick", bos=False) == [place, *first] and named.encode("[INST]the", bos=False)[1:] != first[:1]
    )


def test_special_tokens_are_parsed_in_sentencepiece_chats(spm_folder: ModelFiles, spm_model: bytes) -> None:
    file, built = load_tokenizer(spm_folder.path), build_tokenizer(spm_fields(spm_model), tiny_config())
    ids = file.encode_chat(TURNS)
    assert ids.count(1) == 4 and ids.count(2) == 3
    assert ids == built.encode_chat(TURNS)


def test_tokens_added_to_a_sentencepiece_model(spm_folder: ModelFiles, spm_model: bytes, tmp_path: Path) -> None:
    """As ChatML fine-tunes of Llama and Mistral have them: recognized in texts, no text when decoded, and an end."""
    folder = Path(shutil.copytree(spm_folder.path, tmp_path / "m"))
    size = sentencepiece.SentencePieceProcessor(model_proto=spm_model).get_piece_size()
    write_config(folder, tiny_config(vocab_size=size + 3))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"]}))
    later = {str(size + 1): {"content": "<|im_end|>", "special": True}, str(size + 2): {"content": "<call>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": later, "eos_token": "<|im_end|>"}))
    plain, ours = load_tokenizer(spm_folder.path), load_tokenizer(folder)
    found = ours.encode("<|im_start|>the quick<call><|im_end|>", bos=False)
    assert found == [size, *plain.encode("the quick", bos=False), size + 2, size + 1]
    assert ours.decode(found) == "the quick<call>" and ours.vocab_size == size + 3 and size + 1 in ours.eos_token_ids
    stream = TextStream(ours)
    assert "".join(map(stream.push, found)) == "the quick<call>"
    wrong = {"''": {"": 1}, "'1'": {"x": "1"}, "'-1'": {"x": -1}, "not valid Unicode": {"\ud800": 400}, "'[1]'": {"x": [1]}}
    for fragment, data in wrong.items():
        (folder / "added_tokens.json").write_text(json.dumps(data))
        refused(lambda: load_tokenizer(folder), fragment)


def test_only_legacy_files_have_a_space_after_special_tokens(spm_folder: ModelFiles, spm_model: bytes, tmp_path: Path) -> None:
    """As LlamaTokenizer of transformers 4 (compared by hand): ``legacy: false`` puts a space only before the whole text."""
    folder = Path(shutil.copytree(spm_folder.path, tmp_path / "m"))
    bare = build_tokenizer(spm_fields(spm_model, **{"tokenizer.ggml.add_space_prefix": False}), tiny_config())
    full = load_tokenizer(spm_folder.path)

    def plain(text: str, before: str = "") -> list[int]:
        return bare.encode(before + text, bos=False)

    for legacy, prefix in ((False, True), (False, False), (True, True)):
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "add_prefix_space": prefix}))
        ours, before = load_tokenizer(folder), " " if prefix else ""
        assert ours.encode("quick fox", bos=False) == plain("quick fox", before)
        after = plain("the quick", " " if legacy else "")
        assert ours.encode("<s>the quick</s> x", bos=False)[: len(after) + 1] == [1, *after]
        assert ours.encode("a<unk>", bos=False) == [*plain("a", before), 0]
        assert ours.decode(ours.encode("a b")) == "a b" and ours.strips_first_space == prefix
    assert full.encode("quick fox", bos=False) == plain("quick fox", " ")


def test_white_space_around_an_added_token_is_taken_in(spm_folder: ModelFiles, spm_model: bytes, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(spm_folder.path, tmp_path / "m"))
    size = sentencepiece.SentencePieceProcessor(model_proto=spm_model).get_piece_size()
    write_config(folder, tiny_config(vocab_size=size + 1))
    plain = load_tokenizer(spm_folder.path)
    for flag, text in (("lstrip", "fox  <|im_end|>lazy"), ("rstrip", "fox<|im_end|> \n lazy")):
        token = {"content": "<|im_end|>", "special": True, flag: True}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(size): token}}))
        want = [*plain.encode("fox", bos=False), size, *plain.encode("lazy", bos=False)]
        assert load_tokenizer(folder).encode(text, bos=False) == want


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_half_a_surrogate_pair_is_no_special_token(spm_folder: ModelFiles, tmp_path: Path, name: str) -> None:
    options = {"bos_token": "\ud800"}
    if name == "tokenizer.json":
        files = save_folder(tmp_path, byte_level_pipeline(), options)
    else:
        files = ModelFiles(Path(shutil.copytree(spm_folder.path, tmp_path / "m")), "safetensors")
        (files.path / "tokenizer_config.json").write_text(json.dumps(options))
    refused(lambda: load_tokenizer(files.path), "bos_token", "not valid Unicode")


def test_white_space_after_the_added_tokens_of_phi3_is_taken_in(spm_model: bytes) -> None:
    """As its tokenizer.json says and its GGUF files do not: behind all but ``<s>``, ``<unk>`` and ``<|endoftext|>``."""
    fields = spm_fields(spm_model, **{"general.architecture": "phi3"})
    plain, ours = (build_tokenizer(Fields(data, "m.gguf"), tiny_config()) for data in (spm_fields(spm_model).data, fields.data))
    for token, takes in (("</s>", True), ("[TOOL]", True), ("<s>", False)):
        text = f"fox{token} \n lazy"
        want = plain.encode(text.replace(" \n ", "") if takes else text, bos=False)
        assert ours.encode(text, bos=False) == want, token


def test_no_space_is_added_where_the_file_says_so(spm_model: bytes) -> None:
    built = build_tokenizer(spm_fields(spm_model, **{"tokenizer.ggml.add_space_prefix": False}), tiny_config())
    assert not built.strips_first_space
    assert built.decode(built.encode(" a")) == " a" and built.decode(built.encode("a")) == "a"


def bpe_fields(pre: str) -> tuple[Fields, dict[str, int], list[tuple[str, str]]]:
    """A byte-level GGUF vocabulary with merges across every boundary that pre-tokenizers draw differently."""
    model = json.loads(byte_level_pipeline(size=330).to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    for a, b in [("1", "2"), ("12", "3"), ("123", "4"), ("Ġ", "1"), (".", "Ċ"), ("'", "R"), ("'R", "E"), ("a", "1")]:
        if a + b not in vocab:
            vocab[a + b] = len(vocab)
            merges.append((a, b))
    vocab["Ġbird"] = len(vocab)  # no merge leads to it: only a vocabulary of whole words finds it
    kinds = np.full(len(vocab), NORMAL, dtype=np.int32)
    kinds[:2] = CONTROL
    data = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
    }
    return Fields(data, "m.gguf"), vocab, merges


def build(pre: str) -> FastTokenizer:
    return build_tokenizer(bpe_fields(pre)[0], tiny_config(vocab_size=400, bos_token_id=0))


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_qwen2_vocabularies_equal_transformers(text: str) -> None:
    fields, vocab, merges = bpe_fields("qwen2")
    peer: Any = Qwen2Tokenizer
    theirs = peer(vocab=vocab, merges=merges, unk_token=None, pad_token=None, eos_token="</s>", bos_token="<s>")
    ours = build_tokenizer(fields, tiny_config(vocab_size=400))
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("pre", "bos", "digits", "contraction"),
    [
        ("llama-bpe", True, ["123", "4"], True),
        ("qwen2", False, ["1", "2", "3", "4"], True),
        ("smollm", False, ["1", "2", "3", "4"], False),
        ("gpt-2", False, ["12", "34"], False),
        ("default", False, ["123", "4"], False),
        ("tekken", True, ["1", "2", "3", "4"], True),
        ("smaug-bpe", False, ["123", "4"], True),
        ("dbrx", False, ["123", "4"], True),
        ("chatglm-bpe", False, ["123", "4"], True),
        ("glm4", False, ["123", "4"], True),
        ("gpt-4o", False, ["123", "4"], True),
    ],
)
def test_each_pre_tokenizer_draws_its_own_boundaries(pre: str, bos: bool, digits: list[str], contraction: bool) -> None:
    """Digits of a number that may merge, and whether ``'RE`` in capitals is one word (Llama 3, Qwen2)."""
    ours = build(pre)
    assert (ours.encode("x")[0] == 0) == bos
    assert [ours.token_bytes(i).decode() for i in ours.encode("1234", bos=False)] == digits
    assert (b"'RE" in [ours.token_bytes(i) for i in ours.encode("we'RE", bos=False)]) == contraction


O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Of OpenAI's tiktoken 0.14."""


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("aZéÉǅʰあ\u0301१½39'sLrevm \n\r\t/.,!日한😀_-")))
@example(text="We'RE at HTTPServer2024's  \n//x ǅ don't")
def test_gpt_4o_cuts_a_text_as_tiktoken_does(text: str) -> None:
    [pattern] = PRE_TOKENIZERS["gpt-4o"].patterns
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == regex.findall(O200K, text)


def test_files_that_name_no_pre_tokenizer_are_known_by_their_tokens() -> None:
    fields = bpe_fields("llama-bpe")[0]
    data = {key: value for key, value in fields.data.items() if key != "tokenizer.ggml.pre"}
    refused(lambda: build_tokenizer(Fields(data, "m.gguf"), tiny_config(vocab_size=400)), "pre is missing", "newer file")
    old = build_tokenizer(Fields(data | {"general.architecture": "qwen2"}, "m.gguf"), tiny_config(vocab_size=400))
    assert old.encode("1234") == build("qwen2").encode("1234")
    tokens = ["<|begin_of_text|>", *data["tokenizer.ggml.tokens"][1:]]
    config = tiny_config(vocab_size=400, bos_token_id=0)
    assert build_tokenizer(Fields(data | {"tokenizer.ggml.tokens": tokens}, "m.gguf"), config).encode("1234") == build(
        "llama-bpe"
    ).encode("1234")


def test_an_end_that_is_no_control_token_is_an_end() -> None:
    """ChatML fine-tunes of Mistral: ``<|im_end|>`` is typed as a user's token."""
    fields = bpe_fields("llama-bpe")[0]
    tokens = [*fields.data["tokenizer.ggml.tokens"], "<|im_end|>"]
    kinds = np.append(fields.data["tokenizer.ggml.token_type"], np.int32(USER_DEFINED))
    data = fields.data | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    assert end_tokens(tokens, kinds) == [1, len(tokens) - 1]
    ours = build_tokenizer(Fields(data, "m.gguf"), tiny_config(vocab_size=400, bos_token_id=0))
    assert ours.decode(ours.encode("Hi.<|im_end|>")) == "Hi."


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_llama3_takes_whole_words_from_its_vocabulary(pre: str, whole: bool) -> None:
    ours = build(pre)
    assert (b" bird" in [ours.token_bytes(i) for i in ours.encode("a bird")]) == whole


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"tokenizer.ggml.model": "bert"}, ["bert", "gpt2, llama"]),
        ({"tokenizer.ggml.pre": "qwen3"}, ["qwen3", "did you mean 'qwen2'"]),
        ({"tokenizer.ggml.tokens": None}, ["no vocabulary"]),
        ({"tokenizer.ggml.token_type": np.ones(3)}, ["token_type"]),
        ({"tokenizer.ggml.merges": None}, ["merges is missing"]),
        ({"tokenizer.ggml.merges": ["a b c"]}, ["not two pieces"]),
        ({"tokenizer.ggml.merges": ["zz qq"]}, ["do not form a vocabulary"]),
        ({"tokenizer.ggml.model": "llama"}, ["scores"]),
    ],
)
def test_a_broken_vocabulary_is_one_line(changes: dict[str, Any], fragments: list[str]) -> None:
    fields = Fields({**bpe_fields("qwen2")[0].data, **changes}, "m.gguf")
    refused(lambda: build_tokenizer(fields, tiny_config()), "m.gguf", *fragments)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_or_missing_file_is_one_line(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, tiny_config())
    files = ModelFiles(tmp_path, "safetensors")
    refused(lambda: load_tokenizer(files.path), "no tokenizer.json, tokenizer.model or tekken.json")
    (tmp_path / name).write_bytes(b"{\x00garbage\xff")
    refused(lambda: load_tokenizer(files.path), name, "download it again")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda data: data["model"]["vocab"].update({"odd": 10**9}), ["id 1,000,000,000"]),
        (
            lambda data: data.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
            ["not a tokenizer"],
        ),
    ],
)
def test_a_tokenizer_that_takes_all_memory_or_breaks_the_library_is_refused(
    tmp_path: Path, change: Any, fragments: list[str]
) -> None:
    files = save_folder(tmp_path, byte_level_pipeline())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    refused(lambda: load_tokenizer(files.path), "tokenizer.json", *fragments)


def test_a_text_has_the_same_ids_each_time(tmp_path: Path) -> None:
    """Whatever share of merges was left out in training."""
    files, text = save_folder(tmp_path, byte_level_pipeline()), "the quick brown fox " * 20
    wanted = load_tokenizer(files.path).encode(text)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(files.path)
    assert all(tokenizer.encode(text) == wanted for _ in range(5))


def test_a_template_that_leaves_out_what_the_user_says_is_refused() -> None:
    said = [{"role": "user", "content": "What is the capital of France?"}]
    for template in ("{{ bos_token }}{% for m in messages %}{{ m['text'] }}{% endfor %}", "hi"):
        refused(lambda template=template: render_chat(template, said, {}, add_generation_prompt=True), "leaves out")
    last = "{{ messages[-1].content }}"
    assert (
        render_chat(last, [{"role": "user", "content": "First."}, *said], {}, add_generation_prompt=True) == said[0]["content"]
    )
    assert render_chat("x", [{"role": "user", "content": " "}], {}, add_generation_prompt=True) == "x"


def test_a_decoder_of_another_family_is_refused(tmp_path: Path) -> None:
    from tokenizers import decoders

    pipeline = byte_level_pipeline()
    pipeline.decoder = decoders.WordPiece()
    files = save_folder(tmp_path, pipeline)
    refused(lambda: load_tokenizer(files.path), "WordPiece", "ByteLevel")


def test_a_token_without_a_row_in_the_embedding_is_refused(tmp_path: Path) -> None:
    files = save_folder(tmp_path, byte_level_pipeline(size=330))
    ours = load_tokenizer(files.path)
    ids = {index for index in range(ours.vocab_size) if index >= 320}
    text = next(ours.token_bytes(index).decode() for index in sorted(ids))
    refused(lambda: ours.encode(text), "the model has 320")


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["smollm2", "bytes", "spm", "built", "dummy"]), data=st.data())
def test_a_stream_is_the_whole_text_and_never_half_a_character(
    kind: str,
    data: st.DataObject,
    smollm2: Tokenizer,
    byte_folder: ModelFiles,
    spm_folder: ModelFiles,
    spm_model: bytes,
) -> None:
    made: dict[str, Any] = {
        "smollm2": lambda: smollm2,
        "bytes": lambda: load_tokenizer(byte_folder.path),
        "spm": lambda: load_tokenizer(spm_folder.path),
        "built": lambda: build_tokenizer(spm_fields(spm_model), tiny_config()),
        "dummy": lambda: dummy_tokenizer(300),
    }
    tokenizer: Tokenizer = made[kind]()
    texts = TEXTS.map(tokenizer.encode)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20) | texts)
    stream = TextStream(tokenizer)
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_split_over_tokens_comes_out_whole(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("😀!")
    stream = TextStream(smollm2)
    pieces = [stream.push(index) for index in ids]
    assert len(ids) > 2 and [piece for piece in pieces if piece] == ["😀", "!"] and stream.flush() == ""


def test_half_a_surrogate_pair_is_refused(byte_folder: ModelFiles, smollm2: Tokenizer) -> None:
    refused(lambda: smollm2.encode("a\ud800"), "character 1 is half of a surrogate pair")
    assert dummy_tokenizer(256).decode(dummy_tokenizer(256).encode("a\ud800")) == "a?"


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 9000), position=st.integers(0, 9000), value=st.integers(0, 255))
@example(cut=0, position=34, value=128)  # a piece that is no UTF-8
@example(cut=0, position=4, value=128)  # that of the unknown token
def test_spoiled_tokenizer_files_raise_only_our_error(
    byte_folder: ModelFiles, spm_folder: ModelFiles, tmp_path_factory: pytest.TempPathFactory, cut: int, position: int,
    value: int,
) -> None:  # fmt: skip
    for files, name in ((byte_folder, "tokenizer.json"), (spm_folder, "tokenizer.model")):
        data = bytearray((files.path / name).read_bytes())
        data[position % len(data)] = value
        folder = tmp_path_factory.mktemp("spoiled")
        (folder / "config.json").write_bytes((files.path / "config.json").read_bytes())
        (folder / name).write_bytes(bytes(data[: len(data) - cut] if cut % 2 else data))
        try:
            tokenizer = load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("quick brown 1"))
        except SkvqError as error:
            one_line(error)
