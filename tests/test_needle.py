"""The needle test: prompts are built as promised, scores are those of the cache asked about, the map is drawn."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from loader_fixtures import refused
from tiny import tiny_cache, tiny_engine, tiny_folder

from skvq.cli import main
from skvq.engine.cache import SequenceCache
from skvq.engine.errors import OptionError
from skvq.engine.generate import Engine
from skvq.engine.layer_caches import DecodeBatch
from skvq.engine.trials.needle import ask, needles, packed_share, reference_of, score, summary
from skvq.engine.trials.plots import _lost, heat_map

HAY = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return tiny_engine(folder, tiny_cache(), max_context=800, max_sequences=2)


def test_a_prompt_has_the_length_and_the_depth_asked_for(engine: Engine) -> None:
    hay = engine.encode(HAY, bos=False)
    for depth, share in ((0, 0.0), (50, 0.5), (100, 1.0)):
        question = ask(engine, hay, 700, depth, 12345)
        text = engine.parts.tokenizer.decode(question.prompt)
        assert len(question.prompt) + len(question.answer) + 4 == 700
        assert text.count("12345") == 1
        assert engine.parts.tokenizer.decode(question.answer) == " 12345"
        hay_before = text.index(" The secret number")
        room = text.index("\n\nQuestion") - len(" The secret number of the harbour master is 12345. ")
        assert hay_before / room == pytest.approx(share, abs=0.01)


def test_a_16_bit_cache_measured_against_itself_is_no_worse(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(method="fp"), max_context=600, max_sequences=2)
    found = needles(engine, reference_of(engine), HAY, [600], [50], seed=0, seen=lambda one: None)[0].as_dict()
    assert found["logprob"] == found["logprob_fp"]
    assert found["rank"] == found["rank_fp"]
    assert abs(found["kl"]) < 1e-9


def test_scores_of_the_map(engine: Engine) -> None:
    lines: list[str] = []
    found = needles(engine, reference_of(engine), HAY, [500, 800], [0, 100], seed=0, seen=lambda one: lines.append(one.line()))
    result = summary(found)
    assert len(result["results"]) == len(lines) == 4
    assert result["kl"] > 0
    assert all(row["logprob"] < 0 and 0 <= row["rank"] < 320 for row in result["results"])
    engine.parts.setup.arena.check({})


def test_where_the_needle_is_when_it_is_asked_for(engine: Engine) -> None:
    """What lies in the window, or is kept as a sink, says nothing of packed pages."""
    hay = engine.encode(HAY, bos=False)
    question = {depth: ask(engine, hay, 660, depth, 12345) for depth in (0, 50, 100)}
    text = engine.parts.tokenizer.decode([question[50].prompt[i] for i in question[50].needle])
    assert text == " The secret number of the harbour master is 12345. "
    packed, count = engine.parts.setup.regions.packed(len(question[0].prompt)), len(question[0].needle)
    assert packed_share(engine, question[0]) == 1 - (3 - question[0].needle.start) / count  # three sinks
    assert packed_share(engine, question[50]) == 1
    assert packed_share(engine, question[100]) == (packed - question[100].needle.start) / count < 1
    found = needles(engine, None, HAY, [660], [0, 50], seed=0, seen=lambda one: None)
    assert [one.line().endswith("% of it packed") for one in found] == [True, False]


def test_a_text_of_which_nothing_is_packed_is_refused(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(window=700), max_context=800)
    refused(lambda: needles(engine, None, HAY, [800, 700], [50], seed=0, seen=lambda one: None), "nothing is packed before")


def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For to load one may mean to calibrate it, for minutes."""
    monkeypatch.delattr(Engine, "load")
    (tmp_path / "empty").write_text(" \n")
    for options, words in (
        (("--ctx", "255"), "use a --ctx of at least 256 and the answer"),
        (("--ctx", "900", "--haystack", str(tmp_path / "empty")), "holds no text to hide a needle in"),
    ):
        found = CliRunner().invoke(main, ["needle", "--model", str(folder), "--group-size", "32", *options])
        assert found.exit_code == 2 and words in found.stderr, found.stderr


def test_the_least_context_that_is_told_is_enough(engine: Engine) -> None:
    for window in (16, 300):
        other = engine.with_cache(tiny_cache(window=window), max_sequences=2)
        with pytest.raises(OptionError, match="at least") as found:
            needles(other, None, HAY, [50], [50], seed=0, seen=lambda one: None)
        least = int(str(found.value).rsplit("at least ", 1)[1])
        assert len(needles(other, None, HAY, [least], [50], seed=0, seen=lambda one: None)) == 1
        with pytest.raises(OptionError, match=f"at least {least}"):
            needles(other, None, HAY, [least - 1], [50], seed=0, seen=lambda one: None)


@pytest.mark.parametrize(
    ("packed", "exact", "mark"),
    [
        (True, True, ""),
        (False, True, "\n× lost"),
        (False, False, "\nboth lost"),
        (True, False, "\n16-bit lost"),
        (False, None, "\n× lost"),
    ],
)
def test_the_map_blames_the_cache_only_for_its_own_losses(packed: bool, exact: bool | None, mark: str) -> None:
    assert _lost({"retrieved": packed} | ({} if exact is None else {"retrieved_fp": exact})) == mark


def test_rank_and_log_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    logprob, rank = score(logits, [1, 0])
    assert rank == 1
    assert logprob == pytest.approx(float((logits.log_softmax(-1)[0, 1] + logits.log_softmax(-1)[1, 0]) / 2))


def test_a_known_answer_is_retrieved(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = engine.parts.tokenizer.encode(" 12345", bos=False)
    question = ask(engine, engine.encode(HAY, bos=False), 400, 50, 12345)
    start = len(question.prompt) - 1

    class Parrot:
        def run(self, sequences: Sequence[SequenceCache], tokens: Sequence[int]) -> torch.Tensor:
            rows = torch.zeros(len(sequences), 320)
            with DecodeBatch(engine.parts.setup, len(sequences)).step(sequences, tokens):
                for row, sequence in zip(rows, sequences, strict=True):
                    row[answer[min(sequence.length - start, len(answer) - 1)]] = 9.0
            return rows

    monkeypatch.setattr(engine, "step", Parrot())
    monkeypatch.setattr(engine.parts.model, "head", lambda x: torch.nn.functional.one_hot(torch.tensor(answer[0]), 320) * 9.0)
    monkeypatch.setattr("skvq.engine.trials.needle.ask", lambda *rest: question)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor([12345]))
    found = needles(engine, None, HAY, [400], [50], seed=0, seen=lambda one: None)[0]
    assert "1234" in found.text
    assert found.rank == 0


def test_too_short_a_context_is_refused(engine: Engine) -> None:
    refused(lambda: ask(engine, [1], 100, 50, 12345), "100 tokens has no room", "at least")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skvq.engine.trials.needle.answer_logits", lambda *_: pytest.fail("a text was read"))
        refused(lambda: needles(engine, None, HAY, [500, 60], [50], seed=0, seen=lambda one: None), "60 tokens has no room")
    refused(lambda: needles(engine, None, HAY, [500], [120], seed=0, seen=lambda one: None), "0 to 100", "120")
    refused(lambda: needles(engine, None, "", [500], [50], seed=0, seen=lambda one: None), "haystack is empty")


def test_the_command_prints_json_and_draws_the_map(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "needle", "--model", str(folder), "--dummy-weights", "--ctx", "400,600", "--depths", "0,50,100", "--group-size", "32",
        "--window", "16", "--backend", "reference", "--device", "cpu", "--json", "--plot", str(tmp_path / "map.png"),
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert [(r["context"], r["depth"]) for r in found["results"]] == [(c, d) for c in (400, 600) for d in (0, 50, 100)]
    assert {"retrieved", "logprob", "logprob_fp", "kl", "rank"} <= set(found["results"][0]) | set(found)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    row = {"context": 1, "depth": 0.0, "logprob": -1.0, "retrieved": True}
    refused(lambda: heat_map([row], "", tmp_path / "a.png"), "pip install 'skvq[plot]'")
