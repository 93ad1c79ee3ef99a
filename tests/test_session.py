"""Sessions: what is saved comes back, in this process and another; what is broken or foreign is refused and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from loader_fixtures import refused
from safetensors import safe_open
from tiny import arena_of, random_ids, rewritten, steps, tiny_cache, tiny_engine, tiny_folder

from skvq.cli import main
from skvq.engine.cache import SequenceCache
from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.container import open_container
from skvq.engine.errors import CapacityError, SessionError
from skvq.engine.filters import AttentionSinks, HeavyHitters, KeyOutliers
from skvq.engine.generate import Engine
from skvq.engine.prompt import ChatIds
from skvq.engine.session import session_header

CACHES = {
    "rotate": tiny_cache(),
    "reorder": tiny_cache(method="reorder"),
    "plain with trits": tiny_cache(method="plain", key_bits=2, value_bits=1.5),
    "fp": tiny_cache(method="fp"),
    "rules": tiny_cache(filters=(AttentionSinks(3), KeyOutliers(threshold=3.0), HeavyHitters(threshold=2.0))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return tiny_engine(folder, tiny_cache())


@pytest.fixture(scope="module")
def saved(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of 700 tokens."""
    path = tmp_path_factory.mktemp("session") / "book.session"
    sequence = engine.prefill(random_ids(700))
    sequence.save(path)
    sequence.free()
    return path


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("length", [1, 142, 1431])
def test_a_fresh_engine_goes_on_with_the_same_logits(folder: Path, tmp_path: Path, name: str, length: int) -> None:
    first, second = (tiny_engine(folder, CACHES[name]) for _ in range(2))
    ids, more = random_ids(length), random_ids(4, seed=1)
    sequence = first.prefill(ids)
    sequence.save(tmp_path / "a.session")
    for tensor in second.parts.setup.arena.tensors.values():  # fresh memory must not matter
        if tensor.dtype == torch.uint8:
            tensor.fill_(0xAA)
    other = second.new_sequence()  # so that pages and slots are not the same
    restored = second.restore(tmp_path / "a.session")
    assert (restored.length, restored.packed, restored.token_ids) == (sequence.length, sequence.packed, ids)
    assert torch.equal(steps(first, [sequence], [more]), steps(second, [restored], [more]))
    second.parts.setup.arena.check(arena_of(other, restored))


def test_an_answer_after_a_restore_is_the_one_after_the_text(folder: Path, tmp_path: Path) -> None:
    """What reading gave last is kept: decoding the last token once more would see the text as it is packed."""
    engine = tiny_engine(folder, tiny_cache())
    with engine.prefill(random_ids(700)) as sequence:
        assert sequence.logits is not None
        sequence.save(tmp_path / "a.session")
        with engine.restore(tmp_path / "a.session") as restored:
            assert restored.logits is not None and torch.equal(restored.logits, sequence.logits)
        kept = sequence.logits
        sequence.truncate(700)
        assert sequence.logits is kept
        sequence.truncate(699)
        assert sequence.logits is None
        sequence.save(tmp_path / "a.session")
        with engine.restore(tmp_path / "a.session") as restored:
            assert restored.logits is None and restored.length == 699 and not restored.asked
    with engine.prefill(ChatIds(random_ids(700))) as sequence:  # an answer begins a text: no space before it
        sequence.save(tmp_path / "a.session")
        with engine.restore(tmp_path / "a.session") as restored:
            assert sequence.asked and restored.asked


def test_saving_what_was_restored_gives_the_same_bytes(engine: Engine, saved: Path, tmp_path: Path) -> None:
    restored = engine.restore(saved)
    restored.save(tmp_path / "again.session")
    restored.free()
    assert (tmp_path / "again.session").read_bytes() == saved.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["window", "length", "method", "layer_bits"])
def test_a_damaged_header_is_one_line_before_a_model_is_loaded(saved: Path, tmp_path: Path, name: str) -> None:
    data = saved.read_bytes()
    spoilt = f'\\"{name}\\"'.encode()
    assert data.count(spoilt) == 1
    (tmp_path / "s").write_bytes(data.replace(spoilt, spoilt.upper()))
    refused(lambda: session_header(tmp_path / "s"), "is damaged", "delete it")
    (tmp_path / "t").write_bytes(data.replace(b'\\"length\\": 700', b'\\"length\\": -7.'))
    refused(lambda: session_header(tmp_path / "t"), "is not an skvq session")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("packed", None),
        ("packed", 10**6),
        ("packed", 0),
        ("packed", 513),
        ("pending", 1),
        ("pending", ["a"]),
        ("dropped", -1),
        ("dropped", 1.5),
        ("length", True),
    ],
)
def test_a_header_of_wrong_numbers_is_one_line(engine: Engine, saved: Path, tmp_path: Path, name: str, value: object) -> None:
    """Of a file whose checksum is right."""
    rewritten(saved, tmp_path / "s", "session", {name: value})
    free = engine.parts.setup.arena.free_pages
    refused(lambda: engine.restore(tmp_path / "s"), "damaged")
    assert engine.parts.setup.arena.free_pages == free


def test_tokens_outside_the_vocabulary_are_refused(engine: Engine, saved: Path, tmp_path: Path) -> None:
    ids = open_container(saved, "session").tensors["token_ids"].clone()
    ids[3] = 320
    rewritten(saved, tmp_path / "s", "session", {}, token_ids=ids)
    refused(lambda: engine.restore(tmp_path / "s"), "token id 320")
    (tmp_path / "deep").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    refused(lambda: engine.restore(tmp_path / "deep"), "is not an skvq session")


def test_random_tokens_are_still_random_when_they_come_back(engine: Engine, tmp_path: Path) -> None:
    """A sequence that no model has read lends its pages to no prompt."""
    with engine.new_sequence() as sequence:
        engine.fill(sequence, 300)
        sequence.save(tmp_path / "filled")
    with engine.restore(tmp_path / "filled") as restored, engine.prefill(random_ids(20)) as read:
        assert restored.filled and not read.filled


def test_it_is_a_safetensors_file_of_used_tiles_only(engine: Engine, saved: Path) -> None:
    with safe_open(str(saved), "pt") as file:
        assert "skvq.session" in file.metadata()
        assert file.get_tensor("token_ids").tolist() == random_ids(700)
        assert file.get_tensor("meta.0").shape[0] == 640 // 128
        names = [name for name in file.keys() if name.startswith(("key_codes.", "value_codes.", "meta."))]  # noqa: SIM118
        packed = sum(file.get_tensor(name).nbytes for name in names)
    setup = engine.parts.setup
    assert len(names) == 3 * setup.arena.shape.layers
    assert packed == 640 * setup.packed_token_bytes


def test_another_process_gives_the_same_answer(folder: Path, tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from tiny import *
engine = tiny_engine(Path(sys.argv[1]), tiny_cache())
if sys.argv[2] == "save":
    sequence = engine.prefill(random_ids(600))
    sequence.save(sys.argv[3])
else:
    sequence = engine.restore(sys.argv[3])
torch.save(steps(engine, [sequence], [random_ids(5, seed=2)]), sys.argv[4])
"""
    for role in ("save", "restore"):
        arguments = [sys.executable, "-c", program, folder, role, tmp_path / "s", tmp_path / f"{role}.pt"]
        subprocess.run(list(map(str, arguments)), check=True)
    assert torch.equal(torch.load(tmp_path / "save.pt"), torch.load(tmp_path / "restore.pt"))


def test_a_cut_sequence_with_more_pages_than_its_length_needs_is_restored(folder: Path, tmp_path: Path) -> None:
    """Cut in its packed part it has a window of 12 tokens: another of its length has packed a page less."""
    whole = tiny_engine(folder, tiny_cache(window=128), max_context=4000)
    sequence = whole.prefill(random_ids(3000))
    sequence.truncate(1420)
    sequence.save(tmp_path / "s")
    for sequences, fits in ((1, False), (2, True)):
        other = tiny_engine(folder, tiny_cache(window=128), max_context=1420, max_sequences=sequences)
        if fits:
            assert other.restore(tmp_path / "s").token_ids == sequence.token_ids
        else:
            refused(lambda other=other: other.restore(tmp_path / "s"), "2 more are needed")
            other.parts.setup.arena.check({})


def test_forks_of_a_restored_session_share_its_pages(engine: Engine, saved: Path) -> None:
    arena = engine.parts.setup.arena
    before = arena.free_pages
    restored = engine.restore(saved)
    questions = [restored.fork() for _ in range(3)]
    assert arena.free_pages == before - 1
    short = SamplingConfig(max_new_tokens=5, ignore_eos=True)
    answers = ["".join(engine.stream(random_ids(9, seed=i), short, sequence=q)) for i, q in enumerate(questions)]
    assert "".join(engine.stream(random_ids(9, seed=0), short, sequence=restored)) == answers[0]
    arena.check(arena_of(restored, *questions))
    for sequence in (restored, *questions):
        sequence.free()
    assert arena.free_pages == before


def test_generation_in_two_runs_is_generation_in_one(engine: Engine, tmp_path: Path) -> None:
    def answer(sequence: SequenceCache, text: list[int], count: int) -> list[int]:
        list(engine.stream(text, SamplingConfig(max_new_tokens=count, ignore_eos=True), sequence=sequence))
        return [*sequence.token_ids, *sequence.pending]

    whole = engine.new_sequence()
    expected = answer(whole, random_ids(200), 24)
    part = engine.new_sequence()
    answer(part, random_ids(200), 12)
    part.save(tmp_path / "part")
    rest = engine.restore(tmp_path / "part")
    assert rest.pending == part.pending != []
    assert answer(rest, [], 12) == expected
    for sequence in (whole, part, rest):
        sequence.free()


@pytest.mark.parametrize(
    "change, fragments",
    [
        ({"method": "plain"}, ("'rotate'", "'plain'")),
        ({"key_bits": 3}, ("key_bits", "2", "3")),
        ({"window": 32}, ("window", "16", "32")),
        ({"filters": (AttentionSinks(4),)}, ("AttentionSinks(n=3)", "AttentionSinks(n=4)")),
    ],
)
def test_other_options_are_refused(engine: Engine, saved: Path, change: dict[str, object], fragments: tuple[str, ...]) -> None:
    other = engine.with_cache(tiny_cache(**change))
    refused(lambda: other.restore(saved), "session", *fragments)


def test_another_model_or_calibration_is_refused(engine: Engine, saved: Path, tmp_path: Path) -> None:
    other = tiny_engine(tiny_folder(tmp_path / "other", num_layers=3), tiny_cache())
    refused(lambda: other.restore(saved), "model with fingerprint")
    corpus = "another text to calibrate on, of no great length but long enough. " * 40
    engine.calibrate(tiny_cache(), corpus, tmp_path / "c", corpus_name="x", tokens=300)
    other = engine.with_cache(tiny_cache(), calibration=tmp_path / "c")
    refused(lambda: other.restore(saved), "with digest", "give the file that it was made with (--calibration)")


def test_a_longer_session_than_the_context_is_refused(folder: Path, saved: Path) -> None:
    small = tiny_engine(folder, tiny_cache(), max_context=500)
    with pytest.raises(CapacityError, match="700 tokens does not fit a context of 500"):
        small.restore(saved)
    small.parts.setup.arena.check({})


@pytest.mark.parametrize("where", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_one_changed_byte_is_found_and_nothing_is_loaded(engine: Engine, saved: Path, tmp_path: Path, where: float) -> None:
    data = bytearray(saved.read_bytes())
    data[int(where * len(data))] ^= 0x10
    broken = tmp_path / "broken"
    broken.write_bytes(data)
    _refused_untouched(engine, broken)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_a_file_cut_short_is_found_and_nothing_is_loaded(engine: Engine, saved: Path, tmp_path: Path, kept: float) -> None:
    data = saved.read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(kept * len(data))])
    _refused_untouched(engine, tmp_path / "cut")


def test_foreign_and_missing_files_are_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "other.safetensors", folder / "config.json", tmp_path / "missing", tmp_path):
        _refused_untouched(engine, path)


def _refused_untouched(engine: Engine, path: Path) -> None:
    arena = engine.parts.setup.arena
    before = {name: tensor.clone() for name, tensor in arena.tensors.items()}
    pages = arena.free_pages
    with pytest.raises(SessionError) as caught:
        engine.restore(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert arena.free_pages == pages
    after = arena.tensors
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)


def test_a_failed_save_leaves_the_old_file(
    engine: Engine, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import skvq.engine.container as container

    path = tmp_path / "s"
    path.write_bytes(saved.read_bytes())
    sequence = engine.prefill(random_ids(300))

    def broken(data: memoryview) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(container, "_checksum", broken)
    with pytest.raises(KeyboardInterrupt):
        sequence.save(path)
    assert path.read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    sequence.free()


def test_no_room_on_the_disk_is_said_before_anything_is_written(engine: Engine, tmp_path: Path) -> None:
    from skvq.loaders.files import atomic_file

    def write() -> None:
        with atomic_file(tmp_path / "s", 2**60):
            raise AssertionError("not reached")

    refused(write, f"{2**60:,}", "free some")
    assert not list(tmp_path.iterdir())


def test_the_default_cache_is_saved_too(folder: Path, tmp_path: Path) -> None:
    engine = tiny_engine(folder, CacheConfig())
    sequence = engine.prefill(random_ids(900))
    sequence.save(tmp_path / "s")
    assert engine.restore(tmp_path / "s").packed == sequence.packed > 0


# --- the command line -------


def run(folder: Path, *arguments: object) -> Result:
    given = [
        "--dummy-weights",
        "--backend",
        "reference",
        "--device",
        "cpu",
        "--group-size",
        "32",
        "--window",
        "16",
        "--ignore-eos",
    ]
    return CliRunner().invoke(main, ["run", "--model", str(folder), *given, *map(str, arguments)], catch_exceptions=False)


def test_run_keeps_a_session_from_one_call_to_the_next(folder: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.session"
    whole = run(folder, "-p", "once upon a time", "-n", 20, "--json")
    first = run(folder, "-p", "once upon a time", "-n", 8, "--json", "--session", session)
    second = run(folder, "-n", 12, "--json", "--session", session)
    texts = [json.loads(r.stdout.splitlines()[-1])["text"] for r in (whole, first, second)]
    assert texts[1] + texts[2] == texts[0]
    cached = json.loads(second.stdout.splitlines()[-1])["cached_tokens"]
    run(folder, "-p", " and then", "-n", 1, "--session", session)
    third = run(folder, "-n", 1, "--json", "--session", session)
    assert json.loads(third.stdout.splitlines()[-1])["cached_tokens"] == cached + 1 + len(" and then") + 1


@pytest.mark.parametrize(
    "options",
    [
        ("--key-bits", 3, "--value-bits", 1.5), ("--method", "reorder"), ("--method", "fp", "--sinks", 3), ("--sinks", 8),
        ("--sinks", 0), ("--bits-budget", 3),
        ("--filter", "key-outliers(threshold=5.0)", "--filter", "token-ids(ids=[101, 32])", "--sinks", 2),
        ("--ctx", 9000, "--rope-scaling", "dynamic:4"), ("--rope-scaling", "yarn:4"),
    ],
    ids=str,
)  # fmt: skip
def test_a_session_remembers_its_options(folder: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    session = tmp_path / "talk.session"
    whole = run(folder, "-p", "once upon a time", "-n", 20, "--json", *options)
    first = run(folder, "-p", "once upon a time", "-n", 8, "--json", "--session", session, *options)
    second = run(folder, "-n", 12, "--json", "--session", session)
    texts = [json.loads(r.stdout.splitlines()[-1])["text"] for r in (whole, first, second)]
    assert texts[1] + texts[2] == texts[0]


def test_16_bits_with_other_sinks_are_refused(folder: Path, tmp_path: Path) -> None:
    """Nothing is asked of their rule, but a full context keeps them: there are slots for them."""
    made, other = (tiny_engine(folder, tiny_cache(method="fp", filters=(AttentionSinks(n),)), max_context=300) for n in (3, 4))
    made.prefill([1, 2, 3]).save(tmp_path / "s")
    with pytest.raises(SessionError, match=r"made with 3 attention sinks \(--sinks\), this run has 4"):
        other.restore(tmp_path / "s")
    assert made.restore(tmp_path / "s").length == 3


def test_run_refuses_a_session_of_other_options_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tmp_path / "talk.session"
    run(folder, "-p", "once upon a time", "-n", 1, "--session", session)
    before = session.read_bytes()
    monkeypatch.delattr(Engine, "load")
    for option, value, told in (
        ("--key-bits", 4, "was made with --key-bits 2, this run has 4"),
        ("--method", "plain", "was made with method 'rotate', this run has 'plain'"),
        ("--sinks", 3, "was made with filter rules 'AttentionSinks(n=5)', this run has 'AttentionSinks(n=3)'"),
        ("--bits-budget", 2.5, "was made without a budget of bits (--bits-budget)"),
    ):
        result = run(folder, "-p", "more", "-n", 1, "--session", session, option, value)
        assert (result.exit_code, told in result.stderr) == (2, True), result.stderr
    result = run(folder, "-p", "more", "-n", 1, "--session", session, "--ctx", 10)
    assert (result.exit_code, "(--ctx) of more than" in result.stderr) == (2, True), result.stderr
    assert session.read_bytes() == before
    session.write_bytes(before[:-100])
    result = run(folder, "-p", "more", "-n", 1, "--session", session)
    assert (result.exit_code, "is truncated" in result.stderr) == (2, True), result.stderr


def test_a_session_that_is_only_read_answers_each_question_alike(folder: Path, tmp_path: Path) -> None:
    session, ask = tmp_path / "talk.session", ("-p", " and then", "-n", 8, "--session", tmp_path / "talk.session", "--json")
    assert "a session that is there" in run(folder, *ask, "--read-only").stderr
    run(folder, "-p", "once upon a time", "-n", 0, "--session", session)
    before = session.read_bytes()
    answers = [json.loads(run(folder, *ask, "--read-only").stdout.splitlines()[-1])["text"] for _ in range(2)]
    assert answers[0] == answers[1] and session.read_bytes() == before
    session.chmod(0o400)
    run(folder, *ask, "--read-only", "--ctx", 30)  # the context is full: nothing is saved then either
    assert session.read_bytes() == before and list(tmp_path.iterdir()) == [session]


def test_questions_are_answered_each_on_its_own(folder: Path, tmp_path: Path) -> None:
    session, lines = tmp_path / "talk.session", tmp_path / "questions.txt"
    lines.write_text(" and then\n\n once more \n and then\n")
    run(folder, "-p", "once upon a time " * 5, "-n", 0, "--session", session)
    before = session.read_bytes()
    result = run(folder, "--session", session, "--questions", lines, "-n", 8, "--json")
    answers = json.loads(result.stdout.splitlines()[-1])["answers"]
    alone = run(folder, "--session", session, "--read-only", "-p", "and then", "-n", 8, "--json")
    assert [one["question"] for one in answers] == ["and then", "once more", "and then"]
    assert answers[0]["text"] == answers[2]["text"] == json.loads(alone.stdout.splitlines()[-1])["text"]
    assert {one["finish"] for one in answers} == {"length"} and session.read_bytes() == before
    assert "3 questions: read" in result.stderr
    told = run(folder, "-p", "once upon a time", "--questions", lines, "-n", 8)
    assert told.exit_code == 0 and [line for line in told.stdout.splitlines() if line.startswith("> ")] == [
        "> and then", "> once more", "> and then",
    ]  # fmt: skip
    for more in (("-i",), ("--fill", 5), ("--session", tmp_path / "none"), ("--session", session)):
        result = run(folder, "-p", "x", "--questions", lines, *more)
        assert (result.exit_code, "--questions are answered from" in result.stderr) == (2, True), result.stderr
    lines.write_text(" \n")
    assert "holds no question" in run(folder, "-p", "x", "--questions", lines).stderr


def test_run_without_text_and_without_a_session_is_refused(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--session", tmp_path / "none.session")
    assert result.exit_code == 2
    assert "no text" in result.stderr


def test_run_fills_the_context_and_says_when_it_is_full(folder: Path) -> None:
    result = run(folder, "--ctx", 400, "--fill", 380, "-p", "once upon", "-n", 50, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["cached_tokens"] == 400
    assert "the context of 400 tokens is full, the answer ends after" in result.stderr
    assert "of 50 tokens" in result.stderr
    assert "is full" not in run(folder, "--ctx", 400, "--fill", 100, "-n", 3).stderr
    assert run(folder, "--ctx", 400, "--fill", 401).exit_code == 2


def test_a_text_that_does_not_fit_leaves_what_was_filled(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--fill", 500, "--ctx", 520, "-p", "once upon a time " * 40, "--session", tmp_path / "s")
    assert result.exit_code == 2 and "do not fit a context of 520" in result.stderr
    assert session_header(tmp_path / "s")["length"] == 500
    result = run(folder, "--fill", 600, "--ctx", 520, "-p", "once")
    assert result.exit_code == 2 and "fill with at most 520" in result.stderr


def test_run_removes_its_checkpoint_when_the_prompt_is_read(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "half"
    result = run(folder, "-p", "once upon a time", "-n", 2, "--checkpoint", checkpoint)
    assert result.exit_code == 0
    assert not checkpoint.exists()
    checkpoint.write_bytes(b"nonsense")
    result = run(folder, "-p", "once upon a time", "-n", 2, "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert "not an skvq checkpoint" in result.stderr


def test_it_is_saved_while_the_interpreter_ends(folder: Path, tmp_path: Path) -> None:
    """From then on no thread is started."""
    code = f"""
import atexit, sys
from pathlib import Path
from tiny import *
engine = tiny_engine(Path({str(folder)!r}), tiny_cache())
sequence = engine.prefill(random_ids(300))
@atexit.register
def late():
    sequence.save({str(tmp_path / "late")!r})
    print(engine.restore({str(tmp_path / "late")!r}).length)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("300\n", 0), done.stderr
