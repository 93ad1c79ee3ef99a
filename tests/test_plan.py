"""The planner: what it prints is what is allocated, to the byte, and what does not fit is refused before anything is."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import tiny_config
from tiny import tiny_cache, tiny_engine, tiny_folder

from skvq.commands import cores
from skvq.engine import control_groups, loading, machine
from skvq.engine.arena import Arena
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CapacityError, OptionError
from skvq.engine.filters import AttentionSinks, HeavyHitters
from skvq.engine.model_config import ModelConfig
from skvq.engine.plan_report import parse_bytes, plan_report
from skvq.engine.planner import Plan, Planner, Room
from skvq.engine.prefill_form import PrefillForm, prefill_forms
from skvq.engine.rope_scaling import beyond_training, scaled
from skvq.engine.sizes import arena_shape, regions_of, token_bytes
from skvq.kernels.ggml.words import EXPANDED_BYTES
from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.layout import PAGE_TOKENS
from skvq.loaders.published import ALIASES

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = (1.5, 2.0, 3.0, 4.0, 8.0)


def planner_of(model: ModelConfig, cache: CacheConfig, **options: Any) -> Planner:
    """Fields of a room and of a planner in one."""
    room = Room(**{field.name: options.pop(field.name) for field in fields(Room) if field.name in options})
    return Planner(model=model, cache=cache, room=room, **options)


def cache_parts(plan: Plan) -> int:
    return sum(size for part, size in plan.parts.items() if part.startswith("cache"))


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["fp", "plain", "reorder", "rotate"]),
    bits=st.sampled_from(list(itertools.product(WIDTHS, WIDTHS))),
    window=st.integers(0, 300),
    rules=st.sampled_from([(), (AttentionSinks(5),), (AttentionSinks(1), HeavyHitters(budget=9))]),
    context=st.integers(1, 9000),
    sequences=st.integers(1, 5),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_arena_is_what_the_plan_says_to_the_byte(
    method: str,
    bits: tuple[float, float],
    window: int,
    rules: tuple[AttentionSinks, ...],
    context: int,
    sequences: int,
    layers: int,
    heads: int,
    size: int,
    dtype: torch.dtype,
) -> None:
    model = tiny_config(num_layers=layers, num_heads=heads, num_kv_heads=heads, head_size=size)
    cache = CacheConfig(method=method, key_bits=bits[0], value_bits=bits[1], group_size=32, window=window, filters=rules)
    shape = arena_shape(model, cache, max_context=context, max_sequences=sequences, dtype=dtype)
    plan = planner_of(model, cache, sequences=sequences, dtype=dtype, memory=2**40, weight_bytes=1).plan(context)
    arena = Arena(shape, torch.device("cpu"))
    assert arena.nbytes == shape.nbytes == cache_parts(plan)
    packed = regions_of(cache, model).packed(context)
    assert shape.pages * PAGE_TOKENS >= packed
    least = packed * token_bytes(cache, model)
    assert shape.page_bytes * shape.pages >= least


def test_an_engine_allocates_what_it_planned(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(key_bits=1.5), max_context=3001, max_sequences=3)
    assert engine.parts.setup.arena.nbytes == cache_parts(engine.parts.plan)
    assert engine.parts.model.weights.nbytes == engine.parts.plan.parts["weights"]


@pytest.mark.parametrize("backend, bytes_a_weight", [("reference", 4), ("numba", 2)])
def test_weights_are_what_the_plan_says_to_the_byte(tmp_path: Path, backend: str, bytes_a_weight: int) -> None:
    """On the CPU kernels multiply 16-bit weights as they are."""
    engine = tiny_engine(tiny_folder(tmp_path, qkv_bias=True, family="qwen2"), tiny_cache(), backend=backend)
    planned = engine.parts.plan.parts["weights"]
    assert engine.parts.model.weights.nbytes == planned
    assert planned / engine.parts.model.config.num_parameters == pytest.approx(bytes_a_weight, rel=0.02)


def test_a_whole_run_peaks_where_it_was_planned(tmp_path: Path) -> None:
    """Weights, arena, hidden states, one layer's keys and values and workspace: about half a gigabyte, within 5 %."""
    script = ROOT / "benchmarks" / "plan_vs_measured.py"
    done = subprocess.run([sys.executable, str(script), "--quick"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert row["planned"] > 400 * 2**20 and row["ratio"] == pytest.approx(1, abs=0.05), row


def mistral(**changes: object) -> ModelConfig:
    shape = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32}
    return tiny_config(**(shape | {"num_kv_heads": 8, "head_size": 128, "trained_context": 32768} | changes))


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_a_long_window_is_planned_for(prefill: str) -> None:
    """A step keeps a copy of it; streaming puts a layer's before a chunk; rules that look at attention compute scores of it."""
    options: dict[str, Any] = {"memory": 2**40, "weight_bytes": 0, "sequences": 1, "dtype": torch.float32, "prefill": prefill}
    model, context, far = tiny_config(), 50_000, 40_000
    short, long, looking = (
        planner_of(model, CacheConfig(group_size=32, window=window, filters=rules), **options).plan(context).parts["workspace"]
        for window, rules in ((128, ()), (far, ()), (far, (HeavyHitters(budget=9),)))
    )
    numbers = 2 * model.num_kv_heads * model.head_size * (far - 128)
    assert long - short == numbers * (2 * model.num_layers + (6 if prefill == "streaming" else 0))
    assert looking > long


def test_a_later_text_is_planned_for() -> None:
    """It is streamed, which a long window makes dearer than exact prefill of a context as long."""
    options: dict[str, Any] = {"memory": 2**40, "weight_bytes": 0, "sequences": 1, "dtype": torch.float32}
    model, context = mistral(num_kv_heads=32, num_layers=1, hidden_size=512), 40_960
    exact, streaming = (
        planner_of(model, CacheConfig(window=38_000), **options, prefill=prefill).plan(context)
        for prefill in ("exact", "streaming")
    )
    assert exact.parts["window of a later text"] > 0 and exact.total >= 0.9 * streaming.total
    assert "window of a later text" not in planner_of(model, CacheConfig(), **options).plan(context).parts


def test_logits_of_all_sequences_are_planned_for() -> None:
    """Graphs of many batch shapes hold them."""
    options: dict[str, Any] = {"memory": 2**40, "weight_bytes": 0, "dtype": torch.float32}
    one, many = (planner_of(mistral(), CacheConfig(), **options, sequences=n).plan(4096).parts["workspace"] for n in (1, 64))
    assert many - one >= 50 * 4 * 32000


@pytest.mark.parametrize("sequences", [1, 3, 8, 40, 200])
def test_logits_of_guesses_are_planned_for(sequences: int) -> None:
    """A step has at most so many rows of logits, and graphs hold so many for later."""
    options: dict[str, Any] = {"memory": 2**40, "weight_bytes": 0, "dtype": torch.float32, "sequences": sequences}
    few, many = (
        planner_of(mistral(vocab_size=v), CacheConfig(), **options).plan(4096).parts["workspace"] for v in (1000, 2000)
    )
    rows = max(sequences, min(64, 16 * sequences))
    assert many - few >= 1000 * 4 * (rows + max(rows, min(15 * sequences, 128)))


@pytest.mark.parametrize(
    "model, key_bits, value_bits, gigabytes",
    [
        (mistral(), 2.0, 2.0, 18.3),
        (mistral(intermediate_size=11008, num_kv_heads=32), 2.0, 1.5, 66.1),
    ],
)
def test_a_million_tokens_take_the_gigabytes_that_were_promised(
    model: ModelConfig, key_bits: float, value_bits: float, gigabytes: float
) -> None:
    """Mistral-7B and Llama-2-7B, groups of 128: packed pages, in 10^9 bytes."""
    cache = CacheConfig(key_bits=key_bits, value_bits=value_bits, group_size=128)
    plan = planner_of(model, cache, sequences=1, dtype=torch.bfloat16, memory=2**40, weight_bytes=1).plan(2**20)
    assert plan.parts["cache: packed pages"] / 1e9 == pytest.approx(gigabytes, abs=0.1)


CARD = {"sequences": 1, "dtype": torch.bfloat16, "memory": int(79.1 * 2**30), "host_memory": 64 * 2**30}


def llama() -> ModelConfig:
    return mistral(intermediate_size=11008, num_kv_heads=32)


@pytest.mark.parametrize(
    "model, context, form",
    [
        (mistral(), 2**20, PrefillForm()),
        (mistral(), 3 * 2**20, PrefillForm(host_states=True)),
        (mistral(), 2**22, PrefillForm(host_states=True, head_groups=8)),
        (llama(), 2**17, PrefillForm()),
        (llama(), 2**20, PrefillForm(host_states=True, head_groups=8)),
    ],
)
def test_a_prompt_is_held_in_the_cheapest_form_that_fits(model: ModelConfig, context: int, form: PrefillForm) -> None:
    """Mistral-7B and Llama-2-7B at K2 V1.5 on a card of 80 GB."""
    cache = CacheConfig(key_bits=2.0, value_bits=1.5, group_size=128)
    plan = planner_of(model, cache, weight_bytes=2 * model.num_parameters, **CARD).plan(context)
    assert plan.form == form and plan.fits
    assert bool(plan.host_parts) == form.host_states and plan.host_total <= plan.host_memory
    rest = plan.memory - (plan.total - plan.form_bytes)
    for cheaper in itertools.takewhile(lambda f: f != form, prefill_forms(model, "exact")):
        too_much = sum(cheaper.host_parts(model, context, 2).values()) > plan.host_memory
        assert too_much or sum(cheaper.device_parts(model, context, 2).values()) > rest


@pytest.mark.parametrize("device, there", [("a100", True), ("cpu", False)])
def test_a_card_has_room_for_cuda_itself(device: str, there: bool) -> None:
    report = plan_report(
        "mistral-7b", CacheConfig(), context=4096, sequences=1, memory="79GiB", device=device, dtype=None, prefill="exact"
    )
    assert (report.plan.parts.get("CUDA context and libraries", 0) == 2**30) is there


def test_without_host_memory_the_same_is_refused_with_the_numbers() -> None:
    cache = CacheConfig(key_bits=2.0, value_bits=1.5, group_size=128)
    options = CARD | {"host_memory": 0, "weight_bytes": 2 * llama().num_parameters}
    plan = planner_of(llama(), cache, **options).plan(2**20)
    assert not plan.host_parts and not plan.fits
    with pytest.raises(
        CapacityError,
        match=r"1,048,576 tokens needs 9\d.* GiB, only 79.10 GiB is available .*exact, heads.*largest context that fits is",
    ):
        plan.check(planner_of(llama(), cache, **options).advice())
    many = CARD | {"weight_bytes": 2 * llama().num_parameters, "sequences": 10**7}
    assert "one sequence alone, of up to 1," in planner_of(llama(), cache, **many).advice()
    assert "not even the weights" in planner_of(llama(), cache, **many | {"memory": 2**30}).advice()
    wide = planner_of(llama(), replace(cache, window=1_000_000), **options).advice()
    assert "a window of 1,000,000 tokens takes 488" in wide and "--window" in wide
    budget = CacheConfig(bits_budget=2.25)
    short = planner_of(llama(), budget, **options | {"memory": options["weight_bytes"] + 2**30 + 2**20, "cuda_bytes": 2**30})
    assert "not even a short context fits" in short.advice()
    assert planner_of(llama(), cache, **options).largest_context() < 2**20
    assert planner_of(llama(), cache, **options | CARD).largest_context() > 2**20


@settings(max_examples=60, deadline=None)
@given(context=st.integers(1, 300_000), tokens=st.integers(1, 300_000), short=st.integers(0, 2**31), host=st.integers(0, 2**34))
def test_a_shorter_prompt_keeps_to_what_was_planned(context: int, tokens: int, short: int, host: int) -> None:
    model, tokens = llama(), min(context, tokens)
    options = {"sequences": 1, "dtype": torch.float16, "weight_bytes": 1, "host_memory": host}
    ample = planner_of(model, CacheConfig(), memory=2**50, **options).plan(context)
    plan = planner_of(model, CacheConfig(), memory=max(1, ample.total - short), **options).plan(context)
    form = plan.form_of(model, tokens, torch.float16)
    assert sum(form.device_parts(model, tokens, 2).values()) <= plan.form_bytes <= ample.form_bytes
    assert sum(form.host_parts(model, tokens, 2).values()) <= plan.host_total <= host


@pytest.mark.parametrize("method", ["fp", "rotate"])
def test_the_largest_context_fits_and_a_page_more_does_not(method: str) -> None:
    options = {"sequences": 2, "dtype": torch.bfloat16, "memory": 40 * 2**30, "prefill": "streaming", "weight_bytes": 2**34}
    cache = CacheConfig(method=method, group_size=128)
    most = planner_of(mistral(), cache, **options).largest_context()
    assert planner_of(mistral(), cache, **options).plan(most).total <= 40 * 2**30
    assert planner_of(mistral(), cache, **options).plan(most + PAGE_TOKENS).total > 40 * 2**30
    assert planner_of(mistral(), cache, **{**options, "memory": 2**20}).largest_context() == 0


def test_a_context_that_cannot_fit_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path)
    memory = 8 * 2**20
    monkeypatch.setattr(loading, "available_memory", lambda device: memory)
    with monkeypatch.context() as patch:
        patch.setattr("skvq.loaders.dummy.DummySource.read", lambda self, name: pytest.fail("a weight was read"))
        patch.setattr(Arena, "__init__", lambda *args: pytest.fail("an arena was made"))
        with pytest.raises(
            CapacityError, match=r"a context of 500,000 .* only 8.0 MiB is available .* largest context that fits is"
        ) as caught:
            tiny_engine(folder, tiny_cache(), max_context=500_000)
    most = int(str(caught.value).rsplit(" ", 1)[1].replace(",", ""))
    tiny_engine(folder, tiny_cache(), max_context=most)
    with pytest.raises(CapacityError):
        tiny_engine(folder, tiny_cache(), max_context=most + PAGE_TOKENS)


def test_a_processor_by_its_number_is_planned_for_as_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    one, other = (
        plan_report(
            str(folder), tiny_cache(), context=500, device=device, sequences=1, memory=None, dtype=None, prefill="exact"
        )
        for device in ("cpu", "cpu:0")
    )
    assert one.plan.parts == other.plan.parts


def test_a_plan_of_16_bits_takes_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs no calibration"):
        plan_report(
            str(tiny_folder(tmp_path)), CacheConfig(method="fp", bits_budget=2.25), context=500, device="cpu", sequences=1,
            memory=None, dtype=None, prefill="exact", calibration=tmp_path / "none",
        )  # fmt: skip


@pytest.mark.parametrize("value", [0, -5, 2**31, True, "many", 1.5])
def test_a_context_that_is_no_number_of_tokens_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(OptionError, match="max_context"):
        tiny_engine(tiny_folder(tmp_path), tiny_cache(), max_context=value)


@pytest.mark.parametrize(
    "text, size",
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19), ("4096", 4096), ("7B", 7), ("2KB", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_another_system_than_linux_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(OptionError, match="runs on Linux"):
        machine.available_memory(torch.device("cpu"))


def test_control_groups_limit_memory_and_cached_files_do_not(tmp_path: Path) -> None:
    def group(folder: str, most: str, used: int, cached: int, names: tuple[str, str, str]) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (most, str(used), f"anon 7\n{names[2]} {cached}\n"), strict=True):
            (tmp_path / folder / ("memory.stat" if name == names[2] else name)).write_text(text)

    two, one = control_groups.MEMORY_FILES[""], control_groups.MEMORY_FILES["memory"]
    group("", "max", 900, 0, two)
    group("slurm", "1000\n", 700, 200, two)
    group("slurm/job", "800\n", 700, 50, two)
    group("memory/box", "600\n", 500, 20, one)
    groups = tmp_path / "cgroup"
    groups.write_text("9:memory:/box/gone\n3:cpuset:/\n0::/slurm/job\n")
    assert sorted(control_groups.memory_left(groups, tmp_path)) == [120, 150, 500]
    assert control_groups.memory_left(tmp_path / "none", tmp_path) == []


@pytest.mark.parametrize("files", ["v2", "v1"])
def test_processors_are_those_that_the_tightest_group_allows(tmp_path: Path, files: str) -> None:
    """A container of 1.5 processors in a slice of 8; -1 and max are no limit."""
    root, groups = tmp_path / "fs", tmp_path / "cgroup"
    top = root if files == "v2" else root / "cpu,cpuacct"
    inner = top / "slice" / "box"
    inner.mkdir(parents=True)
    groups.write_text("0::/slice/box\n" if files == "v2" else "4:cpu,cpuacct:/slice/box\n")
    for folder, quota in ((top, -1), (top / "slice", 800_000), (inner, 150_000)):
        if files == "v2":
            (folder / "cpu.max").write_text(f"{quota if quota > 0 else 'max'} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert control_groups.processors(groups, root) == 1.5
    groups.write_text("0::/\n" if files == "v2" else "4:cpu,cpuacct:/\n")
    assert control_groups.processors(groups, root) is None


def test_threads_are_settled_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, quota, wanted in (
        ({}, None, {"GOMP_SPINCOUNT": "1000"}),
        ({}, 0.2, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}),
        ({"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}, 0.5, {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}),
        ({"GOMP_SPINCOUNT": "5"}, 9999.0, {"GOMP_SPINCOUNT": "5"}),
    ):
        monkeypatch.setattr(cores, "processors", lambda quota=quota: quota)
        monkeypatch.setattr(cores.os, "environ", environment := dict(found))
        cores.settle_threads()
        assert environment == wanted


def test_weights_in_blocks_are_planned_for_by_name() -> None:
    """Q4_K: 5 bits a weight on a GPU, 4.625 on a CPU, and what is expanded of it at a time."""
    cache, numbers = CacheConfig(group_size=128), ALIASES["mistral-7b"].config.num_parameters
    options: dict[str, Any] = {"sequences": 1, "memory": None, "dtype": None, "prefill": "exact"}
    for device, bits, expanded in (("4090", 5.0, EXPANDED_BYTES), ("cpu", 4.625, 0)):
        names = ("mistral-7b", "mistral-7b:Q4_K")
        dense, blocks = (plan_report(name, cache, context=1280, device=device, **options).plan.parts for name in names)
        assert dense["weights"] == pytest.approx(2 * numbers, rel=1e-4)
        assert blocks["weights"] == pytest.approx(bits / 8 * numbers, rel=1e-3)
        assert blocks["workspace"] - dense["workspace"] == expanded
    fits = [plan_report(name, cache, context=1_000_000, device="4090", **options).plan.fits for name in names]
    assert fits == [False, True]


def test_sequences_share_the_pages_of_one_context_or_of_all_their_tokens(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, num_layers=1)
    options: dict[str, Any] = {"max_context": 9000, "max_sequences": 3}
    shared, apart = (tiny_engine(folder, tiny_cache(), **options, total_tokens=total) for total in (None, 27000))
    for engine in (shared, apart):
        planned = sum(size for name, size in engine.parts.plan.parts.items() if name.startswith("cache"))
        assert planned == engine.parts.setup.arena.shape.nbytes
    held = [apart.new_sequence() for _ in range(3)]
    for sequence in held:
        apart.fill(sequence, 9000)
    assert [s.length for s in held] == [9000] * 3
    first, second = shared.new_sequence(), shared.new_sequence()
    shared.fill(first, 9000)
    with pytest.raises(CapacityError):
        shared.fill(second, 9000)
    with pytest.raises(OptionError, match="total_tokens 8,999 are fewer than the 9,000"):
        tiny_engine(folder, tiny_cache(), **options, total_tokens=8999)
    assert tiny_engine(folder, tiny_cache(), max_context=None, total_tokens=100).parts.setup.max_context == 100
    plan = partial(
        plan_report, "mistral-7b", CacheConfig(), context=32768, memory=None, device="h100", dtype=None, prefill="exact"
    )
    one, four = plan(sequences=4), plan(sequences=4, total_tokens=4 * 32768)
    pages = [report.plan.parts["cache: packed pages"] for report in (one, four)]
    assert 3 < pages[1] / pages[0] < 4 and "131,072 in all" in four.table() and "32,768 in all" in one.table()
    with pytest.raises(OptionError, match="total_tokens"):
        plan(sequences=4, total_tokens=10)


def test_what_is_said_of_a_context_beyond_training() -> None:
    model = ALIASES["smollm2-135m"].config
    beyond = partial(beyond_training, model=model)
    assert "the 8,192 that" in beyond(20000, taken=model) and "--rope-scaling chunks:3 would" in beyond(20000, taken=model)
    assert "fine-tuned" in beyond(20000, taken=scaled(model, "yarn:4"))
    cut = beyond(20000, taken=scaled(model, "chunks:4"))
    assert "in chunks it takes 32,768" in cut and "fine-tuned" not in cut and "unreliable" not in cut
    assert "beyond is unreliable" in beyond(40000, taken=scaled(model, "chunks:4"))
    sliding = replace(model, attention_spans=(64,) * model.num_layers)
    assert "chunks" not in beyond_training(20000, sliding, sliding)


def test_what_is_said_of_rope_that_stretches_with_the_text() -> None:
    model = mistral(trained_context=8192)
    told = beyond_training(16384, model, scaled(model, "dynamic:2"))
    assert "(dynamic), which costs accuracy" in told and "chunks" not in told


def test_rope_that_is_stretched_already_is_not_stretched_again() -> None:
    """Llama 3.1's own factors would silently be lost."""
    assert scaled(mistral(), "linear:4").trained_context == 4 * 32768
    over = scaled(mistral(), "yarn:4:16384")
    assert (over.rope.original_context, over.rope.factor, over.trained_context) == (16384, 4.0, 65536)
    for text, why in (("yarn:4:99999", "up to 32,768"), ("yarn:4:x", "'x' is not"), ("linear:4:9", "'4:9' is not a number")):
        with pytest.raises(OptionError, match=why):
            scaled(mistral(), text)
    with pytest.raises(OptionError, match=r"stretches its RoPE itself \(llama3\)"):
        scaled(ALIASES["llama-3.1-8b"].config, "linear:4")


@pytest.mark.parametrize("text", ["", "80 GiBs", "-1GiB", "1e3", "9" * 400, "GiB", "١GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="not a size"):
        parse_bytes(text)


@given(text=st.text(max_size=12) | st.from_regex(r"[0-9.]{1,400}[KMGT]?i?B?", fullmatch=True))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_bytes(text)
    except OptionError:
        return
    assert size >= 0


@pytest.mark.parametrize("context", [1, 1_000_000, 2**31 - 1])
def test_a_report_for_any_context_is_json_and_a_table(tmp_path: Path, context: int) -> None:
    options = {"sequences": 1, "memory": "80GiB", "device": "h100", "dtype": None, "prefill": "exact"}
    report = plan_report(str(tiny_folder(tmp_path)), tiny_cache(), context=context, **options)
    found = report.as_dict()
    assert found["total"] == sum(found["parts"].values()) and found["fits"] == (found["total"] <= 80 * 2**30)
    assert "largest context" in report.table()


def test_a_context_of_more_tokens_than_kernels_count_is_refused(tmp_path: Path) -> None:
    options = {"sequences": 1, "device": "h100", "dtype": None, "prefill": "exact"}
    with pytest.raises(OptionError, match="at most 2,147,483,647 tokens"):
        plan_report(str(tiny_folder(tmp_path)), tiny_cache(), context=2**31, memory="80GiB", **options)
    with pytest.raises(OptionError, match="80 bytes: give more, with its unit"):
        plan_report(str(tiny_folder(tmp_path)), tiny_cache(), context=100, memory="80", **options)
    for context, told in ((512, 0), (513, 1)):  # trained for 512
        report = plan_report(str(tiny_folder(tmp_path)), tiny_cache(), context=context, memory="80GiB", **options)
        assert report.table().count("was trained for") == told


def test_a_report_says_how_a_prompt_is_held_and_what_of_it_on_the_host(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, num_heads=32, num_kv_heads=32, num_layers=1)
    options = {"sequences": 1, "device": "a100", "dtype": None, "prefill": "exact"}
    ample = plan_report(str(folder), tiny_cache(), context=1_000_000, memory="80GiB", **options)
    assert "prefill: exact\n" in ample.table() and ample.as_dict()["host_parts"] == {}
    tight = plan_report(str(folder), tiny_cache(), context=1_000_000, memory=str(ample.plan.total * 3 // 4), **options)
    assert tight.plan.form.host_states and tight.plan.form.head_groups > 1 and tight.prefill_seconds > ample.prefill_seconds
    assert f"prefill: {tight.plan.form}\n" in tight.table() and "hidden states of the prompt, host" in tight.table()
    assert tight.as_dict()["prefill"] == str(tight.plan.form) and sum(tight.as_dict()["host_parts"].values()) > 0


@pytest.mark.parametrize("method", ["plain", "rotate", "reorder"])
def test_what_codecs_hold_is_what_is_planned(tmp_path: Path, method: str) -> None:
    """But for the identity of ``plain``, which all layers share, and its means."""
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=6, head_size=64), tiny_cache(method=method))
    held: dict[int, int] = {}
    codecs: list[Any] = [run.codec for runs in engine.parts.setup.method._runs for run in runs]  # type: ignore[attr-defined]
    while codecs:
        one = codecs.pop()
        if isinstance(one, torch.Tensor):
            held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif hasattr(one, "__dataclass_fields__") and not isinstance(one, RopeFrequencies):
            codecs += [getattr(one, name) for name in one.__dataclass_fields__]
    planned = engine.parts.plan.parts["calibration"]
    assert planned <= sum(held.values()) <= planned + 4 * 64 * 64 + 6 * 2 * 2 * 4 * 64
