"""The decode step as a graph, without CUDA: what is captured, when, and that a replay needs nothing of the host."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from tiny import random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skvq.engine import reading
from skvq.engine.cache import SequenceCache
from skvq.engine.decode import MOST_FAILURES, MOST_GRAPHS, EagerStep, GraphStep, decode_step_of, hidden_states
from skvq.engine.errors import OptionError
from skvq.engine.filters import HeavyHitters
from skvq.engine.generate import Engine
from skvq.kernels.graphs import Captured, CudaGraphs, NotCaptured, capture_stream
from skvq.kernels.interface import Backend, RopeFrequencies, Step
from skvq.kernels.numba_cpu import NumbaCpu, tapes
from skvq.kernels.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim"}


class Tape(TorchDispatchMode):
    """Operations of torch with the tensors they were given: played again they see what those hold now, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in WAITS, f"{func.name()} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.played:
            new = func(*args, **kwargs)
            if isinstance(out, Tensor) and new is not out and new.data_ptr() != out.data_ptr():
                out.copy_(new)


class Tapes:
    """``Graphs`` for operations of torch."""

    def __init__(self, max_packed: int) -> None:
        self.count, self.max_packed = 0, max_packed

    setting = None

    def bound(self, packed: int) -> int:
        return self.max_packed

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        self.count += 1
        with Tape() as tape:
            logits = work()
        return Captured(tape.play, logits)


class Calls(Tapes):
    """``Graphs`` for anything: a replay is the work done once more."""

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        self.count += 1
        logits = work().clone()

        def replay() -> None:
            logits.copy_(work())

        return Captured(replay, logits)


def attend_tensors(engine: Engine) -> Callable[[int, Tensor, Step], tuple[Tensor, Tensor]]:
    """Attention over the full-precision slots, and a trace of how much is packed, with no number of the host."""

    def attend(layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        full = engine.parts.setup.arena.full(layer)
        held = full.positions[step.slots]  # [B, F]
        seen = (held >= 0)[:, None] & (held[:, None] <= step.positions[:, :, None])
        repeat = q.shape[2] // full.keys.shape[1]
        k, v = (t[step.slots].repeat_interleave(repeat, 1).float() for t in (full.keys, full.values))
        score = torch.einsum("bnhd,bhfd->bhnf", q, k).masked_fill(~seen[:, None], -torch.inf)
        out = torch.einsum("bhnf,bhfd->bnhd", score.softmax(-1), v.nan_to_num(0.0))
        return out + 0.01 * step.packed[:, None, None, None], score.logsumexp(-1).transpose(1, 2)

    return attend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("graph"))


def start(engine: Engine, count: int) -> list[SequenceCache]:
    return [engine.prefill(random_ids(40 + 90 * i, seed=i)) for i in range(count)]


@torch.no_grad()
def run(engine: Engine, step: Any, batches: int, length: int, tokens: int = 1) -> Tensor:
    """Logits of batches of two, one after another, over the edge of a tile: [batches * length, 2 * tokens, V]."""
    rows = []
    for number in range(batches):
        sequences = start(engine, 2)
        for i in range(length):
            rows.append(step.run(sequences, random_ids(2 * tokens, seed=1000 * number + i)))
        for sequence in sequences:
            sequence.free()
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("graphs", [Calls, Tapes])
def test_a_graph_gives_what_eager_steps_give(
    folder: Path, graphs: type[Tapes], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    if graphs is Tapes:
        monkeypatch.setattr(engine.parts.setup.method, "attend", attend_tensors(engine))
    of = engine.parts.model, engine.parts.rope, engine.parts.setup
    wanted = run(engine, EagerStep(*of), 2, 20, tokens)
    made = graphs(engine.parts.setup.regions.packed(600))
    got = run(engine, GraphStep(*of, made), 2, 20, tokens)
    assert made.count == 1  # whichever the sequences
    assert torch.equal(got, wanted)  # each step's own: a replay does not write over what was returned


@torch.no_grad()
def test_a_shift_is_captured_anew(folder: Path) -> None:
    """Dropping the oldest tokens changes what a graph holds by address: the means that keys are read with."""
    engine = tiny_engine(folder, tiny_cache(), max_context=2600, on_full="shift")
    made = Calls(engine.parts.setup.regions.packed(2600))
    step = GraphStep(engine.parts.model, engine.parts.rope, engine.parts.setup, made)
    sequence, counts = engine.prefill(random_ids(2598)), []
    for token in range(5):
        step.run([sequence], [token])
        counts.append((sequence.dropped > 0, made.count))
    assert counts == [(False, 1), (False, 1), (True, 2), (True, 2), (True, 2)]


@torch.no_grad()
def test_step_tensors_stay_where_they_are(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    [sequence] = start(engine, 1)
    assert isinstance(engine.step, EagerStep)
    batch = engine.step._batch(1, 1)
    named = {name: getattr(batch, name) for name in ("slots", "positions", "packed", "ring_slots", "token_ids")}
    named |= engine.parts.setup.arena.tensors
    places = {name: tensor.data_ptr() for name, tensor in named.items()}
    packed = sequence.packed
    while sequence.packed == packed:
        engine.decode_step([sequence], [sequence.length % 300])
        for name, tensor in named.items():
            assert tensor.data_ptr() == places[name], name
        for name in ("slots", "positions", "packed", "ring_slots", "token_ids"):
            assert getattr(batch, name) is named[name] or getattr(batch, name).data_ptr() == places[name]
    batch.begin([sequence], [7])
    batch.mark_slots()
    assert batch.positions.tolist() == [[sequence.length]] and batch.packed.tolist() == [sequence.packed]
    assert batch.ring_slots.tolist() == [engine.parts.setup.regions.slot(sequence.length)] and batch.token_ids.tolist() == [[7]]


def test_who_gets_a_graph(folder: Path) -> None:
    """Backends that can be captured, as they capture. No rule that asks for mass; not when it is turned off."""
    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    parts = engine.parts

    def made(backend: Backend, size: int = 128, *, graph: bool = True, rules: Any = ()) -> type:
        model: Any = type("Model", (), {"config": replace(parts.model.config, head_size=size), "weights": None})()
        setup = replace(parts.setup, backend=backend, rules=rules)
        step = decode_step_of(model, parts.rope, setup, graph=graph)
        return type(step.graphs) if isinstance(step, GraphStep) else type(step)

    class Plugin(Reference):
        """Has CUDA graphs by saying that it can be captured."""

        def captures(self, head_size: int) -> bool:
            return head_size == 128

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        assert made(Plugin()) is CudaGraphs
        if find_spec("triton"):
            triton_gpu: Any = import_module("skvq.kernels.triton_gpu")
            made_for = triton_gpu.TritonGpu(torch.device("cuda"), card=object(), tuning=object())
            assert made(made_for) is CudaGraphs and made(made_for, 96) is EagerStep
    assert made(Plugin(), 96) is EagerStep
    assert made(Plugin(), graph=False) is EagerStep
    assert made(Plugin(), rules=(HeavyHitters(4),)) is EagerStep
    assert made(Reference()) is EagerStep
    assert made(NumbaCpu(), 96) is tapes.Tapes
    assert made(NumbaCpu(), rules=(HeavyHitters(4),)) is EagerStep
    assert made(NumbaCpu(), graph=False) is EagerStep


def test_cuda_graphs_launch_before_they_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, **_: seen.append((type(graph), stream)) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    capture_stream.cache_clear()
    graphs, launched = CudaGraphs(torch.device("cuda:1"), 512), []

    def work() -> Tensor:
        launched.append(len(seen))
        return torch.full((1,), float(len(launched)))

    captured = [graphs.capture(work) for _ in range(2)]
    captured[0].replay()
    assert seen == [(Graph, "stream of cuda:1")] * 2 + ["replay"]
    assert launched == [0, 1, 1, 2]  # compiled before it is captured
    assert captured[1].result.item() == 3.0  # what the work gave that was done, not what capturing left


@torch.no_grad()
def test_a_step_that_cannot_be_captured_counts_all_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program that the engine is part of waited for the whole device, or memory was short: what the step gave is right, the
    next is tried again, and graphs held so far are given up."""
    failing = [True, False, True, False]

    class Short(Calls):
        def capture(self, work: Callable[[], Tensor]) -> Captured:
            if failing.pop(0):
                raise NotCaptured(work(), "out of memory")
            return super().capture(work)

    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    parts, tokens = engine.parts, [3, 4, 5]
    wanted = steps(engine, [engine.prefill(random_ids(30))], [tokens])[0]
    step = GraphStep(parts.model, parts.rope, parts.setup, Short(600))
    sequence = engine.prefill(random_ids(30))
    assert torch.equal(torch.stack([step.run([sequence], [token])[0] for token in tokens]), wanted)
    assert len(step._held) == 1 and len(failing) == 2
    step.run([sequence, engine.prefill(random_ids(30))], [3, 4])
    assert not step._held
    step.run([sequence], [3])
    assert len(step._held) == 1 and not failing and not capsys.readouterr().err
    failing += [True] * 2
    other = [engine.prefill(random_ids(30)) for _ in range(2)]
    logits = [step.run(other, [token, token]) for token in (3, 4, 5)]  # of a shape that has failed once; the last is not tried
    assert torch.equal(logits[0][0], logits[0][1]) and not failing
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said and "kernel by kernel from now on" in said
    for _ in range(6):  # others keep their graphs
        failing[:] = [False]
        step.run([sequence], [3])
        step.run(other, [3, 3])
    assert failing == [False] and len(step._held) == 1


@pytest.mark.parametrize("ended", [False, True])
def test_torch_is_left_as_it_was_where_it_cannot_end_a_capture(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda.graph`` does not leave its stream, and up to 2.11 goes on allocating for the graph."""
    current, pools = ["default"], []

    @contextmanager
    def graph(graph: object, stream: str, **rest: object) -> Iterator[None]:
        assert rest["pool"] == (0, 5) and not gc.isenabled()
        current.append(stream)
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")

    for name, put in {
        "CUDAGraph": object, "Stream": lambda device: "side", "current_stream": lambda device: current[-1],
        "set_stream": current.append, "graph": graph, "graph_pool_handle": lambda: (0, 5),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, put)

    def end(*which: object) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        pools.append(("end", *which))

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *which: pools.append(("release", *which)), raising=False)
    capture_stream.cache_clear()
    with pytest.raises(NotCaptured, match="previous error") as failed:
        CudaGraphs(torch.device("cuda:7"), 512).capture(lambda: torch.ones(1))
    assert current == ["default", "side", "default"] and failed.value.result.item() == 1.0
    assert pools == ([] if ended else [("end", 7, (0, 5)), ("release", 7, (0, 5))]) and gc.isenabled()


@torch.no_grad()
def test_a_step_that_finds_no_memory_takes_that_of_the_other_graphs(folder: Path) -> None:
    engine, failing = tiny_engine(folder, tiny_cache(), max_context=600), [False, True, False, True, True]

    class Full(Calls):
        def capture(self, work: Callable[[], Tensor]) -> Captured:
            if failing.pop(0):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().capture(work)

    step = GraphStep(engine.parts.model, engine.parts.rope, engine.parts.setup, Full(600))
    first, second = (engine.prefill(random_ids(30)) for _ in range(2))
    alone = step.run([first], [3])
    both = step.run([first, second], [4, 3])
    assert len(step._held) == 1 and torch.allclose(both[1], alone[0], atol=1e-5)
    step._failed[3, 1] = MOST_FAILURES  # launched kernel by kernel, while a graph is held
    full, given = [True], hidden_states
    third = engine.prefill(random_ids(30))
    with pytest.MonkeyPatch.context() as patch:

        def short(*args: Any) -> Tensor:
            if full.pop() if full else False:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return given(*args)

        patch.setattr("skvq.engine.decode.hidden_states", short)
        assert step.run([first, second, third], [5, 5, 3]).shape[0] == 3 and not step._held and not full
    with pytest.raises(torch.OutOfMemoryError):
        step.run([first], [3])
    assert failing == [True] and first.length == second.length + 1 == 33


@torch.no_grad()
def test_a_prompt_that_finds_no_memory_takes_that_of_the_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = tiny_engine(folder, tiny_cache(), max_context=600), []
    wanted, given = engine.prefill(random_ids(200)).logits, reading.exact_prefill
    engine.step = step = GraphStep(engine.parts.model, engine.parts.rope, engine.parts.setup, Calls(600))
    step.run([engine.prefill(random_ids(30))], [3])
    sequence = engine.new_sequence()

    def short(*args: Any) -> Any:
        asked.append(sequence.length)
        if step._held or len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return given(*args)

    monkeypatch.setattr(reading, "exact_prefill", short)
    assert torch.equal(engine.read(sequence, random_ids(200)), wanted) and asked == [0, 0] and not step._held
    with pytest.raises(torch.OutOfMemoryError):
        engine.read(engine.new_sequence(), random_ids(200))
    assert len(asked) == 3


@torch.no_grad()
def test_the_oldest_graph_is_given_up_before_there_are_too_many(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    graphs: list[ref[Any]] = []
    alive: list[int] = []

    class Watched(Tapes):
        setting = None

        def bound(self, packed: int) -> int:
            return self.max_packed

        def capture(self, work: Callable[[], Tensor]) -> Captured:
            alive.append(sum(graph() is not None for graph in graphs))
            result = work().clone()

            def replay() -> None:
                result.add_(1)

            graphs.append(ref(replay))
            return Captured(replay, result)

    watched = Watched(512)
    step = GraphStep(engine.parts.model, engine.parts.rope, engine.parts.setup, watched)
    sequences = start(engine, 1)
    for packed in range(512, 512 + MOST_GRAPHS + 2):
        watched.max_packed = packed
        first = step.run(sequences, [1])
        assert torch.equal(step.run(sequences, [1]), first + 1)
    assert alive == [*range(MOST_GRAPHS), MOST_GRAPHS - 1, MOST_GRAPHS - 1]
    watched.max_packed = 514  # the oldest that is left
    step.run(sequences, [1])
    assert len(alive) == MOST_GRAPHS + 2


@torch.no_grad()
def test_other_threads_are_another_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are divided among the threads there are when they are recorded."""
    engine = tiny_engine(folder, tiny_cache(), max_context=600, backend="numba")
    assert isinstance(engine.step, GraphStep)
    sequences = start(engine, 1)
    engine.decode_step(sequences, [1])
    known = len(engine.step._held)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for _ in range(2):
        engine.decode_step(sequences, [1])
        assert len(engine.step._held) == known + 1


@torch.no_grad()
def test_a_graph_holds_no_sequence(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    step = GraphStep(engine.parts.model, engine.parts.rope, engine.parts.setup, Tapes(512))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.setup.method, "attend", attend_tensors(engine))
        [sequence] = start(engine, 1)
        step.run([sequence], [1])
        step.run([sequence], [1])
        with pytest.raises(OptionError):
            engine.decode_step([sequence], [10**6])
    gone = ref(sequence)
    del sequence
    assert gone() is None


def test_what_a_graph_reads_is_never_freed() -> None:
    """Two caches over one backend: a longer one's tables do not take the place of those that the other's graph holds."""
    workspace = pytest.importorskip("skvq.kernels.triton_gpu.workspace")
    rope, tables = RopeFrequencies(inv_freq=torch.ones(4, dtype=torch.float64), scale=1.0), workspace.Tables()
    short = tables.rope(rope, 128, 10)
    long = tables.rope(rope, 128, 20)
    assert len(short.turn) == 16 and len(long.turn) == 26 and tables.rope(rope, 128, 20) is long
    assert tables.rope(rope, 128, 10) is long, "made anew on a side stream, they could be read before they are done"
    kept = ref(short)
    del short
    assert kept() is not None
    scratch = workspace.Scratch(torch.device("cpu"))
    taken = ref(scratch.take("sums", 8, torch.float32))
    scratch.take("sums", 80, torch.float32)
    assert taken() is not None
