"""A million tokens on a card, whole: read, held, decoded and found again, each beside what the plan says.

``python benchmarks/gpu/million.py [--parts prefill,command] [--layers 4] [--seconds 520]``. Results are written after every
part, and a second call of the same commit and versions goes on with those that are missing. Dummy weights: nothing is
downloaded. JSON comes last on stdout.

    prefill  ``--model`` reads the context exactly with ``--layers`` of its layers (0: all) and decodes some tokens
    llama    the arena of Llama-2-7B at K2 V1.5 g128, filled to the context, decoded; its peak against 80 GB
    mistral  the same of ``--model`` at K2 V2 g128
    planted  keys planted at every depth of a random cache of ``--layers`` layers, found by attention
    command  ``skvq-run --dummy-weights`` on a file of that many bytes, a token each
"""

from __future__ import annotations

import argparse
import gc
import json
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from this_tree import ROOT  # before anything of skvq

# isort: split
import torch
from config_json import write_config
from stamp import go_on, stamp, write

from skvq.engine.cards import this_machine
from skvq.engine.config import CacheConfig
from skvq.engine.embedding import nbytes_of
from skvq.engine.generate import Engine
from skvq.engine.machine import pick_device, pick_dtype
from skvq.engine.model_config import ModelConfig
from skvq.engine.plan_report import predicted_decode, predicted_prefill
from skvq.engine.prefill_form import CHUNK_TOKENS, PrefillForm
from skvq.engine.report import StderrReporter
from skvq.engine.stress import bare_setup
from skvq.engine.trials.planted import planted, rows
from skvq.kernels.registry import get_backend
from skvq.loaders.hub import config_of

COMMAND = """import importlib.util, pathlib, sys
root = pathlib.Path({root!r})  # this tree, whatever is installed here
spec = importlib.util.spec_from_file_location("skvq", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["skvq"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["skvq"])
from skvq.cli import run
run(prog_name="skvq-run")
"""
DEPTHS = (0, 0.1, 1, 10, 25, 50, 75, 90, 99, 99.9, 100)
LIMIT = 80e9  # bytes of the card that a million tokens of Llama-2-7B are to fit
STEPS, WARM_UP = 160, 320  # as in ``run_all.py``: a tile is packed in the timed steps, and two before
SLACK = 64  # tokens of the context that ``command`` leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is measured, and where."""

    model: str
    llama: str
    context: int
    layers: int
    method: str
    device: torch.device
    dtype: torch.dtype
    folder: Path  # for configs and texts

    def cache(self, value_bits: float) -> CacheConfig:
        group = min(128, config_of(self.model).head_size)
        return CacheConfig(method=self.method, key_bits=2, value_bits=value_bits, group_size=group)

    def short(self) -> tuple[Path, ModelConfig]:
        """``model`` with ``layers`` of its layers: a folder that holds its config, and the config."""
        config = config_of(self.model)
        count = min(self.layers, config.num_layers) or config.num_layers
        config = replace(config, num_layers=count, attention_spans=config.attention_spans[:count])
        return write_config(self.folder / f"{count} layers", config), config

    def engine(self, model: str | Path, value_bits: float, prefill: str) -> Engine:
        return Engine.load(
            model, max_context=self.context, max_sequences=1, cache=self.cache(value_bits), dummy_weights=True,
            device=str(self.device), prefill=prefill, prefix_cache=False,
        )  # fmt: skip


class Memory:
    """The card's memory from here on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wait()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def found(self, plan: Any) -> dict[str, Any]:
        """Bytes at the peak, of tensors and of the card as a whole, and the plan's; ``cuda`` is what is nobody's tensor."""
        planned = {"planned": plan.total, "planned_parts": plan.parts, "planned_host": plan.host_total, "form": str(plan.form)}
        if self.device.type != "cuda":
            return planned
        free, total = torch.cuda.mem_get_info(self.device)
        reserved, peak = torch.cuda.max_memory_reserved(self.device), torch.cuda.max_memory_allocated(self.device)
        cuda = total - free - torch.cuda.memory_reserved(self.device)
        return planned | {
            "peak_allocated": peak,
            "peak_reserved": reserved,
            "used_of_card": total - free,
            "cuda": cuda,
            "peak": peak + cuda,
            "peak_to_plan": (peak + cuda) / plan.total,
        }


def decode(engine: Engine, sequence: Any, memory: Memory) -> dict[str, float]:
    """Milliseconds of a decode step, by the host's clock, packing included."""
    times = []
    for step in range(WARM_UP + STEPS):
        memory.wait()
        start = time.perf_counter()
        logits = engine.decode_step([sequence], [step % 256])
        memory.wait()
        times.append(1e3 * (time.perf_counter() - start))
    assert bool(logits.isfinite().all()), "logits are not finite"
    kept = sorted(times[WARM_UP:])
    return {"ms_per_token": statistics.median(kept), "slowest_ms": kept[-1]}


def measure_prefill(task: Task) -> dict[str, Any]:
    """Exact prefill of the whole context but what is decoded then."""
    card, count = this_machine(task.device, task.dtype), task.context - WARM_UP - STEPS
    folder, config = task.short()
    start = time.perf_counter()
    engine = task.engine(folder, 2.0, "exact")
    loaded = time.perf_counter() - start
    ids = torch.randint(256, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.prefill(ids[:CHUNK_TOKENS]).free()  # untimed: kernels are compiled
    memory = Memory(task.device)
    start = time.perf_counter()
    sequence = engine.prefill(ids)
    memory.wait()
    seconds = time.perf_counter() - start
    form = engine.parts.plan.form_of(config, count, task.dtype)
    whole = config_of(task.model)
    steps = decode(engine, sequence, memory)
    predicted = predicted_prefill(config, card, count, form)
    return {
        "tokens": count,
        "layers": config.num_layers,
        "load_seconds": loaded,
        "seconds": seconds,
        "predicted_seconds": predicted,
        "measured_to_predicted": seconds / predicted,
        "seconds_per_layer": seconds / config.num_layers,
        "seconds_of_all_layers": seconds / config.num_layers * whole.num_layers,
        "predicted_seconds_of_all_layers": predicted_prefill(whole, card, count, form),
        "card": {"bandwidth": card.bandwidth, "flops": card.flops},
        **steps,
        "predicted_ms_per_token": 1e3 * predicted_decode(config, engine.parts.cache, card, task.context, weights_read(engine)),
        **memory.found(engine.parts.plan),
    }


def weights_read(engine: Engine) -> int:
    """Bytes of the weights that a step reads: all but an embedding table of its own."""
    weights = engine.parts.model.weights
    return weights.nbytes - nbytes_of(weights.embedding.tensors) * (not engine.parts.model.config.tie_embeddings)


def measure_decode(task: Task, model: str, value_bits: float) -> dict[str, Any]:
    """A cache filled with random tokens through the real packing path, to the last that leaves room for the steps."""
    card = this_machine(task.device, task.dtype)  # while there is room for it
    start = time.perf_counter()
    engine = task.engine(model, value_bits, "streaming")
    loaded = time.perf_counter() - start
    memory, sequence = Memory(task.device), engine.new_sequence()
    start = time.perf_counter()
    engine.fill(sequence, task.context - WARM_UP - STEPS)
    memory.wait()
    filled = time.perf_counter() - start
    steps = decode(engine, sequence, memory)
    found = memory.found(engine.parts.plan)
    if "peak" in found:
        found["below_80_gb"] = found["peak"] < LIMIT
    predicted = 1e3 * predicted_decode(engine.parts.model.config, engine.parts.cache, card, task.context, weights_read(engine))
    return {
        "tokens": sequence.length,
        "load_seconds": loaded,
        "fill_seconds": filled,
        **steps,
        "predicted_ms_per_token": predicted,
        "measured_to_predicted": steps["ms_per_token"] / predicted,
        "sequence_bytes": sequence.nbytes,
        "bits_per_element": sequence.bits_per_element,
        **found,
    }


def measure_planted(task: Task) -> dict[str, Any]:
    """Every planted key must be found."""
    _, config = task.short()
    backend = get_backend("auto", task.device)
    start = time.perf_counter()
    setup = bare_setup(
        config,
        task.cache(2.0),
        max_context=task.context,
        max_sequences=1,
        backend=backend,
        dtype=task.dtype,
        device=task.device,
    )
    found = planted(setup, config.num_heads, task.context, DEPTHS, seed=0, report=StderrReporter())
    good = sum(f.good for f in found)
    return {"found": good, "of": len(found), "seconds": time.perf_counter() - start, "rows": rows(found)}


def measure_command(task: Task) -> dict[str, Any]:
    """The command as a user types it, in a process of its own."""
    folder, config = task.short()
    text = "\n\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    count = task.context - SLACK
    file = task.folder / "books.txt"
    file.write_text((text * (count // len(text) + 1))[:count])
    code = COMMAND.format(root=str(ROOT))
    cache = task.cache(2.0)
    words = ["--model", str(folder), "--dummy-weights", "--ctx", str(task.context), "-f", str(file), "-n", "8", "--json"]
    words += ["--device", str(task.device), "--method", cache.method, "--group-size", str(cache.group_size)]
    predicted = predicted_prefill(config, this_machine(task.device, task.dtype), count, PrefillForm(prefill="exact"))
    Memory(task.device)  # what this process has cached is free for the other
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"skvq-run ended with {done.returncode}: {done.stderr[-300:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["prompt_tokens"] >= count and told["new_tokens"] == 8, told
    found = {"layers": config.num_layers, "bytes": count, "seconds": seconds, "predicted_prefill_seconds": predicted}
    return found | {"stderr": done.stderr[-600:], "summary": told}


def parts_of(task: Task) -> dict[str, tuple[Callable[[], dict[str, Any]], float]]:
    """What each part does, and the seconds it may need: those of attention on a card of 300 TFLOP/s, and of loading."""
    config, (_, short) = config_of(task.model), task.short()
    reading = 2.0 * config.num_heads * config.head_size * short.num_layers * task.context**2 / 3e14
    return {
        "prefill": (lambda: measure_prefill(task), 40 + reading),
        "llama": (lambda: measure_decode(task, task.llama, 1.5), 90),
        "mistral": (lambda: measure_decode(task, task.model, 2.0), 90),
        "planted": (lambda: measure_planted(task), 60),
        "command": (lambda: measure_command(task), 60 + reading),
    }


def measure(task: Task, wanted: list[str], path: Path, known: dict[str, Any], deadline: float) -> bool:
    """Do the wanted parts that are not done yet; whether all are. What fails is recorded, and tried again by the next call."""
    left = False
    for name in wanted:
        work, needs = parts_of(task)[name]
        key = f"{name} {task.context}" + (f" {task.layers} layers" if name in ("prefill", "planted", "command") else "")
        if "error" not in known.get(key, {"error": ""}):
            continue
        if time.monotonic() + (needs if task.device.type == "cuda" else 0) > deadline:
            print(f"{key}: about {needs:.0f} s, more than is left; call again, or with fewer --layers", flush=True)
            left = True
            continue
        try:
            found = work()
        except Exception as error:  # one part that fails must not hide the others
            found, left = {"error": f"{type(error).__name__}: {str(error)[-400:]}"}, True
        known[key] = found
        write(path, known)
        print(f"{key}: {json.dumps(found)}", flush=True)
        gc.collect()
    return not left


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("prefill", "llama", "mistral", "planted", "command")
    parser.add_argument("--parts", default=",".join(names), help="which, in which order")
    parser.add_argument("--model", default="mistral-7b")
    parser.add_argument("--llama", default="llama-2-7b", help="the model of part llama")
    parser.add_argument("--context", type=int, default=1_048_576)
    parser.add_argument("--layers", type=int, default=4, help="of prefill, planted and command; 0: all")
    parser.add_argument("--method", default="rotate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"unknown parts {', '.join(unknown)}: choose from {', '.join(names)}")
    deadline = time.monotonic() + options.seconds
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    output = options.output or ROOT / "benchmarks/results" / f"million-{name.replace(' ', '-').lower()}.json"
    known = go_on(output, stamp(name, "torch", "triton"))
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            model=options.model, llama=options.llama, context=options.context, layers=options.layers, method=options.method,
            device=device, dtype=pick_dtype("auto", device), folder=Path(folder),
        )  # fmt: skip
        finished = measure(task, wanted, output, known, deadline)
    print(json.dumps({"device": name, "finished": finished, "output": str(output)}))


if __name__ == "__main__":
    main()
