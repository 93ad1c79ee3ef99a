"""Drawing tokens, stopping, and text that appears in whole characters."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.answer import Answer
from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.errors import ModelError, OptionError, SkvqError
from skvq.engine.grammar import Grammars
from skvq.engine.sampling import Sampler, StopStrings, candidates, uniform_at
from skvq.loaders.text import ByteTokenizer, TextStream

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0, 1.5, 0.0])


def drawn(sampler: Sampler, logits: Tensor, position: int) -> int:
    return sampler.take(*sampler.choose(logits, position)[:2].tolist())


def draws(count: int, logits: Tensor = LOGITS, **options: object) -> Tensor:
    sampler = Sampler(SamplingConfig(**options), [], len(logits), torch.device("cpu"))
    return torch.tensor([drawn(sampler, logits, position) for position in range(count)])


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert draws(5).tolist() == [0] * 5
    assert draws(5, torch.tensor([1.0, 3.0, 3.0])).tolist() == [1] * 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    """Chi-square of 5,000 draws over 7 tokens: 6 degrees of freedom, 22.5 is exceeded once in a thousand; the seed is fixed."""
    count = torch.bincount(draws(5000, temperature=temperature, seed=3), minlength=7)
    wanted = 5000 * (LOGITS.double() / temperature).softmax(0)
    assert ((count - wanted).square() / wanted).sum() < 22.5


def test_a_seed_draws_by_the_sum_of_probabilities() -> None:
    """The first token whose probability and those before it sum to a number of the seed and the position alone."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 3
    sums = logits.double().softmax(0).cumsum(0)
    wanted = [int((sums < uniform_at(5, position)).sum()) for position in range(50)]
    assert draws(50, logits, temperature=1.0, seed=5).tolist() == wanted and len(set(wanted)) > 10
    found = [uniform_at(5, position) for position in range(2000)]
    assert 0 < min(found) < 0.01 and 0.99 < max(found) < 1 and abs(sum(found) / 2000 - 0.5) < 0.02


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_one_line(temperature: float, wrong: float) -> None:
    logits = LOGITS.clone()
    logits[3] = wrong
    with pytest.raises(ModelError, match=f"logits is {wrong}"):
        draws(1, logits, temperature=temperature)
    logits[3] = -torch.inf  # a token that is never drawn
    assert draws(20, logits, temperature=temperature).max() < 7
    with pytest.raises(ModelError, match="-inf"):
        draws(1, torch.full((4,), -torch.inf), temperature=temperature)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(
    "method, size, part, value",
    [
        ("fp", 32, 0, torch.nan), ("fp", 40, 0, 1e7), ("fp", 40, 1, torch.nan), ("fp", 32, 0, 1e7),
        ("rotate", 32, 0, torch.nan), ("rotate", 32, 1, torch.nan), ("rotate", 32, 1, 1e7), ("reorder", 32, 0, torch.nan),
    ],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_one_line(
    tmp_path: Path, backend: str, method: str, size: int, part: int, value: float
) -> None:
    """A row of keys (part 0) or values (1) is NaN, or so large that its keys are beyond 16 bits: nothing is answered."""
    folder = tiny_folder(tmp_path, num_layers=2, head_size=size)
    engine = tiny_engine(folder, tiny_cache(method=method), backend=backend)
    config, (weight, *_) = engine.parts.model.config, engine.parts.model.weights.layers[0].qkv.tensors
    row = (config.num_heads + part * config.num_kv_heads) * size + size - 1
    weight[row] = weight[row] * value
    with pytest.raises(ModelError, match="weights are damaged"):
        engine.generate(list(range(40)), SamplingConfig(max_new_tokens=3))


class Spelt(ByteTokenizer):
    """Bytes, but that 257 is ``hello``, 258 has no text, and 300 ends an answer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (300,)

    def token_bytes(self, token_id: int) -> bytes:
        return {257: b"hello", 258: b"", 300: b""}.get(token_id, bytes([token_id % 256]))


@pytest.mark.parametrize(
    "tokens, stop, text, told",
    [
        ([257, 0xC3, 300], (), "hello\ufffd", [257, 0xC3]),  # not the end token, whatever is flushed before it
        ([65, 258, 300], (), "A", [65, 258]),  # a special token is one that was drawn, too
        ([0xC3, 257, 65], "hello", "\ufffd", [0xC3]),  # not what spells the stop string, behind a broken character
        ([0xC3, 0xA9, 65, 66], "AB", "\u00e9", [0xC3, 0xA9]),
        ([65, 257, 66], "loB", "Ahel", [65, 257]),
        ([65, 0xC3], (), "A", [65, 0xC3]),
    ],
)
def test_log_probabilities_are_told_of_the_tokens_of_the_text(
    tmp_path: Path, tokens: list[int], stop: str, text: str, told: list[int]
) -> None:
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=1), tiny_cache(method="fp"))
    config, spelt = SamplingConfig(max_new_tokens=len(tokens), stop=stop, logprobs=0), Spelt(320)
    with engine.prefill([1]) as sequence:

        def logits(token: int) -> Tensor:
            return torch.zeros(320).index_fill_(0, torch.tensor([token]), 9.0)

        answer = Answer(spelt, sequence, logits(tokens[0]), config, [1], Grammars(spelt, 320))
        seen = answer.piece()
        for token in tokens[1:]:
            answer.take([answer.choose([logits(token)], [])[0].tolist()], [])
            seen += answer.piece()
        assert answer.finish and seen == text
        assert [one.token for one in answer.logprobs] == told == [one.token for one in sequence.logprobs]


def kept_of(logits: Tensor, **options: object) -> Tensor:
    """Which tokens may be drawn, bool [V]; the others weigh nothing."""
    weights, tokens = candidates(logits - logits.max(), SamplingConfig(**options))
    tokens = torch.arange(len(logits)) if tokens is None else tokens
    assert len(set(tokens.tolist())) == len(tokens) == len(weights)
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[tokens[weights > 0]] = True
    likely = weights[weights > 0] / weights.sum()
    assert torch.allclose(likely, logits.softmax(0)[tokens[weights > 0]] / logits.softmax(0)[kept].sum(), rtol=1e-5)
    return kept


@pytest.mark.parametrize("k", [1, 3, 7, 100])
def test_top_k_keeps_the_k_likeliest(k: int) -> None:
    kept = kept_of(LOGITS, top_k=k).nonzero()[:, 0]
    assert sorted(kept.tolist()) == sorted(LOGITS.topk(min(k, 7)).indices.tolist())


@pytest.mark.parametrize("size", [7, 300, 9000])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.6, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_sum_to_p(p: float, size: int) -> None:
    """Of few tokens and of many, of which the likeliest 256 or 4,096 suffice, or do not."""
    logits = LOGITS if size == 7 else 1.5 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    full = logits.double().softmax(0)
    kept = kept_of(logits, top_p=p)
    assert full[kept].sum() >= p - 1e-6 and p > full[kept].sum() - full[kept].min() - 1e-6
    assert full[kept].min() >= full[~kept].max() if (~kept).any() else True


def test_top_p_is_of_what_top_k_has_left() -> None:
    two = LOGITS.topk(3).values.softmax(0)
    assert kept_of(LOGITS, top_k=3, top_p=float(two[0]) + 0.01).sum() == 2


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_min_p_is_relative_to_the_likeliest(p: float) -> None:
    full = LOGITS.softmax(0)
    assert torch.equal(kept_of(LOGITS, min_p=p), full >= p * full.max())


@given(
    logits=st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=20),
    temperature=st.floats(0, 1e6, allow_subnormal=True),
    top_k=st.integers(0, 30),
    top_p=st.floats(0, 1, exclude_min=True, allow_subnormal=True),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.01, 100),
)
@settings(deadline=None)
def test_any_options_draw_a_token(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=penalty)
    sampler = Sampler(config, [0], len(logits), torch.device("cpu"))
    for position in range(3):
        assert 0 <= drawn(sampler, torch.tensor(logits), position) < len(logits)


def test_a_cold_temperature_is_greedy() -> None:
    assert draws(20, temperature=1e-40).tolist() == [0] * 20


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_seen() -> None:
    sampler = Sampler(SamplingConfig(repeat_penalty=2.0), [0], 3, torch.device("cpu"))
    logits = torch.tensor([1.9, 1.0, -1.0])
    assert drawn(sampler, logits, 0) == 1, "1.9 / 2 < 1.0"
    assert drawn(sampler, logits, 1) == 0, "1.0 / 2 < 1.9 / 2"
    sampler = Sampler(SamplingConfig(repeat_penalty=2.0), [2], 3, torch.device("cpu"))
    assert drawn(sampler, torch.tensor([-3.0, -2.5, -2.0]), 0) == 1, "-2.0 * 2 < -2.5"


def test_a_seed_repeats_itself_and_another_does_not() -> None:
    a, b, c = (draws(50, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_each_sequence_of_a_batch_draws_what_it_would_alone() -> None:
    config = SamplingConfig(temperature=1.0, seed=4)
    one, other = (Sampler(config, [], 7, torch.device("cpu")) for _ in range(2))
    mixed = []
    for position in range(10):
        mixed.append(drawn(one, LOGITS, position))
        drawn(other, LOGITS, position)
    assert mixed == draws(10, temperature=1.0, seed=4).tolist()


# --- stop strings -----------------------------------------------------------------------------------------------------


def shown(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    watch = StopStrings(stops)
    return "".join(watch.push(p) for p in pieces) + ("" if watch.stopped else watch.flush()), watch.stopped


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    assert shown(["abc<", "/", "s>", "def"], ("</s>",)) == ("abc", True)
    assert shown(["abc<", "/", "t>"], ("</s>",)) == ("abc</t>", False)
    assert shown(["ab", "ab", "abc"], ("ababc",)) == ("ab", True)


def test_what_cannot_be_a_stop_string_is_shown_at_once() -> None:
    watch = StopStrings(("</s>",))
    assert [watch.push(p) for p in ("a", "b<", "c", "</")] == ["a", "b", "<c", ""]
    assert watch.flush() == "</"


@given(
    text=st.text("ab<", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    stops=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
)
def test_pieces_show_the_text_up_to_the_first_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    found, stopped = shown(pieces, tuple(stops))
    assert stopped == any(s in text for s in stops)
    assert text.startswith(found) and not any(s in found for s in stops)
    if not stopped:
        assert found == text


# --- characters -------------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=20), broken=st.binary(max_size=4))
def test_streamed_text_is_the_decoded_text_in_whole_characters(text: str, broken: bytes) -> None:
    tokenizer = ByteTokenizer(256)
    ids = [*tokenizer.encode(text), *broken]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    if not broken:
        assert all("\ufffd" not in p or "\ufffd" in text for p in pieces)


# --- options ----------------------------------------------------------------------------------------------------------


def one_line(error: SkvqError) -> None:
    assert "\n" not in str(error)


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.sampled_from(["fp", "rotate", 1.5, 2, 64, 64.0, 0, 128, 10**400])
)


@given(
    options=st.dictionaries(
        st.sampled_from([*SamplingConfig.__dataclass_fields__, "topk", "Temperature"]), ANYTHING, max_size=4
    )
)
def test_sampling_options_are_taken_or_refused_in_one_line(options: dict[str, object]) -> None:
    try:
        config = SamplingConfig(**options)
    except SkvqError as error:
        one_line(error)
        return
    sampler = Sampler(config, [1], 7, torch.device("cpu"))
    assert 0 <= drawn(sampler, LOGITS, 0) < 7
    StopStrings(config.stop).push("text")


@given(options=st.dictionaries(st.sampled_from([*CacheConfig.__dataclass_fields__, "key_bit", "windw"]), ANYTHING, max_size=4))
def test_cache_options_are_taken_or_refused_in_one_line(options: dict[str, object]) -> None:
    try:
        config = CacheConfig(**options)
    except SkvqError as error:
        one_line(error)
        return
    assert all(getattr(config, name) == value for name, value in options.items() if isinstance(value, int | float | str))


@pytest.mark.parametrize(
    "kind, name, nearest", [(SamplingConfig, "temprature", "temperature"), (CacheConfig, "windw", "window")]
)
def test_an_unknown_option_names_the_nearest(kind: type, name: str, nearest: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}'; did you mean '{nearest}'"):
        kind(**{name: 1})
