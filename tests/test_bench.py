"""``skvq bench decode`` and ``prefill``: the contract of their JSON, the gate, what a user is told."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny import tiny_folder
from torch import Tensor

from skvq.cli import main
from skvq.commands.bench import _bare
from skvq.engine.cache import SequenceCache
from skvq.engine.config import METHODS, CacheConfig
from skvq.engine.errors import ModelError, SkvqError
from skvq.engine.generate import Engine
from skvq.engine.methods import CacheMethod
from skvq.engine.model_config import FULL_SPAN, ModelConfig
from skvq.engine.report import Quiet
from skvq.engine.stress import bare_setup
from skvq.engine.trials import bench as bench_module
from skvq.engine.trials.bench import SPARE, bench_attention, filled
from skvq.engine.trials.bench_gate import gate
from skvq.engine.trials.bench_rows import DecodeRow
from skvq.engine.trials.soak import SHAPE
from skvq.kernels.interface import Step
from skvq.kernels.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")
CONTRACT = {"ctx", "ms_per_token", "attention_ms", "tokens_per_s", "gbps", "share_of_copy", "peak_bytes"}


def bench(*args: object) -> Result:
    options = ("--backend", "reference", "--group-size", 32, "--window", 16)
    return CliRunner().invoke(main, ["bench", *map(str, (*args, *options))], catch_exceptions=False)


def results(*args: object) -> list[dict[str, Any]]:
    """Rows of a good run, from the last line of stdout, which is all there is there."""
    result = bench(*args, "--json")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["device"] and found["copy_gbps"] > 0
    rows: list[dict[str, Any]] = found["results"]
    return rows


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_json_holds_what_the_contract_says(tmp_path: Path, kind: str) -> None:
    rows = results(kind, "--shape", tiny_folder(tmp_path), "--ctx", "100,600")
    assert [row["ctx"] for row in rows] == [100, 600]
    for row in rows:
        assert set(row) >= CONTRACT and all(row[name] > 0 for name in CONTRACT)
        assert row["ms_per_token"] * row["tokens_per_s"] == pytest.approx(1000)
    if kind == "decode":
        assert all(row["sdpa_ms"] > 0 for row in rows)


def test_a_disturbed_measurement_is_repeated_and_keeps_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention longer than its step was disturbed. It is measured once more, over what the steps have written by then."""

    def steps(engine: Engine, sequence: SequenceCache) -> float:
        for _ in range(SPARE):
            engine.decode_step([sequence], [0])
        return 1e-9

    def attention(sequence: SequenceCache, config: ModelConfig, copy: float) -> DecodeRow:
        measured.append(sequence.length)
        return own(sequence, config, copy)

    measured: list[int] = []
    own = bench_module._attention_row
    monkeypatch.setattr(bench_module, "step_seconds", steps)
    monkeypatch.setattr(bench_module, "_attention_row", attention)
    (row,) = results("decode", "--shape", tiny_folder(tmp_path), "--ctx", 100)
    assert measured == [100, 100 + SPARE] and row["ctx"] == 100


def test_json_says_what_was_measured(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"layers": 2, "window": 16, "rope_scaling": None}
    cases: dict[tuple[object, ...], dict[str, Any]] = {
        (): {"method": "rotate", "key_bits": 2.0, "value_bits": 2.0, "group_size": 32},
        ("--method", "fp"): {"method": "fp"},
        ("--method", "plain", "--bits-budget", 3): {"method": "plain", "bits_budget": 3.0, "group_size": 32},
    }
    for more, wanted in cases.items():
        for alone in ((), ("--attention-only",)):
            found = json.loads(bench("decode", "--shape", tiny_folder(tmp_path), "--ctx", 64, "--json", *more, *alone).stdout)
            assert {**found, **shape, **wanted} == found and ("key_bits" in found) == (wanted["method"] != "fp")


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_peak_is_of_each_row_and_not_of_what_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    order: list[str] = []
    compared = "sdpa_seconds" if kind == "decode" else "dense_seconds"
    for name, found in (("reset_peak", None), ("peak_bytes", 1), (compared, 1.0)):
        monkeypatch.setattr(bench_module, name, lambda *args, name=name, found=found: order.append(name) or found)
    results(kind, "--model", tiny_folder(tmp_path), "--dummy-weights", "--ctx", "40,30", "--method", "fp")
    assert order == ["reset_peak", "peak_bytes", compared] * 2


def test_attention_alone_says_that_there_was_no_step(tmp_path: Path) -> None:
    (row,) = results("decode", "--shape", tiny_folder(tmp_path), "--ctx", 300, "--attention-only", "--layers", 1)
    assert row["attention_ms"] > 0 and row["ms_per_token"] is None and row["tokens_per_s"] is None


def test_a_cache_without_weights_has_the_spans_of_the_models_layers() -> None:
    config = replace(SHAPE, num_layers=2, attention_spans=(100, FULL_SPAN))
    place = {"device": "cpu", "backend": "reference", "dtype": "auto"}
    cache = {"method": "fp", "key_bits": 2.0, "value_bits": 2.0, "bits_budget": None, "group_size": 32}
    options = {**place, **cache, "window": 16, "sinks": 5, "filters": ()}
    for layers, spans in ((1, (100,)), (3, (100, FULL_SPAN, 100)), (None, (100, FULL_SPAN))):
        assert _bare(config, {**options, "layers": layers}, 300)[1].attention_spans == spans


def test_a_cache_without_weights_has_the_heads_that_the_engine_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "head_size_for", lambda self, own: 64)
    place = {"device": "cpu", "backend": "reference", "dtype": "auto", "layers": 1}
    cache = {"method": "plain", "key_bits": 2.0, "value_bits": 2.0, "bits_budget": None, "group_size": 64}
    options = {**place, **cache, "window": 16, "sinks": 5, "filters": ()}
    setup, config, _ = _bare(replace(SHAPE, head_size=48), options, 300)
    assert setup.arena.shape.head_size == config.head_size == 64 and config.own_head_size == 48


def test_bench_does_not_download_where_it_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hub is asked for at the hub, but with --no-download."""
    asked: list[str] = []

    def download(model: str, *args: object) -> None:
        asked.append(model)
        raise ModelError("no network here")

    monkeypatch.setattr("skvq.loaders.hub.fetch", download)
    for kind in (("decode", "--attention-only"), ("planted",)):
        assert bench(*kind, "--shape", "no/such", "--no-download").exit_code == 2 and not asked
        assert bench(*kind, "--shape", "no/such").exit_code == 2 and asked.pop() == "no/such"


@pytest.mark.parametrize("kind", [("decode", "--attention-only"), ("planted",)])
@pytest.mark.parametrize("method", METHODS)
def test_attention_alone_runs_on_the_kernels_that_are_used(tmp_path: Path, kind: tuple[str, ...], method: str) -> None:
    """On the backend that is the default, with made-up bases of heads."""
    words = ["bench", *kind, "--shape", tiny_folder(tmp_path), "--ctx", 600, "--method", method, "--group-size", 32]
    if kind == ("planted",) and method == "fp":
        words += ["--window", 16]
    found = CliRunner().invoke(main, [*map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr


def test_the_ceiling_is_printed_before_the_first_row(tmp_path: Path) -> None:
    lines = bench("decode", "--shape", tiny_folder(tmp_path), "--ctx", 64, "--attention-only").stdout.splitlines()
    assert lines[0].startswith("ceiling: a copy reads and writes") and "64 tokens" in lines[1] and "of copy" in lines[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "either --model"),
        (("--model", "a", "--shape", "b"), "either --model"),
        (("--shape", "FOLDER", "--layers", "1"), "--attention-only"),
        (("--shape", "FOLDER", "--attention-only", "--calibration", "/nowhere"), "--calibration"),
        (("--shape", "FOLDER", "--attention-only", "--rope-scaling", "nonsense"), "nonsense"),
        (("--shape", "FOLDER", "--ctx", "64", "--calibration", "/nowhere"), "/nowhere"),
        (("--shape", "FOLDER", "--rope-scaling", "nonsense"), "nonsense"),
        (("--shape", "no/such", "--attention-only", "--no-download"), "no/such"),
        (("--shape", "FOLDER", "--ctx", "many"), "list of numbers"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    folder = str(tiny_folder(tmp_path))
    result = bench("decode", *(folder if a == "FOLDER" else a for a in args))
    assert result.exit_code == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1 and said in result.stderr


def test_attention_is_measured_within_each_layers_span() -> None:
    """And so are the bytes that it reads."""
    place: dict[str, Any] = {"backend": Reference(), "dtype": torch.float32, "device": torch.device("cpu")}
    config, asked = replace(SHAPE, num_layers=2, attention_spans=(100, FULL_SPAN)), []
    setup = bare_setup(config, CacheConfig(), max_context=1000, max_sequences=1, **place)
    method = copy(setup.method)
    method.attend = lambda layer, q, step: asked.append((layer, step.span)) or setup.method.attend(layer, q, step)
    [row] = bench_attention(replace(setup, method=method), config, [700], Quiet()).rows
    assert set(asked) == {(0, 100), (1, FULL_SPAN)} | {(0, FULL_SPAN)}  # the last is the gate's
    with filled(setup, 700, Quiet()) as sequence:
        assert row.gbps * 1e6 * row.attention_ms == pytest.approx(sequence.nbytes * (100 + 700) / 1400)


class Wrong:
    """A cache method whose attention is off by a twentieth."""

    def __init__(self, right: CacheMethod) -> None:
        self._right = right
        self.pack, self.unpack, self.origin = right.pack, right.unpack, right.origin

    def at(self, dropped: int) -> Wrong:
        return self

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        out, lse = self._right.attend(layer, q, step)
        return 1.05 * out, lse


@pytest.mark.parametrize("method", ["rotate", "reorder", "plain", "fp"])
def test_nothing_is_measured_where_attention_is_wrong(method: str) -> None:
    cache = CacheConfig(method=method, group_size=32, window=100)
    place: dict[str, Any] = {"backend": Reference(), "dtype": torch.float32, "device": torch.device("cpu")}
    setup = bare_setup(SHAPE, cache, max_context=1000, max_sequences=1, **place)
    assert gate(setup, SHAPE.num_heads, 700, Quiet()) < 0.005
    with pytest.raises(SkvqError, match="nothing is measured"):
        gate(replace(setup, method=Wrong(setup.method)), SHAPE.num_heads, 700, Quiet())
