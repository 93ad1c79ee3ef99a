"""The command line: what it prints where, and every bad input: one line, exit 2, nothing written."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_fixtures import byte_level_pipeline, random_weights, tiny_config, write_checkpoint
from processes import import_paths
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from skvq.cli import main, run
from skvq.commands.errors import output_error
from skvq.commands.text import argument_text, file_text
from skvq.engine import decode, reading, sampling, session
from skvq.engine.config import CacheConfig
from skvq.engine.container import write_container
from skvq.engine.errors import OptionError
from skvq.engine.generate import Engine
from skvq.engine.model_config import RopeConfig
from skvq.engine.pieces import finished
from skvq.engine.report import Quiet
from skvq.loaders.artifact import load_artifact, save_artifact
from skvq.loaders.files import cache_folder

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def call(command: str, *args: object, stdin: str | bytes | None = None) -> Result:
    """Run a command with the backend that needs no compiling, unless it names another."""
    backend = ("--backend", "reference") if command in ("run", "eval", "calibrate") else ()
    return CliRunner().invoke(main, [command, *backend, *map(str, args)], input=stdin, catch_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer, a chat template, and logits that are neither flat nor wild."""
    config = tiny_config(trained_context=4096, rope=RopeConfig(original_context=4096))
    weights = {n: w if w.ndim == 1 else w / w.shape[1] ** 0.5 for n, w in random_weights(config).items()}
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), config, weights)
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def refused(result: Result, *fragments: str) -> None:
    """One line on stderr that begins as it should and holds the fragments; nothing on stdout; exit 2."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and result.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("skvq: error: ") and len(lines[0]) < 700, lines
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def files_under(*folders: Path) -> set[tuple[str, int]]:
    return {(str(f), f.stat().st_mtime_ns) for folder in folders for f in folder.rglob("*")}


# --- what works -------------------------------------------------------------------------------------------------------


def test_run_prints_the_answer_alone_and_one_closing_line(model: Path) -> None:
    call("run", "--model", model, "-p", "the", "-n", 1, "--method", "plain")  # calibrated
    told = {"all in 16 bits": ("fp", 60), "in the 16-bit window": ("plain", 1), "times smaller than 16-bit": ("plain", 60)}
    for words, (method, count) in told.items():
        result = call("run", "--model", model, "-p", "the quick brown " * count, "-n", 7, "--method", method)
        assert result.exit_code == 0 and result.stdout.endswith("\n") and "skvq" not in result.stdout
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("skvq: read ")
        for word in ("tokens/s", "MB", words):
            assert word in lines[0]


def test_run_json_is_the_last_line_and_repeats_the_text(model: Path) -> None:
    options = ("--model", model, "-p", "the quick brown", "-n", 7, "--temperature", 0.8, "--seed", 5, "--ignore-eos")
    found = json.loads(call("run", *options, "--json").stdout.splitlines()[-1])
    assert found["text"] == call("run", *options).stdout.removesuffix("\n")
    assert (
        found["new_tokens"] == 7
        and found["decoded_tokens"] == 6
        and found["method"] == "rotate"
        and found["cached_tokens"] == found["prompt_tokens"] + 6
    )
    assert 1 < found["bits_per_element"] <= 16 and found["times_smaller"] == pytest.approx(16 / found["bits_per_element"])


def test_a_plan_of_16_bits_shows_the_widths_that_fit_the_heads(model: Path) -> None:
    found = json.loads(call("plan", "--model", model, "--method", "fp", "--group-size", 128, "--json").stdout)
    assert len(found["largest_context"]) > 2


def test_a_loss_beyond_numbers_is_one_line(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    save_file({n: 1e6 * w if "lm_head" in n else w for n, w in weights.items()}, folder / "model.safetensors")
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox " * 20)
    refused(call("eval", "--model", folder, "--method", "fp", "--text", text, "--tokens", 50), "nats per token")


def test_skvq_run_is_skvq_run(model: Path) -> None:
    options = ["--model", str(model), "-p", "over the lazy dogs", "-n", "5"]
    assert CliRunner().invoke(run, [*options, "--backend", "reference"]).stdout == call("run", *options).stdout != "\n"


def test_text_comes_from_a_file_from_standard_input_and_before_the_prompt(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("naïve — déjà vu! 日本 😀", encoding="utf-8")
    options = ("--model", model, "-n", 4, "--method", "fp", "--json")

    def tokens(*more: object, stdin: str | None = None) -> int:
        return int(json.loads(call("run", *options, *more, stdin=stdin).stdout)["prompt_tokens"])

    assert tokens("-f", file) == tokens("-f", "-", stdin=file.read_text(encoding="utf-8"))
    marked = tmp_path / "marked.txt"
    marked.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert tokens("-f", marked) == tokens("-f", file)
    other = tmp_path / "other.txt"
    other.write_text("over it")
    assert tokens("-f", other, "-f", file, "-p", "jumps") == tokens("-p", f"over it\n\n{file.read_text()}\n\njumps")
    assert tokens("-f", file, "-p", "jumps") == tokens("-p", file.read_text(encoding="utf-8") + "\n\njumps")


def test_chat_uses_the_template(model: Path) -> None:
    def tokens(*more: str) -> int:
        return int(
            json.loads(call("run", "--model", model, "-n", 1, "--method", "fp", "--json", *more).stdout)["prompt_tokens"]
        )

    assert tokens("--chat", "-p", "hi") == tokens("-p", "user: hi\nassistant:")
    assert tokens("--chat", "--system", "be brief", "-p", "hi") == tokens("-p", "system: be brief\nuser: hi\nassistant:")


@pytest.mark.parametrize("chat", [(), ("--chat",)])
def test_questions_asked_on_are_answered_as_in_one_session(model: Path, tmp_path: Path, chat: tuple[str, ...]) -> None:
    options = ("--model", model, "-n", 6, "--method", "fp", "--ignore-eos", *chat)
    first = ("--system", "be brief") if chat else ()
    asked = ["what is it", "and what else", "bye"]
    alone = []
    for index, question in enumerate(asked):
        more = first if index == 0 else ()
        alone.append(call("run", *options, *more, "-p", question, "--session", tmp_path / "alone").stdout)
    together = call("run", *options, *first, "-i", "--session", tmp_path / "s", stdin="what is it\n\nand what else\n")
    assert together.exit_code == 0 and together.stdout == "".join(alone[:2])
    more = call("run", *options, "-i", "-p", asked[0], *first, "--session", tmp_path / "t", stdin="and what else\nbye")
    assert more.stdout == "".join(alone)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "alone").read_bytes()
    on = call("run", *options, "-i", "--session", tmp_path / "s", stdin="bye\n")
    assert on.stdout == alone[2]


def test_a_full_context_ends_the_questions_and_the_session_is_saved(model: Path, tmp_path: Path) -> None:
    options = ("--model", model, "-n", 4, "--method", "fp", "--ignore-eos", "--ctx", 40, "-i", "--session", tmp_path / "s")
    result = call("run", *options, stdin="the\n" + "quick brown fox " * 9 + "\nthe\n")
    assert result.exit_code == 0 and "do not fit a context of 40" in result.stderr and len(result.stdout.splitlines()) >= 1
    assert (tmp_path / "s").exists()


def test_a_context_that_the_first_answer_fills_ends_in_its_line(tmp_path: Path) -> None:
    """Of a sequence that held something before."""
    options = ("--model", tiny_folder(tmp_path / "m"), "--dummy-weights", "-n", 4, "--method", "fp", "--ctx", 60, "--fill", 30)
    result = call("run", *options, "-i", "-p", "a" * 60, stdin="b\n")
    assert result.exit_code == 0 and "do not fit a context of 60" in result.stderr and not result.stdout.strip()


def test_ctrl_c_ends_an_answer_not_the_questions(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("run", "--model", model, "-n", 8, "--method", "fp", "--ignore-eos", "-i")
    stream, calls = Engine.stream, [0]

    def interrupted(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        for index, piece in enumerate(stream(*args, **more)):
            yield piece
            if calls[0] == 1 and index == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    result = call(*options, stdin="the\nfox\n")
    assert result.exit_code == 0 and calls == [2]
    monkeypatch.setattr(Engine, "stream", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(*options, stdin="the\nfox\n").exit_code == 130, "reading is not an answer"


def test_sigterm_ends_all_questions(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("run", "--model", model, "--method", "fp", "--interactive", "-n", 9, "--ignore-eos", "--session", tmp_path / "s")
    step, calls = decode.EagerStep.run, [0]

    def ended(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(decode.EagerStep, "run", ended)
    result = call(*options, stdin="the\nfox\n")
    assert result.exit_code == 130 and "is saved in" in result.stderr and (tmp_path / "s").exists() and calls == [4]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("owner, what, count", [(decode.EagerStep, "run", 4), (sampling.Sampler, "choose", 4)])
def test_ctrl_c_in_an_answer_keeps_the_session(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool, owner: type, what: str, count: int
) -> None:
    """The session goes on as an uninterrupted one, also where a step is done and its token not drawn yet; a text that was half
    read is no session."""
    options = ("run", "--model", model, "--method", "fp", "--ignore-eos", "--prefill", "streaming")
    text = ("-p", "the quick brown fox", *(("--checkpoint", tmp_path / "c") if checkpoint else ()))
    whole = call(*options, *text, "-n", 9).stdout
    step, calls, session = getattr(owner, what), [0], tmp_path / "s"

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            assert session.exists() == checkpoint, "what has been read is kept as soon as the checkpoint is gone"
            if checkpoint:
                signal.raise_signal(signal.SIGTERM)
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, interrupted)
        result = call(*options, *text, "-n", 9, "--session", session)
    assert result.exit_code == 130 and f"saved in {session}" in result.stderr
    on = call(*options, "--session", session, "-n", 6)
    assert result.stdout.rstrip("\n") + on.stdout == whole
    read = reading.streaming_prefill

    def half_read(model: Any, rope: Any, sequence: Any, ids: Any, *more: Any) -> Any:
        if len(ids) > 1:  # not of the warm-up
            finished(read(model, rope, sequence, ids[:5], *more))
            raise KeyboardInterrupt
        return read(model, rope, sequence, ids, *more)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "streaming_prefill", half_read)
        half = call(*options, *text, "--session", tmp_path / "half")
    assert half.exit_code == 130 and ("--checkpoint FILE would keep it" in half.stderr) != checkpoint
    assert not (tmp_path / "half").exists()


def test_ctrl_c_while_the_session_is_written_comes_after_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = session.write_container

    def slow(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(*args)

    options = ("run", "--model", model, "--method", "fp", "--ignore-eos", "-p", "the quick brown fox", "-n", 5)
    with monkeypatch.context() as patch:
        patch.setattr(session, "write_container", slow)
        result = call(*options, "--session", tmp_path / "s")
    assert result.exit_code == 130 and (tmp_path / "s").exists()
    assert call("run", "--model", model, "--session", tmp_path / "s", "-n", 2).exit_code == 0


def test_ctrl_c_in_a_later_question_keeps_the_answers_before_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is that of the questions that were answered; what was read of the next is forgotten."""
    options = ("run", "--model", model, "--method", "fp", "--ignore-eos", "-n", 5, "-i", "-p", "the quick brown fox")
    session, read = tmp_path / "s", reading.streaming_prefill
    monkeypatch.setattr(reading, "SHORT_TOKENS", 4)

    def half_read(model: Any, rope: Any, sequence: Any, ids: Any, *more: Any) -> Any:
        if sequence.length:
            finished(read(model, rope, sequence, ids[:5], *more))
            raise KeyboardInterrupt
        return read(model, rope, sequence, ids, *more)

    assert call(*options, "--session", tmp_path / "answered", stdin="").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(reading, "streaming_prefill", half_read)
        result = call(*options, "--session", session, stdin="jumps over the lazy dog and the quick brown fox\n")
    assert result.exit_code == 130 and f"saved in {session}" in result.stderr
    assert session.read_bytes() == (tmp_path / "answered").read_bytes()


def test_what_ends_an_answer_keeps_the_session(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who has gone, a question that is no text: what was read and written by then is kept."""
    options = ("run", "--model", model, "--method", "fp", "--ignore-eos", "-n", 5, "--session")
    echo = click.echo

    def gone(text: object = None, **more: Any) -> None:
        if not more.get("err"):
            raise BrokenPipeError
        echo(text, **more)

    with monkeypatch.context() as patch:
        patch.setattr("skvq.commands.run.click.echo", gone)
        with pytest.raises(BrokenPipeError):
            call(*options, tmp_path / "s", "-p", "the quick brown fox")
    assert call(*options, tmp_path / "s").exit_code == 0


def test_a_question_that_is_no_text_ends_none_of_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("run", "--model", model, "--method", "fp", "--ignore-eos", "-n", 5, "-i", "--session")
    wanted = call(*options, tmp_path / "s", stdin="the fox\njumps\n").stdout

    def lines(last: str = "") -> Iterator[str]:
        yield from ("the fox", "caf\udce9", "jumps")
        if last:
            raise OptionError(last)

    monkeypatch.setattr("skvq.commands.run.questions", lines)
    result = call(*options, tmp_path / "t")
    assert result.exit_code == 0 and result.stdout == wanted and "surrogate" in result.stderr
    monkeypatch.setattr("skvq.commands.run.questions", lambda: lines("standard input is not UTF-8 text"))
    result = call(*options, tmp_path / "u")
    assert result.exit_code == 2 and f"saved in {tmp_path / 'u'}" in result.stderr
    assert len({(tmp_path / name).read_bytes() for name in "stu"}) == 1


def test_where_nothing_is_asked_nothing_is_done(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox")
    options = ("run", "--model", model, "--method", "fp", "--session", tmp_path / "s", "-i")
    result = call(*options, "-f", text, stdin="\n")
    assert result.exit_code == 0 and result.stdout == "" and not (tmp_path / "s").exists()
    call(*options, "-p", "the", stdin="")
    before = (tmp_path / "s").read_bytes()
    result = call(*options, stdin="")
    assert result.exit_code == 0 and result.stdout == "" and (tmp_path / "s").read_bytes() == before


def test_a_locale_may_lack_characters(model: Path) -> None:
    runner = CliRunner(charset="latin-1")
    options = ["run", "--model", str(model), "--backend", "reference", "--method", "fp", "-n", "60", "--temperature", "2"]
    result = runner.invoke(main, [*options, "--ignore-eos", "-p", "the"], catch_exceptions=False)
    assert result.exit_code == 0 and "?" in result.stdout


def test_no_new_tokens_are_no_text(model: Path) -> None:
    assert call("run", "--model", model, "-p", "the", "-n", 0, "--method", "fp").stdout == "\n"


def test_an_answer_ends_where_the_context_is_full(model: Path) -> None:
    prompt = ("run", "--model", model, "-p", "the quick brown fox", "--method", "fp", "--ignore-eos", "--json")
    count = json.loads(call(*prompt, "-n", 1).stdout)["prompt_tokens"]
    found = json.loads(call(*prompt, "-n", 50, "--ctx", count + 3).stdout)
    assert found["cached_tokens"] == count + 3


def test_a_calibration_that_is_made_is_used(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    made = call("calibrate", "--model", model, "-o", file, "--tokens", 64, "--value-bits", 1.5)
    assert made.exit_code == 0 and made.stdout == "" and str(file) in made.stderr
    before = files_under(cache_folder())
    result = call("run", "--model", model, "-p", "the", "-n", 2, "--calibration", file, "--value-bits", 1.5)
    assert result.exit_code == 0 and files_under(cache_folder()) == before


def test_eval_prints_the_figures_that_were_promised(model: Path) -> None:
    found = json.loads(
        call("eval", "--model", model, "--tokens", 333, "--stride", 200, "--window", 16, "--json").stdout.splitlines()[-1]
    )
    assert {"ppl_fp", "ppl", "kl", "top1", "bits_per_element", "key_bits", "value_bits", "tokens"} <= set(found)
    assert found["tokens"] == 333 and found["kl"] > 0 and 0 <= found["top1"] <= 1
    several = json.loads(
        call("eval", "--model", model, "--tokens", 299, "--methods", "fp,rotate:4:4", "--json").stdout.splitlines()[-1]
    )
    assert [r["method"] for r in several["results"]] == ["fp", "rotate"] and several["results"][1]["value_bits"] == 4


def test_plan_reads_the_config_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    options = ("plan", "--model", tmp_path, "--ctx", 100_000, "--device", "h100")
    found = json.loads(call(*options, "--json").stdout.splitlines()[-1])
    assert found["fits"] and found["total"] == sum(found["parts"].values()) and found["device"] == "h100"
    assert found["predicted_prefill_seconds"] > 0 and found["predicted_decode_ms_per_token"] > 0
    table = call(*options)
    assert table.exit_code == 0 and "fits" in table.stdout and "largest context" in table.stdout


def test_a_plan_that_does_not_fit_is_printed_and_fails(model: Path) -> None:
    result = call("plan", "--model", model, "--ctx", 100_000, "--device", "h100", "--memory", "1MiB", "--json")
    assert result.exit_code == 2 and not json.loads(result.stdout)["fits"]
    assert result.stderr.startswith("skvq: error: a context of 100,000 tokens needs") and result.stderr.count("\n") == 1


def test_models_lists_the_aliases() -> None:
    rows = json.loads(call("models", "--json").stdout)["models"]
    assert {"mistral-7b", "llama-2-7b", "llama-3.1-8b", "smollm2-135m"} <= {r["alias"] for r in rows}
    assert len(call("models").stdout.splitlines()) == len(rows)


@pytest.mark.parametrize("args", [("--help",), ("run", "--help"), ("plan", "-h"), ("--version",), ("-h",)])
def test_help_is_no_error(args: tuple[str, ...]) -> None:
    result = call(*args)
    assert result.exit_code == 0 and result.stderr == "" and result.stdout


def test_a_message_comes_below_the_answer_that_it_is_about(model: Path) -> None:
    found = call("run", "--model", model, "-p", "the quick", "-n", 9, "--ctx", 6, "--method", "fp", "--ignore-eos")
    before, told, _ = found.output.partition("skvq: the context of 6 tokens is full")
    assert found.exit_code == 0 and told and before.endswith("\n") and found.stdout.endswith("\n")


# --- what does not ----------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no text": ((), ("no text", "-p", "-f")),
    "empty prompt": (("-p", ""), ("empty",)),
    "blank prompt": (("-p", " \n "), ("empty",)),
    "half a character": (("-p", "caf\udcc3"), ("not UTF-8", "convert")),
    "no such file": (("-f", "/nowhere/text.txt"), ("/nowhere/text.txt", "No such file")),
    "a folder for a file": (("-f", "/tmp"), ("/tmp", "directory")),
    "a prompt longer than the context": (("-p", "brown fox " * 40, "--ctx", 20), ("context of 20", "--ctx")),
    "a context that cannot fit": (("-p", "x", "--ctx", 2_000_000_000), ("2,000,000,000", "largest context that fits")),
    "no context": (("-p", "x", "--ctx", 0), ("--ctx",)),
    "an unknown option": (("-p", "x", "--windw", 3), ("--windw", "--window")),
    "an unknown method": (("-p", "x", "--method", "rotat"), ("'rotate'",)),
    "unknown bits": (("-p", "x", "--key-bits", 5), ("'5'", "1.5, 2, 3, 4, 8")),
    "a group that does not divide": (("-p", "x", "--group-size", 48), ("--group-size must be", "32, 64, 128", "48")),
    "a window below nothing": (("-p", "x", "--window", -1), ("window", "-1")),
    "sinks below nothing": (("-p", "x", "--sinks", -1), ("--sinks must be", "-1")),
    "a filter nobody knows": (("-p", "x", "--filter", "heavy-hiters"), ("did you mean 'heavy-hitters'",)),
    "a filter nobody can import": (("-p", "x", "--filter", "no.such:Rule"), ("no.such", "imported")),
    "fewer than no tokens": (("-p", "x", "-n", -1), ("--max-new-tokens", "-1")),
    "a negative temperature": (("-p", "x", "--temperature", -0.5), ("temperature", "-0.5")),
    "a temperature that is no number": (("-p", "x", "--temperature", "nan"), ("temperature", "nan")),
    "nothing to draw from": (("-p", "x", "--top-p", 0), ("--top-p must be",)),
    "a seed too large": (("-p", "x", "--seed", 2**64), ("--seed must be", "or random, got")),
    "a stop of nothing": (("-p", "x", "--stop", ""), ("stop",)),
    "an expression that is none": (("-p", "x", "--regex", "(a"), ("--regex '(a' cannot be used: unclosed group",)),
    "a schema that is none": (("-p", "x", "--json-schema", '{"type": "x"}'), ("--json-schema", "Invalid type: x")),
    "a schema that is no object": (("-p", "x", "--json-schema", "schema.json"), ("cannot read schema.json",)),
    "two forms": (("-p", "x", "--json-schema", "{}", "--regex", "a"), ("give one",)),
    "an unknown RoPE scaling": (("-p", "x", "--rope-scaling", "yarm:4"), ("yarm:4",)),
    "a RoPE factor that is no number": (("-p", "x", "--rope-scaling", "yarn:four"), ("four",)),
    "an unknown device": (("-p", "x", "--device", "tpu"), ("tpu",)),
    "a GPU that is not here": (("-p", "x", "--device", "cuda:7"), ("cuda:7",)),
    "an unknown dtype": (("-p", "x", "--dtype", "float23"), ("float23", "float32")),
    "an unknown backend": (("-p", "x", "--backend", "numbra"), ("did you mean 'numba'",)),
    "a GPU's backend without one": (("-p", "x", "--backend", "triton", "--device", "cpu"), ("triton",)),
    "no calibration there": (
        ("-p", "x", "--calibration", "/nowhere/c.safetensors"),
        ("/nowhere/c.safetensors", "skvq calibrate"),
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, fragments = BAD_OPTIONS[name]
    monkeypatch.chdir(tmp_path)
    method = () if "--method" in options or "--calibration" in options else ("--method", "fp")
    before = files_under(tmp_path, model, cache_folder())
    refused(call("run", "--model", model, *method, *options), *fragments)
    assert files_under(tmp_path, model, cache_folder()) == before


def spoil(name: str) -> Callable[[Path], None]:
    weights = "model.safetensors"

    def change(folder: Path, **tensors: torch.Tensor | None) -> None:
        found = load_file(folder / weights) | tensors
        save_file({n: t for n, t in found.items() if t is not None}, folder / weights)

    def config(folder: Path, **values: object) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | values))

    head, q = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
    nan = torch.randn(128, 64).index_fill_(0, torch.tensor([77]), torch.nan)
    return {
        "no weights": lambda f: (f / weights).unlink(),
        "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
        "no config": lambda f: (f / "config.json").unlink(),
        "truncated weights": lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-1000]),
        "truncated header": lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:100]),
        "empty weights": lambda f: (f / weights).write_bytes(b""),
        "weights of noise": lambda f: (f / weights).write_bytes(bytes(range(256)) * 40),
        "a broken tokenizer": lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "BP'),
        "a broken config": lambda f: (f / "config.json").write_text('{"architectures": ["Llama'),
        "a config that is no object": lambda f: (f / "config.json").write_text("[1, 2]"),
        "a tensor too few": lambda f: change(f, **{head: None}),
        "a tensor too many": lambda f: change(f, **{"model.layers.7.extra.weight": torch.zeros(3)}),
        "a misshapen tensor": lambda f: change(f, **{q: torch.zeros(5, 64)}),
        "a weight of NaN": lambda f: change(f, **{q: nan}),
        "an unknown architecture": lambda f: config(f, architectures=["MambaForCausalLM"]),
        "an unknown RoPE": lambda f: config(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "an absurd size": lambda f: config(f, num_hidden_layers=10**9),
        "a size of nothing": lambda f: config(f, hidden_size=0),
    }[name]  # type: ignore[return-value]


SPOILT = {
    "no weights": ("safetensors",),
    "no tokenizer": ("tokenizer.json",),
    "no config": ("config.json",),
    "truncated weights": ("model.safetensors",),
    "truncated header": ("model.safetensors",),
    "empty weights": ("model.safetensors",),
    "weights of noise": ("model.safetensors",),
    "a broken tokenizer": ("tokenizer.json",),
    "a broken config": ("config.json",),
    "a config that is no object": ("config.json",),
    "a tensor too few": ("lm_head.weight",),
    "a tensor too many": ("model.layers.7.extra.weight",),
    "a misshapen tensor": ("q_proj.weight", "5"),
    "a weight of NaN": ("q_proj.weight", "NaN"),
    "an unknown architecture": ("MambaForCausalLM", "LlamaForCausalLM"),
    "an unknown RoPE": ("spiral",),
    "an absurd size": ("1000000000",),
    "a size of nothing": ("hidden_size", "0"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model_is_one_line(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spoil(name)(broken)
    monkeypatch.chdir(tmp_path)
    before = files_under(tmp_path, cache_folder())
    refused(call("run", "--model", broken, "-p", "the quick", "-n", 2), *SPOILT[name])
    assert files_under(tmp_path, cache_folder()) == before


@pytest.mark.parametrize("name", ["/nowhere/model", "", "-", "smollm", "no such/model/at all", "tests\x00"])
def test_a_model_that_is_not_there_is_one_line(name: str) -> None:
    refused(call("run", "--model", name, "-p", "x", "--no-download"))


def test_text_that_is_not_utf8_is_one_line_wherever_it_comes_from(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("déjà vu".encode("latin-1"))
    refused(call("run", "--model", model, "-f", file), str(file), "not UTF-8", "byte 1")
    refused(call("run", "--model", model, "-f", "-", stdin=file.read_bytes()), "not UTF-8")
    refused(call("eval", "--model", model, "--text", file, "--method", "fp"), "not UTF-8")


def test_a_chat_without_a_template_is_one_line(broken: Path) -> None:
    (broken / "tokenizer_config.json").write_text("{}")
    refused(call("run", "--model", broken, "-p", "hi", "--chat", "--method", "fp"), "chat template")


def test_a_budget_of_bits_from_calibration_to_answer(model: Path, tmp_path: Path) -> None:
    """`calibrate` says what it chose, `eval` what is stored, `plan` is exact with the file and a bound without it."""
    made, budget = tmp_path / "made.safetensors", ("--bits-budget", 2.7)
    done = call("calibrate", "--model", model, "-o", made, "--tokens", 400, *budget)
    assert done.exit_code == 0 and "bits by layer: " in done.stderr, done.stderr
    use = ("--model", model, *budget, "--calibration", made)
    row = json.loads(call("eval", *use, "--tokens", 300, "--json").stdout.splitlines()[-1])
    assert row["bits_per_element"] <= row["bits_budget"] == 2.7 and len(row["layer_bits"]) == tiny_config().num_layers
    where = ("--ctx", 3000, "--device", "cpu", "--json")
    exact, bound = (
        json.loads(call("plan", *options, *where).stdout.splitlines()[-1]) for options in (use, ("--model", model, *budget))
    )
    assert exact["bits_per_element"] == row["bits_per_element"] and not exact["upper_bound"]
    assert bound["upper_bound"] and exact["total"] <= bound["total"]
    assert call("run", *use, "-p", "the", "-n", 2).exit_code == 0
    refused(call("run", *use[:3], 2.8, *use[4:], "-p", "the"), "--bits-budget 2.7", "2.8")
    refused(call("run", "--model", model, "--calibration", made, "-p", "the"), "--bits-budget 2.7", "none")
    refused(call("run", *use, "--key-bits", 3, "-p", "the"), "--bits-budget 2.7", "--key-bits 3", "one or the other")
    refused(call("plan", "--model", model, "--ctx", 10, "--bits-budget", 1.5), "1.5", "larger budget")
    refused(call("plan", *use, "--method", "reorder"), "'rotate'", "'reorder'")
    refused(call("plan", "--model", "smollm2-135m", *budget, "--calibration", made), "made for another model")
    refused(call("plan", "--model", "mistral-7b", *budget, "--calibration", made), "not for this model", "32")  # no files here


def test_a_file_is_told_by_its_own_name(model: Path, tmp_path: Path) -> None:
    for name in ("key_bits.safetensors", "group_size/x"):
        refused(
            call("run", "--model", model, "-p", "the", "--calibration", tmp_path / name),
            f"no calibration file at {tmp_path / name}",
        )


def test_a_calibration_of_anything_else_is_one_line(model: Path, tmp_path: Path) -> None:
    """Broken, foreign, for other options, for another model: both values named where there are two."""
    made, other = tmp_path / "made.safetensors", tmp_path / "other.safetensors"
    assert call("calibrate", "--model", model, "-o", made, "--tokens", 64).exit_code == 0
    use = ("run", "--model", model, "-p", "the", "-n", 2, "--calibration")
    other.write_bytes(made.read_bytes()[:-50])
    refused(call(*use, other), str(other), "damaged")
    other.write_bytes(b"no safetensors at all")
    refused(call(*use, other), str(other), "not an skvq calibration")
    refused(call(*use, made, "--method", "fp"), "leave", str(made))
    refused(call(*use, model / "model.safetensors"), "no skvq calibration")
    refused(call(*use, made, "--value-bits", 3), "--value-bits 2.0", "3.0")
    refused(call(*use, made, "--method", "reorder"), "method", "'rotate'", "'reorder'")
    found = load_file(made)
    refused(call("calibrate", "--model", model, "-o", other, "--tokens", 64), "is there already", "remove it")
    other.unlink()
    assert call("calibrate", "--model", model, "-o", other, "--tokens", 64, "--method", "plain").exit_code == 0
    refused(call(*use, other), "method", "'plain'", "'rotate'")
    from safetensors import safe_open

    with safe_open(str(made), "pt") as file:
        header = file.metadata()
    save_file({**found, "key_unit": 2 * found["key_unit"]}, other, metadata=header)
    refused(call(*use, other), "damaged", "checksum")
    artifact = load_artifact(made)
    save_artifact(replace(artifact, tensors={n: t for n, t in found.items() if n != "key_unit"}), other)
    refused(call(*use, other), "key_unit")
    fingerprint = json.loads(header["skvq.calibration"])["fingerprint"]
    header["skvq.calibration"] = header["skvq.calibration"].replace(fingerprint, "0" * len(fingerprint))
    save_file(found, other, metadata=header)
    refused(call(*use, other), "another model", "0" * 8, fingerprint[:8])


@pytest.mark.parametrize(
    "args, fragment",
    [
        (("calibrate", "-o", "/proc/nowhere/c.safetensors", "--tokens", 64, "--method", "plain"), "/proc/nowhere"),
        (("calibrate", "-o", "never", "--method", "fp"), "fp"),
        (("calibrate", "-o", "never", "--seed", -1, "--method", "reorder"), "seed"),
        (("calibrate", "-o", "never", "--text", "/dev/null"), "tokens"),
        (("eval", "--text", "/dev/null", "--method", "fp"), "/dev/null holds no text"),
        (("eval", "--tokens", 99), "nothing is quantized before the last is read"),
        (("eval", "--tokens", 99, "--exact-window", "--window", 94), "nothing is quantized before the last is read"),
        (("eval", "--methods", "rotate:2:2,fp", "--key-bits", 3), "leave --key-bits and --value-bits out"),
        (("eval", "--methods", "rotate:2"), "such as rotate:2:1.5"),
        (("eval", "--methods", "fp:2:2"), "method fp has 16 bits"),
        (("run", "-p", "the", "--seed", "dice"), "neither a whole number nor random"),
        (("run", "-p", "the", "--rope-scaling", "yarn"), "lacks its factor"),
        (("run", "-p", "the", "--calibration", "."), "is a folder"),
        (("eval", "--methods", "rotate:2", "--tokens", 9), "rotate:2"),
        (("eval", "--methods", "rotat", "--tokens", 9), "did you mean 'rotate'"),
        (("calibrate", "-o", "x.safetensors", "--ctx", "1G"), "such as 131072, 1e6, 128K"),
        (("plan", "--ctx", 1000, "--memory", "lots"), "lots"),
        (("plan", "--ctx", 1000, "--device", "h20"), "give --memory, such as 24GB"),
        (("plan", "--ctx", "K"), "such as 131072, 1e6, 128K"),
        (("plan", "--ctx", "nan"), "such as 131072, 1e6, 128K"),
        (("plan", "--ctx", "1.0001k"), "such as 131072, 1e6, 128K"),
        (("plan", "--ctx", "4G"), "such as 131072, 1e6, 128K"),
        (("plan", "--ctx", 0), "0 is too few tokens: give 1 or more"),
        (("eval", "--tokens", 1), "1 is too few tokens: give 2 or more"),
        (("needle", "--ctx", "4K,0"), "a context of no tokens"),
        (("needle", "--ctx", "4096,inf"), "list of numbers of tokens"),
        (("run", "-p", "the", "--session", "s", "--checkpoint", "s"), "a name of its own"),
        (("run", "-p", "the", "--session", "nowhere/s"), "nowhere is no folder"),
        (("run", "-p", "the", "--checkpoint", "nowhere/s"), "nowhere is no folder"),
        (("plan", "--ctx", 1000, "--calibration", "/nowhere"), "--bits-budget"),
        (("calibrate", "-o", "never", "--window", 64), "--bits-budget"),
        (("eval", "--method", "plain", "--methods", "fp"), "one or the other"),
        (("run", "-p", "the", "--system", "be brief"), "--chat"),
        (("run", "-p", "the", "--chat-template-kwargs", '{"a": 1}'), "--chat"),
        (("run", "-p", "the", "--chat", "--chat-template-kwargs", "thinking"), "'thinking' is not a JSON object"),
        (("run", "-p", "the", "--chat", "--chat-template-kwargs", "[1]"), "is not a JSON object"),
        (("run", "-p", "the", "--chat", "--chat-template-kwargs", '{"messages": 1}'), "cannot set messages"),
        (("run", "-p", "the", "-i", "--json"), "--json"),
        (("run", "-f", "-", "-i"), "-f -"),
        (("rnu",), "rnu"),
    ],
)
def test_other_commands_refuse_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[object, ...], fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files_under(tmp_path, cache_folder())
    refused(call(*args, *(("--model", model) if args[0] != "rnu" else ())), fragment)
    assert files_under(tmp_path, cache_folder()) == before


@pytest.mark.parametrize(
    "command, option",
    [
        ("calibrate", "--calibration"),
        ("calibrate", "--prefill"),
        ("calibrate", "--sinks"),
        ("calibrate", "--filter"),
        ("eval", "--ctx"),
        ("eval", "--prefill"),
        ("bench decode", "--prefill"),
    ],
)
def test_an_option_that_a_command_would_not_read_is_unknown_to_it(model: Path, command: str, option: str) -> None:
    args = [*command.split(), "--model", str(model), option, "1"]
    refused(CliRunner().invoke(main, args, catch_exceptions=False), "No such option", option)


READ_BY = {
    "run": ("--ctx", "--calibration", "--prefill", "--backend", "--device", "--dtype", "--rope-scaling", "--sinks", "--window"),
    "calibrate": ("--ctx", "--text", "--method", "--bits-budget", "--window", "--backend", "--rope-scaling", "--no-download"),
    "eval": ("--text", "--tokens", "--stride", "--calibration", "--sinks", "--filter", "--dtype", "--rope-scaling"),
    "plan": ("--ctx", "--memory", "--device", "--prefill", "--calibration", "--sinks", "--filter", "--window"),
    "needle": ("--ctx", "--depths", "--plot", "--calibration", "--prefill", "--sinks", "--dummy-weights"),
    "bench decode": ("--shape", "--ctx", "--calibration", "--sinks", "--rope-scaling", "--attention-only", "--no-download"),
    "bench prefill": ("--shape", "--ctx", "--calibration", "--sinks", "--rope-scaling", "--prefill", "--no-download"),
    "bench planted": ("--shape", "--ctx", "--depths", "--sinks", "--no-download", "--backend"),
}


@pytest.mark.parametrize("command", READ_BY)
def test_help_names_what_a_command_reads(command: str) -> None:
    told = CliRunner().invoke(main, [*command.split(), "--help"]).stdout.split()
    assert set(READ_BY[command]) <= set(told)


class OutOfResources(Exception):  # as Triton's, which is not imported where there is no GPU
    pass


OutOfResources.__module__ = "triton.runtime.errors"
CUDA_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB left. Of that, some is torch's"


@pytest.mark.parametrize(
    "error, fragments",
    [
        (torch.OutOfMemoryError(CUDA_MEMORY), ("memory ran out", "Tried to allocate 2.00 GiB", "smaller --ctx", "skvq plan")),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for", 2), ("memory ran out", "smaller --ctx")),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access\nSearch", 700),
            ("GPU failed", "illegal", "rerun"),
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), ("memory ran out", "9 bytes")),
        (MemoryError(), ("memory ran out", "smaller --ctx")),
        (OutOfResources("out of resource: shared memory, Required: 9"), ("shared memory", "--backend reference")),
    ],
)
def test_a_machine_that_gives_out_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, fragments: tuple[str, ...]
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("skvq.engine.generate.Engine.load", fails)
    refused(call("run", "--model", model, "-p", "the"), *fragments)


def test_a_mistake_of_ours_stays_a_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skvq.engine.generate.Engine.load", lambda *args, **options: [][1])
    with pytest.raises(IndexError):
        call("run", "--model", model, "-p", "the")


VALUES = st.sampled_from(
    ["0", "-1", "1.5", "2", "nan", "inf", "1e400", "", "x", "64", "99999999999999999999", "rotate", "fp", "é", "--"]
)
OPTIONS = [
    "--ctx", "--method", "--key-bits", "--group-size", "--window", "--sinks", "--filter", "-n", "--temperature", "--top-p",
    "--top-k", "--min-p", "--repeat-penalty", "--seed", "--stop", "--dtype", "--device", "--backend", "--rope-scaling",
    "--prefill", "--calibration", "--regex", "--json-schema",
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=st.lists(st.tuples(st.sampled_from(OPTIONS), VALUES), max_size=3))
def test_any_options_work_or_are_one_line(model: Path, options: list[tuple[str, str]]) -> None:
    args = [part for option in options for part in option]
    result = call("run", "--model", model, "-p", "the quick", "-n", 1, "--method", "fp", *args)
    assert result.exit_code in (0, 2), result.output
    if result.exit_code == 2:
        assert result.stderr.count("skvq: error: ") == 1 and "Traceback" not in result.stderr


def test_threads_are_those_of_torch(model: Path) -> None:
    before = torch.get_num_threads()
    try:
        result = call("run", "-m", model, "--dummy-weights", "-p", "x", "-n", 1, "--threads", 1)
        assert result.exit_code == 0 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_places_that_cannot_be_written_are_told_before_any_work(model: Path, tmp_path: Path) -> None:
    refused(call("calibrate", "-m", model, "-o", tmp_path), "Is a directory")
    refused(call("run", "-m", model, "-p", "x", "--session", tmp_path), "Is a directory")
    refused(call("needle", "-m", model, "--depths", "0,150"), "from 0 to 100")


def test_an_argument_in_a_locale_without_utf_8_is_decoded() -> None:
    assert argument_text("日本 🙂") == argument_text("日本 🙂".encode().decode("ascii", "surrogateescape")) == "日本 🙂"
    with pytest.raises(OptionError, match="not UTF-8"):
        argument_text(b"\xff".decode("ascii", "surrogateescape"))


@pytest.mark.parametrize(("more", "status"), [(("--json",), 0), (("--ctx", "1G"), 2)])
def test_without_anybody_to_tell_what_is_asked_is_done(model: Path, more: tuple[str, ...], status: int) -> None:
    """Standard error is full, or its reader has gone: messages are lost, and nothing else."""
    command = [sys.executable, "-m", "skvq", "run", "--model", str(model), "-p", "the", "-n", "3", "--method", "fp", *more]
    with open("/dev/full", "w") as full, subprocess.Popen(["true"], stdin=subprocess.PIPE) as gone:
        gone.wait()
        for stderr in (full, gone.stdin):
            done = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": import_paths()}, stdout=subprocess.PIPE, stderr=stderr, check=False
            )
            assert done.returncode == status and bool(done.stdout) == (not status)


def test_standard_input_or_output_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(OptionError, match="standard input, which is closed"):
        file_text("-")
    line = output_error(OSError(errno.ENOSPC, "full"))
    assert line is not None and "No space left" in line
    assert output_error(OSError(errno.ENOSPC, "full", "a file")) is None and output_error(ValueError()) is None


def test_standard_input_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its byte order mark, lines ended one way, and refused in one line where it is not UTF-8."""
    for data in (b"\xef\xbb\xbfone\r\ntwo\rthree", b"caf\xe9"):
        (tmp_path / "text").write_bytes(data)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        if data[-1] < 128:
            assert file_text("-") == file_text(str(tmp_path / "text")) == "one\ntwo\nthree"
            continue
        with pytest.raises(OptionError, match=r"standard input is not UTF-8 text \(byte 3\)"):
            file_text("-")


def test_a_random_seed_is_another_each_time(model: Path) -> None:
    options = ("run", "--model", model, "--method", "fp", "--ignore-eos", "-p", "the quick", "-n", 30, "--temperature", 1.5)
    assert len({call(*options, "--seed", "random").stdout for _ in range(3)}) > 1
    assert len({call(*options).stdout for _ in range(2)}) == 1


def test_a_checkpoint_of_other_options_is_refused_before_a_model_is_loaded(model: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "c", ("run", "--model", model, "--method", "fp", "-p", "the quick brown fox")
    engine = Engine.load(model, cache=CacheConfig(method="fp"), max_context=300, device="cpu", report=Quiet())
    with engine.prefill([5] * 200) as sequence:
        sequence.save(tmp_path / "s")
    (file).write_bytes((tmp_path / "s").read_bytes())
    refused(call(*options, "--checkpoint", file), "no skvq checkpoint")
    header = {"method": "fp", "key_bits": 16.0, "value_bits": 16.0, "window": 9, "filters": "AttentionSinks(n=5)"}
    write_container(file, "checkpoint", header, [])
    refused(call(*options[:2], tmp_path / "nowhere", *options[3:], "--checkpoint", file), "checkpoint", "window 9", "128")
