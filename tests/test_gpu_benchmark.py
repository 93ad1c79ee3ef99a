"""``benchmarks/gpu/run_all.py`` on a GPU that is not there: every step is gone through, in small, and nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if not hasattr(triton, "JITFunction"):
    pytest.skip("Triton without a compiler", allow_module_level=True)

from card import CheckedGraphs, card  # noqa: E402
from cases import make_case  # noqa: E402
from emulated import emulated  # noqa: E402
from scripts import loaded  # noqa: E402
from tiny import tiny_folder  # noqa: E402

from skvq.kernels import ops  # noqa: E402
from skvq.kernels.triton_gpu import blocks, matvec  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script() -> ModuleType:
    return loaded("gpu/run_all")


def test_a_million_tokens_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part on the CPU, in two calls: the second does what the first has not done."""
    monkeypatch.setenv("SKVQ_CACHE", str(tmp_path / "cache"))
    million = loaded("gpu/million")
    monkeypatch.setattr(million, "STEPS", 3)
    monkeypatch.setattr(million, "WARM_UP", 4)
    model, output = str(tiny_folder(tmp_path / "model", head_size=64, vocab_size=300, num_layers=3)), tmp_path / "found.json"
    words = ["--model", model, "--llama", model, "--context", "3000", "--layers", "2", "--device", "cpu", "--method", "plain"]
    million.main([*words, "--output", str(output), "--parts", "mistral,planted"])
    first = json.loads(output.read_text())
    assert first["planted 3000 2 layers"]["found"] == first["planted 3000 2 layers"]["of"] == len(million.DEPTHS)
    million.main([*words, "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["mistral 3000"] == first["mistral 3000"] and not {k: v for k, v in found.items() if "error" in v}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"]
    read, held, command = (found[name] for name in ("prefill 3000 2 layers", "llama 3000", "command 3000 2 layers"))
    assert read["tokens"] == 3000 - 7 and read["layers"] == 2 and read["seconds_of_all_layers"] == 1.5 * read["seconds"]
    assert held["tokens"] == 3000 and held["ms_per_token"] > 0 and held["planned"] > held["sequence_bytes"]
    assert command["summary"]["prompt_tokens"] >= 3000 - million.SLACK and command["summary"]["new_tokens"] == 8


def once(work: Any, repeats: int = 0) -> tuple[float, float]:
    work()
    return 1e-3, 0.0


@pytest.mark.slow
def test_every_step_runs(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"STEPS": 2, "WARM_UP": 1, "OUTGROWN": 1.0}
    small |= {"CONTEXTS": (300,), "PREFILL_CONTEXTS": (256,), "BLOCKS_CONTEXT": 1240}
    small |= {"READ_CONTEXTS": (200,), "WINDOW": 100, "CALIBRATION_TOKENS": 64}
    small["SHAPES"] = {"mistral-7b": (1, 4), "llama-2-7b": (2, 1)}
    monkeypatch.setattr(script.cudnn, "BLOCK_TOKENS", 64)
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "MODEL", str(tiny_folder(tmp_path / "model", head_size=128, num_layers=1)))
    monkeypatch.setattr(script, "METHOD", "plain")
    monkeypatch.setattr(script, "make_case", lambda **options: make_case(**(options | {"packed": (1,)})))
    monkeypatch.setattr(script, "check_fused", lambda dtype: {"good": True})  # ``test_ptx`` does
    monkeypatch.setattr(script, "TIMED", script.TIMED[:1])
    for name in ("other_gates", "sweep"):
        monkeypatch.setattr(script, name, lambda *rest: None)
    for name in ("time_packing", "copy_bandwidth"):
        monkeypatch.setattr(script, name, lambda *rest, **named: {"gbps": 1.0, "good": True})
    monkeypatch.setattr(script, "gate_packing", lambda *rest: True)  # minutes each
    monkeypatch.setattr(script, "seconds_of", once)
    few = script.matvec_sweep.matvec.Tiling(rows=16, warps=1, depth=1)  # programs of the engine's matrices
    monkeypatch.setattr(script.matvec_sweep.matvec, "tiling_of", lambda vectors, outs, width, gated: few)
    for module, name in (
        (script.matvec_sweep, "measure"),
        (script.matvec_sweep, "measure_blocks"),
        (script.expert_layers, "measure"),
    ):
        monkeypatch.setattr(module, name, lambda *rest: None)  # tested by themselves
    monkeypatch.setattr(ops, "CudaGraphs", CheckedGraphs)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with card((9, 0)), emulated(90):
        log = script.Log(tmp_path / "found.json", time.monotonic() + 1e6, {})
        script.measure(log)
        script.table(log.results)
    found = json.loads((tmp_path / "found.json").read_text())
    bad = {k: v for k, v in found.items() if "error" in v or (k.startswith("gate ") and not script.is_green(v))}
    assert not bad
    assert found["gate prefill blocks torch.bfloat16"]["cudnn"] and found["prefill attention 256 product"]["cudnn"]
    assert all(found[f"prefill attention 256 {how}"]["same"] for how in ("flash", "cudnn", "product"))
    assert found["gate subnormals"] == {"good": True} and "decode step 300 graph" in found


def keeping_step() -> tuple[dict[str, Any], Any]:
    """A step of the script that does its work and keeps the result, and where."""
    found: dict[str, Any] = {}

    def step(name: str, work: Any) -> Any:
        found[name] = work()
        return found[name]

    return found, step


def test_matrices_are_measured_behind_their_gates(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of product in small, what the product takes and a sweep; what is wrong is not timed."""
    module = script.matvec_sweep
    shapes = {"a": ("norm_linear", 40, 48), "b": ("linear_add", 24, 64), "c": ("norm_swiglu", 48, 40)}
    for name, value in {"SHAPES": shapes, "ROWS": (8,), "WARPS": (1,), "DEPTHS": (1, 2), "OUTGROWN": 1.0}.items():
        monkeypatch.setattr(module, name, value)
    few = module.matvec.Tiling(rows=8, warps=1, depth=1)
    monkeypatch.setattr(module.matvec, "tiling_of", lambda vectors, outs, width, gated: few)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found, step = keeping_step()
    with card((9, 0)), emulated(90):
        module.measure(step, once, (1, 2))
        module.sweep(step, once, ("a",))
        assert all(value["good"] for name, value in found.items() if name.startswith("gate "))
        assert {"matvec a", "matvec a x2", "matvec c x2", "sweep matvec a x1 rows 8 warps 1 depth 2 early"} <= set(found)
        assert found["matvec b"]["gbps"] > 0 and found["matvec b"]["linear"]["ms"] > 0
        found.clear()
        monkeypatch.setattr(module.Product, "fused", lambda self, weight, tiling: self.apart(module.TorchOps(), weight) + 1)
        module.measure(step, once, (1,))
        assert len(found) == 3 and not any(value["good"] for value in found.values())


@pytest.mark.slow
def test_experts_are_measured_behind_their_gates(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script.expert_layers
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_heads": 1}
    for name, value in {"SHAPE": shape, "COUNT": 3, "CHOSEN": 2, "TOKENS": (1, 17)}.items():
        monkeypatch.setattr(module, name, value)
    few = matvec.Tiling(rows=16, warps=1, depth=1)
    monkeypatch.setattr(matvec, "tiling_of", lambda vectors, outs, width, gated: few)
    monkeypatch.setattr(blocks, "rows_of", lambda vectors, outs, gated, bits: 8)
    monkeypatch.setattr(blocks, "WARPS", 1)
    found, step = keeping_step()
    with card((9, 0)), emulated(90):
        module.measure(step, once)
        assert all(value["good"] for name, value in found.items() if name.startswith("gate ")), found
        assert found["experts Q4_K x1"]["gbps"] > 0 and found["experts bfloat16 x17"]["one_by_one_ms"] > 0
        found.clear()
        monkeypatch.setattr(module.TritonOps, "after_attention_experts", lambda self, x, *rest: x)
        monkeypatch.setattr(module, "KINDS", ("",))
        module.measure(step, once)
        assert len(found) == 2 and not any(value["good"] for value in found.values())


def test_quantized_blocks_are_measured_behind_their_gates(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script.matvec_sweep
    shapes = {"a": ("norm_linear", 40, 64), "b": ("linear_add", 24, 96), "c": ("norm_swiglu", 48, 256)}
    for name, value in {"SHAPES": shapes, "OUTGROWN": 1.0, "MANY": 30}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found, step = keeping_step()
    with card((9, 0)), emulated(90):
        module.measure_blocks(step, once, ("a", "b"), ("Q4_0", "Q8_0"))
        module.measure_blocks(step, once, ("c",), ("Q4_K",))
        assert all(value["good"] for name, value in found.items() if name.startswith("gate "))
        assert {"blocks Q4_0 a", "blocks Q8_0 b x4", "blocks Q4_K c", "blocks Q4_0 a x30"} <= set(found)
        found.clear()
        monkeypatch.setattr(module.BlockProduct, "fused", lambda self, matrix: self.residual)
        module.measure_blocks(step, once, ("c",), ("Q4_K",))
        assert (
            not any(value["good"] for name, value in found.items() if name.startswith("gate ")) and "blocks Q4_K c" not in found
        )


def test_a_failing_step_is_recorded_and_tried_once_more(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "found.json", []

    def work() -> None:
        calls.append(json.loads(path.read_text())["gate x"]["error"])  # what a next call finds, should this one die
        raise RuntimeError("no")

    monkeypatch.setattr(script, "card_answers", lambda: True)
    for _ in range(3):
        known = json.loads(path.read_text()) if path.exists() else {}
        assert not script.gate(script.Log(path, time.monotonic() + 100, known), "x", work)
    assert len(calls) == 2 and json.loads(path.read_text())["gate x"] == {"error": "RuntimeError: no", "tries": 2}
    log = dataclasses.replace(script.Log(path, 0.0, {}), deadline=time.monotonic())
    with pytest.raises(script.OutOfTime):
        log.step("y", work)
    monkeypatch.setattr(script, "card_answers", lambda: False)
    with pytest.raises(script.BrokenContext):
        script.Log(path, time.monotonic() + 100, {}).step("gate x", work)


@pytest.mark.parametrize("changed", [{}, {"commit": "0123456"}, {"versions": {"torch": "1.0"}}, None])
@pytest.mark.parametrize("name", ["run_all", "million"])
def test_only_results_of_this_commit_and_these_versions_are_known(
    name: str, changed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, path, seen = loaded(f"gpu/{name}"), tmp_path / "found.json", []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "cpu")
    stamped = module.stamp("cpu", "torch", "triton")
    if changed is not None:
        path.write_text(json.dumps(stamped | {"copy": {"gbps": 1.0}} | changed))
    monkeypatch.setattr(sys, "argv", ["", "--output", str(path)])
    if name == "run_all":
        monkeypatch.setattr(module, "measure", lambda log: seen.append(log.results))
        module.main()
    else:
        monkeypatch.setattr(module, "measure", lambda task, wanted, path, known, deadline: seen.append(known) or True)
        module.main(["--output", str(path), "--device", "cpu"])
    assert seen == [stamped | ({"copy": {"gbps": 1.0}} if changed == {} else {})]
    told = capsys.readouterr().err
    assert (str(path) in told and "measured anew" in told and told.count("\n") == 1) if changed else not told
