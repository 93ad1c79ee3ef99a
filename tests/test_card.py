"""The engine on a GPU that is not there (``card.py``): nothing left on the host, nothing in a graph that none can hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD, Card, CheckedGraphs, OnCard, Stream, card
from tiny import random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine import streams
from skvq.engine.answer import draw
from skvq.engine.config import SamplingConfig
from skvq.engine.decode import EagerStep, GraphStep, decode_step_of, hidden_states
from skvq.engine.filters import AttentionSinks, HeavyHitters, KeyOutliers, TokenIds
from skvq.engine.generate import Engine
from skvq.engine.generation import begun, step
from skvq.engine.grammar import Grammar
from skvq.engine.lookup import Lookup
from skvq.engine.methods import CacheMethod
from skvq.engine.planner import Plan
from skvq.engine.prefill_form import PrefillForm
from skvq.engine.rollback import all_or_nothing
from skvq.engine.sampling import Sampler
from skvq.engine.trials.bench import bench_decode, bench_prefill
from skvq.kernels import ops
from skvq.kernels.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr(ops, "CudaGraphs", CheckedGraphs)
    monkeypatch.setattr(Reference, "captures", lambda self, head_size: True)
    with card() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("card"), head_size=64, num_layers=2)


def tensors_of(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    parts = engine.parts
    weights = parts.model.weights
    for layer in weights.layers:
        for name in ("input_norm", "mlp_norm"):
            yield name, getattr(layer, name)
        yield from (("qk_norm", t) for t in layer.qk_norm or ())
        for name in ("qkv", "output", "mlp"):
            yield from ((name, t) for t in getattr(layer, name).tensors)
    yield from (("embedding", t) for t in (*weights.embedding.tensors, *weights.head.tensors, weights.norm))
    yield from parts.setup.arena.tensors.items()
    yield from parts.setup.arena.layer(0).items()
    yield "frequencies", parts.rope.turned.inv_freq


def attend_without_waiting(engine: Engine) -> None:
    """The specification waits for the card; what a graph holds does not: attention over the window alone."""

    def attend(layer: int, q: Tensor, step: Any) -> tuple[Tensor, Tensor]:
        full = engine.parts.setup.arena.full(layer)
        held = full.positions[step.slots]
        seen = (held >= 0)[:, None] & (held[:, None] <= step.positions[:, :, None])
        k, v = (t[step.slots].repeat_interleave(2, 1).float() for t in (full.keys, full.values))
        score = torch.einsum("bnhd,bhfd->bhnf", q.float(), k).masked_fill(~seen[:, None], -torch.inf)
        out = torch.einsum("bhnf,bhfd->bnhd", score.softmax(-1), v.nan_to_num(0.0))
        return out.to(q.dtype), score.logsumexp(-1).transpose(1, 2)

    engine.parts.setup.method.attend = attend  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["fp", "plain", "reorder", pytest.param("rotate", marks=pytest.mark.slow)])
def test_load_read_and_decode(folder: Path, gpu: Card, method: str) -> None:
    """Calibration, exact prefill over several tiles, decode: everything on the card, and what the CPU computes."""
    options: dict[str, Any] = {"max_context": 700, "cuda_graph": False}
    engine = tiny_engine(folder, tiny_cache(method=method), device="cuda", dtype="auto", **options)
    for name, tensor in tensors_of(engine):
        assert isinstance(tensor, OnCard) and tensor.device == CARD, name
    assert engine.parts.model.dtype == torch.bfloat16
    sequence = engine.prefill(random_ids(400))
    assert sequence.packed == 384
    got = steps(engine, [sequence], [random_ids(3, seed=1)]).cpu()
    on_cpu = tiny_engine(folder, tiny_cache(method=method), dtype="bfloat16", **options)
    wanted = steps(on_cpu, [on_cpu.prefill(random_ids(400))], [random_ids(3, seed=1)])
    assert float((got - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize(
    "form", [PrefillForm(host_states=True), PrefillForm(head_groups=2), PrefillForm(head_groups=2, host_states=True)], ids=str
)
def test_every_form_of_exact_prefill(
    folder: Path, gpu: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: PrefillForm
) -> None:
    """Hidden states in host memory, heads in groups, a checkpoint at every point: the logits of the plain form."""
    engine = tiny_engine(folder, tiny_cache(method="plain"), device="cuda", dtype="auto", max_context=700, cuda_graph=False)
    with engine.prefill(random_ids(400)) as plain_form:
        wanted = plain_form.logits
    monkeypatch.setattr("skvq.engine.prefill.CHUNK_TOKENS", 150)
    monkeypatch.setattr(Plan, "form_of", lambda *args: form)
    with engine.prefill(random_ids(400), checkpoint=tmp_path / "part", checkpoint_seconds=0) as sequence:
        assert wanted is not None and sequence.logits is not None and sequence.packed == 384
        assert float((sequence.logits - wanted).norm() / wanted.norm()) < 0.05


def test_a_tile_is_packed_without_waiting_layers_beside_each_other(folder: Path, gpu: Card) -> None:
    """The current stream has all layers' work behind it afterwards, even if it is broken off."""
    rules = (AttentionSinks(3), KeyOutliers(threshold=3.0))
    options: dict[str, Any] = {"max_context": 700, "cuda_graph": False, "device": "cuda", "dtype": "auto"}
    engine = tiny_engine(folder, tiny_cache(filters=rules, method="plain"), **options)
    tile = engine.parts.setup.regions.tile
    sequence = engine.prefill(random_ids(16 + 2 * tile - 1))
    batch = engine.step._batch(1, 1)  # type: ignore[attr-defined]
    method = type(engine.parts.setup.method)
    on: list[Stream] = []

    def packing(self: CacheMethod, layer: int, *args: Any) -> None:
        on.append(Stream.current)
        if broken and layer == 1:
            raise KeyboardInterrupt

    current = Stream.current
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "pack", packing)
        for warm, broken in ((False, True), (True, True), (True, False)):
            if warm:
                engine.parts.setup.streams.each(0, lambda layer: None)
            current.seen.clear()
            batch.begin([sequence], [7])
            hidden_states(engine.parts.model, engine.parts.rope, batch, batch.max_packed)
            gpu.waits.clear()
            with pytest.raises(KeyboardInterrupt) if broken else contextlib.nullcontext():
                batch.commit([7])
            assert not gpu.waits
            first, second = on[-2:]
            assert (first is second is current) == (not warm) and (first is current or second is current) == (not warm)
            assert {first, second} <= current.seen and current in first.seen & second.seen
    assert sequence.packed == 2 * tile


def test_what_a_chunk_may_write_over_is_kept_without_waiting(folder: Path, gpu: Card) -> None:
    engine = tiny_engine(folder, tiny_cache(method="plain"), device="cuda", dtype="auto", max_context=700, cuda_graph=False)
    sequence = engine.prefill(random_ids(30))
    keys = engine.parts.setup.arena.full(1).keys[sequence.slot]
    before = keys.cpu()
    gpu.waits.clear()

    def broken_off() -> None:
        with all_or_nothing(sequence):
            assert not gpu.waits
            keys.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert torch.equal(keys.cpu().view(torch.int16), before.view(torch.int16))


def test_much_is_copied_in_parts_that_need_no_memory_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is not contiguous torch would first make a copy there."""
    seen: list[bool] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.copy_:
                seen.append(args[0].is_contiguous() and args[1].is_contiguous())
            return super().__torch_function__(func, types, args, kwargs or {})

    slot = torch.arange(120).view(3, 2, 4, 5).as_subclass(Watched)[:, 1]  # type: ignore[arg-type]
    monkeypatch.setattr(streams, "LITTLE", 0)
    copy = streams.on_host(slot)
    assert torch.equal(copy, slot) and seen == [True] * 3
    streams.copy_parts(slot, copy + 1)
    assert torch.equal(copy + 1, slot) and seen == [True] * 6
    monkeypatch.setattr(streams, "LITTLE", slot.nbytes)
    assert torch.equal(streams.on_host(slot), slot) and seen == [True] * 6 + [False]


def test_a_graph_holds_the_step(folder: Path, gpu: Card) -> None:
    cache = tiny_cache(method="plain")
    engine = tiny_engine(folder, cache, device="cuda", dtype="auto", max_context=700, cuda_graph=False)
    parts = engine.parts
    attend_without_waiting(engine)
    engine.step = decode_step_of(parts.model, parts.rope, parts.setup, graph=True)
    assert isinstance(engine.step, GraphStep)
    sequences = [engine.prefill(random_ids(count, seed=count)) for count in (140, 30)]
    rows = [random_ids(8, seed=i) for i in range(2)]
    got = steps(engine, sequences, rows)  # over the edge of a tile
    eager = EagerStep(parts.model, parts.rope, parts.setup)
    again = [engine.prefill(random_ids(count, seed=count)) for count in (140, 30)]
    with torch.no_grad():
        for i, tokens in enumerate(zip(*rows, strict=True)):
            assert torch.equal(eager.run(again, tokens), got[:, i])
        for _ in range(2):  # three tokens of each are a graph of their own
            several = random_ids(6, seed=5)
            assert torch.equal(engine.step.run(sequences, several), eager.run(again, several))


def test_a_guessing_step_waits_once(folder: Path, gpu: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_cache(method="plain")
    engine = tiny_engine(folder, cache, device="cuda", dtype="auto", max_context=900, cuda_graph=False)
    attend_without_waiting(engine)
    config = SamplingConfig(max_new_tokens=200, ignore_eos=True, prompt_lookup=3)
    sequence = engine.prefill([5, 6, 7, 8] * 10)
    assert sequence.logits is not None
    answer = begun(engine, sequence, sequence.logits, config, [8])
    monkeypatch.setattr(Lookup, "guess", lambda self, count: random_ids(count))
    for _ in range(2):
        gpu.waits.clear()
        step(engine, [answer])
        assert gpu.waits == {"cpu": 1}
    assert engine.step._batch.cache_info().currsize == 2, "of one token, and of four"  # type: ignore[attr-defined]
    assert len(sequence.token_ids) == 39 + answer.count


def test_what_a_graph_cannot_hold_is_refused(gpu: Card) -> None:
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    for work in (x.sum().item, x.nonzero, lambda: x[x > 0], lambda: bool(x[0]), lambda: x.to("cpu"), lambda: x.copy_(host)):
        with pytest.raises(AssertionError, match="graph"), gpu.capture():
            work()
    with pytest.raises(AssertionError, match="graph"), gpu.capture():
        torch.tensor([1], device="cuda")
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    for place in (at, 0):
        with pytest.raises(AssertionError, match="graph"), gpu.capture():
            x[place] = 5
    with gpu.capture():
        x[1:] = 5
        x[at] = x.sum()
    for mixed in (lambda: x + host, lambda: torch.cat([x, host]), lambda: x[torch.tensor([1])]):
        with pytest.raises(AssertionError, match="mixes card and host"):
            mixed()
    assert (x + torch.tensor(2.0)).device == CARD  # a number of the host is none


class Odd:
    """Allows odd tokens of eight."""

    def is_error(self) -> bool:
        return False

    def compute_bitmask(self) -> bytes:
        return bytes([0b10101010])

    def consume_token(self, sampled_token: int) -> bool:
        return sampled_token % 2 == 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1, "top_k": 4, "top_p": 0.9, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("form", [False, True])
def test_drawing_a_token_waits_once(gpu: Card, options: dict[str, Any], form: bool) -> None:
    grammar = Grammar(Odd(), 8, CARD) if form else None
    sampler = Sampler(SamplingConfig(repeat_penalty=1.1, **options), [1, 2], 8, CARD, grammar)
    gpu.waits.clear()
    assert sampler.take(*sampler.choose(9 * torch.arange(8.0, device="cuda"), 2).tolist()) == 7
    assert gpu.waits == {"tolist": 1}


def test_drawing_for_several_answers_waits_once(folder: Path, gpu: Card) -> None:
    cache = tiny_cache(method="plain")
    engine = tiny_engine(folder, cache, device="cuda", dtype="auto", max_context=900, max_sequences=3, cuda_graph=False)
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.5, logprobs=2)
    sequences = [engine.prefill([token]) for token in (1, 2, 3)]
    logits = [sequence.logits for sequence in sequences if sequence.logits is not None]
    answers = [begun(engine, *pair, sampling, [1]) for pair in zip(sequences, logits, strict=True)]
    gpu.waits.clear()
    draw(answers, logits)
    assert [a.count for a in answers] == [2, 2, 2] and gpu.waits == {"cpu": 1}


def test_text_sessions_and_batches(folder: Path, gpu: Card, tmp_path: Path) -> None:
    """What an engine does beside decoding: sampling, batches, streaming, short reads, forks, cuts, files, checkpoints."""
    cache = tiny_cache(method="plain", filters=(TokenIds(frozenset({5})), KeyOutliers(budget=4)))
    engine = tiny_engine(folder, cache, device="cuda", dtype="auto", max_context=900, prefill="streaming", cuda_graph=False)
    sampling = SamplingConfig(
        max_new_tokens=4, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repeat_penalty=1.1, seed=3, ignore_eos=True
    )
    assert len(engine.generate(["one", "two and three"], sampling)) == 2
    sequence = engine.prefill(random_ids(300))
    engine.read(sequence, random_ids(200))
    engine.read(sequence, random_ids(9))
    fork = sequence.fork()
    fork.truncate(200)
    engine.read(fork, random_ids(5))
    fork.save(tmp_path / "session")
    restored = engine.restore(tmp_path / "session")
    assert torch.equal(*(steps(engine, [s], [[1, 2]]) for s in (fork, restored)))
    restored.free()
    engine.prefill(random_ids(300), checkpoint=tmp_path / "part", checkpoint_seconds=0).free()
    assert bool((engine.nll(random_ids(200)) > 0).all()) and engine.logits(random_ids(40)).device == CARD
    assert engine.summary(sequence).device == str(CARD)


@pytest.mark.parametrize("method", ["plain", "reorder", "fp"])
def test_a_full_context_shifts(folder: Path, gpu: Card, method: str) -> None:
    engine = tiny_engine(
        folder, tiny_cache(method=method), device="cuda", dtype="auto", max_context=2700, on_full="shift", cuda_graph=False
    )
    sequence = engine.prefill(random_ids(2698))
    steps(engine, [sequence], [[1, 2, 3, 4]])
    assert sequence.dropped


def test_attention_mass(folder: Path, gpu: Card) -> None:
    cache = tiny_cache(method="plain", filters=(HeavyHitters(threshold=1.5, budget=4),))
    engine = tiny_engine(folder, cache, device="cuda", dtype="auto", max_context=700)
    assert isinstance(engine.step, EagerStep)
    sequence = engine.prefill(random_ids(140))
    steps(engine, [sequence], [random_ids(6)])
    assert sequence.packed == 128


def test_benchmarks(folder: Path, gpu: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "captures", lambda self, head_size: False)  # the specification waits for the card
    engine = tiny_engine(folder, tiny_cache(method="plain"), device="cuda", dtype="auto", max_context=700, cuda_graph=False)
    for bench in (bench_decode(engine, [300]), bench_prefill(engine, [300])):
        assert bench.as_dict(list(bench.rows))["device"] == "a card that is not there"
