"""A full context that drops its oldest pages: attention over what is left, at the right distances, in every mode."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from attending import Trace, decode, stream, trace
from click.testing import CliRunner
from loader_fixtures import refused
from tiny import arena_of, bytes_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.cli import main
from skvq.engine import reading
from skvq.engine.arena import Arena
from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.filters import AttentionSinks, KeyOutliers, TokenIds
from skvq.engine.generate import Engine
from skvq.engine.overflow import drop_pages
from skvq.engine.rope import at_positions, shifted
from skvq.kernels.layout import PAGE_TOKENS
from skvq.kernels.reference import masked_attention

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT, SINKS = 2700, 3
SAME = 64 * torch.finfo(torch.float32).eps
HALF = 2.0**-10  # sinks (or, in reorder, the window) are rounded to 16 bits once more at each shift
RULES = (TokenIds(frozenset(range(0, 320, 40)), 400), AttentionSinks(SINKS), KeyOutliers(threshold=2.0, budget=900))
CACHES: dict[str, dict[str, Any]] = {
    "fp": {"method": "fp"},
    "plain": {"method": "plain"},
    "rotate": {},
    "rotate K1.5V1.5": {"key_bits": 1.5, "value_bits": 1.5},
    "reorder": {"method": "reorder"},
    "rules": {"filters": RULES},
}


class Engines(dict[str, tuple[Engine, Engine]]):
    """An engine of one layer that shifts, and one with room for everything, by the cache's name."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = tiny_folder(folder, num_layers=1, trained_context=9000)

    def __missing__(self, name: str) -> tuple[Engine, Engine]:
        cache = tiny_cache(**CACHES[name])
        short = tiny_engine(self.folder, cache, max_context=CONTEXT, on_full="shift")
        self[name] = short, tiny_engine(self.folder, cache, max_context=9000)
        return self[name]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("tiny"))


def with_heavy_sinks(text: Trace) -> Trace:
    """Sinks that get a good part of all attention, by channels that turn slowly: how much depends on how far they are."""
    q, k = text.q.clone(), text.k.clone()
    size = q.shape[-1]
    slow = [pair + half for half in (0, size // 2) for pair in range(size // 2 - 6, size // 2)]
    q[..., slow] += 2.0
    k[:, :SINKS][..., slow] += 2.5
    return Trace(q=q, k=k, v=text.v, ids=text.ids)


def requantized(name: str) -> bool:
    """Whether tokens after a shift reach the quantizer with another 16-bit rounding, so that some get other codes."""
    return name == "reorder"


def oracle(
    engine: Engine, sequence: SequenceCache, text: Trace, dropped: int, moved: int, own: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of the next tokens of a sequence that holds everything, had it dropped: tokens ``SINKS .. dropped-1`` are
    not seen, the sinks stand ``moved`` further on. Distances are those of the whole text. ``own``: packed tokens from
    ``dropped`` on as they are in the sequence under test."""
    first, count = sequence.length, len(text)
    rope = at_positions(engine.parts.rope, torch.arange(first, first + count)[None])
    q, k, v = rope.apply(text.q)[0], rope.apply(text.k)[0], text.v[0]
    keys, values = ([t.float()] for t in sequence.window(0, first)[:2])
    if sequence.packed:
        for parts, packed in zip((keys, values), sequence.stage(0, 0, sequence.packed), strict=True):
            parts.insert(0, packed)
    if count == 1:  # decode sees its own token in 16 bits
        k, v = k.half().float(), v.half().float()
    keys, values = torch.cat([*keys, k]), torch.cat([*values, v])
    if own is not None and len(own[0]):
        keys[dropped : sequence.packed] = shifted(own[0], dropped, engine.parts.rope.turned)
        values[dropped : sequence.packed] = own[1]
    if moved:
        keys[:SINKS] = shifted(keys[:SINKS], moved, engine.parts.rope.turned)
    at, t = torch.arange(len(keys))[None], torch.arange(first, first + count)[:, None]
    return masked_attention(q, keys, values, (at <= t) & ((at < SINKS) | (at >= dropped)))[0]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", CACHES)
def test_attention_is_over_what_is_left_at_the_distances_of_the_whole_text(engines: Engines, name: str) -> None:
    """Chunks and single tokens through three shifts; the oracle holds the whole text and hides what was dropped."""
    short, long = engines[name]
    chunks = [1024, 1024, 640, *[1] * 20, 1000, 300, 900, *[1] * 5, 700]
    text = with_heavy_sinks(trace(short, sum(chunks)))
    sequence, whole = short.new_sequence(), long.new_sequence()
    start, shifts = 0, set()
    for count in chunks:
        part = text[start : start + count]
        found = decode(short, [sequence], [part])[0] if count == 1 else stream(short, sequence, part)
        own = sequence.stage(0, 0, whole.packed - sequence.dropped) if sequence.dropped and requantized(name) else None
        wanted = oracle(long, whole, part, sequence.dropped, sequence.dropped, own)
        bound = 4 * HALF if sequence.dropped else SAME
        assert apart(found, wanted) <= bound, (start, sequence.dropped)
        if sequence.dropped and count > 1:
            unturned = oracle(long, whole, part, sequence.dropped, 0, own)
            assert apart(found, unturned) > 10 * bound, "sinks do not matter here: the test would see nothing"
        (decode(long, [whole], [part]) if count == 1 else stream(long, whole, part))
        start += count
        shifts |= {sequence.dropped} - {0}
        assert sequence.length + sequence.dropped == whole.length and sequence.length <= CONTEXT
        assert sequence.packed + sequence.dropped == whole.packed
        assert sequence.token_ids == whole.token_ids[sequence.dropped :]
    assert len(shifts) == 3
    pages = [w[sequence.dropped // short.parts.setup.regions.tile :] for w in bytes_of(whole, whole.packed)]
    kept = bytes_of(sequence, sequence.packed)
    equal = sum(int((a == b).sum()) for a, b in zip(kept, pages, strict=True)) / sum(t.numel() for t in kept)
    assert equal > (0.98 if requantized(name) else 0.999), (
        "tokens are packed as they would be without a shift, but for rounding ties"
    )
    short.parts.setup.arena.check(arena_of(sequence))
    sequence.free()
    whole.free()


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", ["fp", "rotate", "reorder"])
def test_batches_forks_sessions_and_cuts_after_a_shift(tmp_path: Path, name: str, backend: str) -> None:
    cache = tiny_cache(**CACHES[name])
    folder = tiny_folder(tmp_path / "m")
    engine = tiny_engine(folder, cache, max_context=CONTEXT, on_full="shift", backend=backend, prefill="streaming")
    sequence, other = engine.prefill(random_ids(3500)), engine.prefill(random_ids(300, seed=2))
    assert sequence.dropped == 1280
    twin = sequence.fork()
    sequence.save(tmp_path / "s")
    more = random_ids(6, seed=3)
    alone = steps(engine, [twin], [more])[0]
    together = steps(engine, [sequence, other], [more, more])
    assert (together[0] - alone).abs().max() < 1e-4
    engine.parts.setup.arena.check(arena_of(sequence, twin, other))
    for done in (sequence, twin, other):
        done.free()
    fresh = tiny_engine(folder, cache, max_context=CONTEXT, backend=backend)
    restored = fresh.restore(tmp_path / "s")
    assert (restored.dropped, restored.length) == (1280, 2220)
    cut = restored.fork()
    assert (steps(fresh, [restored], [more])[0] - alone).abs().max() < 1e-4
    cut.truncate(2210)
    again = fresh.read(cut, [*random_ids(3500)[3490:], *more])
    assert (again - alone[-1]).abs().max() < 5e-3
    cut.truncate(0)
    assert cut.dropped == 0 and not (fresh.parts.setup.arena.positions[:, cut.slot] >= 0).any()


def test_logits_of_a_model_equal_a_dense_oracle(tmp_path: Path) -> None:
    """Method fp, float32, one layer: keys and values do not depend on what was in sight when they were cached."""
    engine = tiny_engine(
        tiny_folder(tmp_path, num_layers=1), tiny_cache(method="fp"), max_context=CONTEXT, on_full="shift", prefill="streaming"
    )
    ids = random_ids(4200)
    sequence = engine.new_sequence()
    engine.read(sequence, ids[:-10])
    found = steps(engine, [sequence], [ids[-10:]])[0]
    dropped, parts = sequence.dropped, engine.parts
    assert dropped == 2560

    class Kept:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Any) -> Tensor:
            at = torch.arange(len(ids))
            places = torch.where(at < SINKS, at + dropped, at)
            k = at_positions(parts.rope, places[None]).apply(k)[0].half().float()
            visible = (at[None] <= at[-10:, None]) & ((at < SINKS) | (at >= dropped))[None]
            out = torch.zeros_like(q)
            out[0, -10:] = masked_attention(rope.apply(q)[0, -10:], k, v[0].half().float(), visible)[0]
            return out

    x = parts.model.layer(0, parts.model.embed(torch.tensor([ids])), at_positions(parts.rope, torch.arange(4200)[None]), Kept())
    assert (parts.model.head(x[0, -10:]) - found).abs().max() < 1e-4


@pytest.mark.parametrize("length", [2, 10, 39, 40, 41])
def test_sinks_are_seen_after_a_cut_to_fewer_tokens(tmp_path: Path, length: int) -> None:
    """A token decoded sees what one that is streamed sees."""
    cache = tiny_cache(method="fp", filters=(AttentionSinks(40),))
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=1), cache, on_full="shift", max_context=2700)
    with engine.prefill(random_ids(3000)) as decoded, decoded.fork() as streamed:
        assert decoded.dropped
        for sequence in (decoded, streamed):
            sequence.truncate(length)
        found = engine.decode_step([decoded], [7])[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "SHORT_TOKENS", 0)
            wanted = engine.read(streamed, [7])
        assert streamed.timing.prefill == "streaming"
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_a_text_is_read_after_a_cut_to_fewer_tokens_than_there_are_sinks(tmp_path: Path) -> None:
    """By streaming: every query sees all of them, as decode steps do."""
    cache = tiny_cache(method="fp", filters=(AttentionSinks(9),))
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=3), cache, max_context=CONTEXT, on_full="shift")
    read, more = engine.new_sequence(), random_ids(200, seed=1)
    engine.read(read, random_ids(CONTEXT + 500))
    read.truncate(2)
    twin = read.fork()
    assert read.orphans == 9
    found = engine.read(read, more)  # more than are read as decode steps
    assert (found - steps(engine, [twin], [more])[0, -1]).abs().max() < 1e-2


def test_the_only_token_left_is_read_once_more_behind_the_sinks(tmp_path: Path) -> None:
    """``stream("")`` after a cut to one token. Keys and values of one layer are those of the tokens alone: the same again."""
    cache = tiny_cache(method="fp", filters=(AttentionSinks(9),))
    folder = tiny_folder(tmp_path, num_layers=1)
    engine = tiny_engine(folder, cache, max_context=CONTEXT, on_full="shift", prefix_cache=True)
    with engine.prefill(random_ids(CONTEXT + 500)) as sequence:
        sequence.truncate(1)
        with sequence.fork() as twin:
            twin.take_back()
            assert (twin.length, twin.dropped, twin.orphans) == (0, sequence.dropped, 9)
            assert twin.pending == sequence.token_ids
            engine.read(twin, [])
            found, wanted = (engine.decode_step([s], [5]) for s in (twin, sequence))
            assert twin.timing.prefill == "as decode steps" and (found - wanted).abs().max() < 1e-3
            twin.truncate(0)
            assert (twin.dropped, twin.orphans) == (0, 0)


def test_an_answer_and_a_prompt_go_on_past_the_context(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(), max_context=2600, on_full="shift", prefix_cache=True)
    sequence = engine.new_sequence()
    ids = random_ids(2599, vocab=256)
    list(engine.stream(ids, SamplingConfig(max_new_tokens=12, ignore_eos=True), sequence=sequence))
    assert sequence.dropped == 1280 and sequence.length == 2599 + 11 - 1280
    assert "after 1,280 that were dropped" in engine.summary(sequence).line()
    held = list(engine.prefixes.pages)
    engine.prefixes.keep(sequence)
    assert engine.prefixes.pages == held, "what is left of a text is no prefix"
    longer = engine.prefill(random_ids(7000))
    assert longer.dropped + longer.length == 7000 and longer.length <= 2600
    arena = engine.parts.setup.arena
    arena.check({**arena_of(sequence, longer), -1: list(engine.prefixes.pages)})


def test_a_checkpoint_of_a_shifted_read_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder, ids = tiny_folder(tmp_path / "m"), random_ids(6000)
    options = {"max_context": 2600, "on_full": "shift", "prefill": "streaming"}
    plain = tiny_engine(folder, tiny_cache(), **options).prefill(ids)
    plain.save(tmp_path / "plain")
    engine = tiny_engine(folder, tiny_cache(), **options)
    layer, calls = engine.parts.model.layer, [0]

    def breaking(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 9:
            raise RuntimeError("power cut")
        return layer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.model, "layer", breaking)
        with pytest.raises(RuntimeError):
            engine.prefill(ids, checkpoint=tmp_path / "ck", checkpoint_seconds=0)
    engine = tiny_engine(folder, tiny_cache(), **options)
    engine.prefill(ids, checkpoint=tmp_path / "ck").save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hundred_shifts_leave_the_sinks_in_place(tmp_path: Path, dtype: torch.dtype) -> None:
    """Each rounds their keys once more: the error grows as the root of the number of shifts."""
    engine = tiny_engine(
        tiny_folder(tmp_path, num_layers=1), tiny_cache(), max_context=CONTEXT, on_full="shift",
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    sequence = engine.prefill(random_ids(1500))
    full = engine.parts.setup.arena.full(0)
    before = full.keys[sequence.slot, :, :SINKS].transpose(0, 1).float()
    for _ in range(100):
        drop_pages(sequence, 1)
        sequence.length, sequence.packed = sequence.length + 1280, sequence.packed + 1280
        sequence.pages.append(sequence.setup.arena.new_page())
    after = full.keys[sequence.slot, :, :SINKS].transpose(0, 1).float()
    wanted = shifted(before, sequence.origin, engine.parts.rope.turned)
    assert (after - wanted).norm() / wanted.norm() < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cut", [False, True])
def test_ctrl_c_comes_after_a_shift_or_a_cut(engines: Engines, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """The sequence is what it is without one: half of it cannot be undone."""
    engine, release = engines["rotate"][0], Arena.release
    work: Callable[[SequenceCache], None] = (lambda s: s.truncate(400)) if cut else (lambda s: drop_pages(s, 1))

    def interrupted(arena: Arena, page: int) -> None:
        signal.raise_signal(signal.SIGINT)
        release(arena, page)

    with engine.prefill(random_ids(2600)) as sequence, engine.prefill(random_ids(2600)) as other:
        work(other)
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "release", interrupted)
            with pytest.raises(KeyboardInterrupt):
                work(sequence)
        assert (sequence.length, sequence.packed, sequence.dropped) == (other.length, other.packed, other.dropped)
        assert sequence.page_row[: len(sequence.pages)].tolist() == sequence.pages and len(sequence.pages) == len(other.pages)
        assert torch.equal(*(engine.decode_step([s], [7]) for s in (sequence, other)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_too_short_a_context_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    refused(lambda: tiny_engine(folder, tiny_cache(), max_context=2447, on_full="shift"), "2,447", "2,448", "'stop'")
    tiny_engine(folder, tiny_cache(), max_context=2448, on_full="shift")
    for context, could in ((2447, False), (2448, True)):
        engine = tiny_engine(folder, tiny_cache(), max_context=context)
        said = refused(lambda engine=engine: engine.prefill([5] * 3000), f"do not fit a context of {context:,}")
        assert ("on_full 'shift'" in said) == could
    refused(lambda: tiny_engine(folder, tiny_cache(), on_full="shft"), "did you mean 'shift'")


def test_the_command_goes_on_past_the_context(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 80)
    arguments = [
        "--dummy-weights",
        "--backend",
        "reference",
        "--window",
        "16",
        "--group-size",
        "32",
        "--ctx",
        "2600",
        "-n",
        "5",
    ]
    given = ["run", "--model", str(tiny_folder(tmp_path / "m")), "-f", str(text), "--ignore-eos", *arguments]
    result = CliRunner().invoke(main, [*given, "--on-full", "shift"])
    assert result.exit_code == 0 and "dropped" in result.stderr, result.stderr
    assert "are more than the context of 2,600: they are streamed" in result.stderr
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2 and "do not fit a context of 2,600" in result.stderr


def test_an_engine_that_has_dropped_pages_is_gone_with_its_last_name(tmp_path: Path) -> None:
    """Memory of its arena is free at once, not when garbage is collected."""
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(), max_context=CONTEXT, on_full="shift")
    assert engine.parts.setup.method.at(PAGE_TOKENS) is not engine.parts.setup.method, "calibration gave keys no mean"
    codes = ref(engine.parts.setup.arena.layer(0)["key_codes"])
    gc.collect()
    gc.disable()
    try:
        del engine
        assert codes() is None
    finally:
        gc.enable()
