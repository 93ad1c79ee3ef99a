"""The README's tables of plans: what three models take at 128k, 1M and the largest context on an 80 GB card, and models with
4-bit weights on a 24 GB card.

    python benchmarks/plan_table.py

Markdown on stdout, from the function behind ``skvq plan --json``; nothing is measured, nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from skvq import CacheConfig
from skvq.engine.plan_report import PlanReport, plan_report
from skvq.engine.prefill_form import PrefillForm

MODELS = {"mistral-7b": "Mistral-7B", "llama-2-7b": "Llama-2-7B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
SMALLER = {
    "mistral-7b:Q4_K": "Mistral-7B",
    "llama-3.1-8b:Q4_K": "Llama-3.1-8B",
    "qwen3-4b:Q4_K": "Qwen3-4B",
    "qwen3-30b-a3b:Q4_K": "Qwen3-30B-A3B",
}
VALUE_BITS = (2.0, 1.5)


@dataclass(frozen=True, slots=True)
class Cell:
    """A model, a width of values and a way to read; the context is what changes."""

    model: str
    value_bits: float
    devices: tuple[str, ...] = ("a100", "h100")
    memory: str | None = "79.1GiB"

    def plan(self, context: int, prefill: str, device: str) -> PlanReport:
        cache = CacheConfig(group_size=128, key_bits=2.0, value_bits=self.value_bits)
        options = {"sequences": 1, "memory": self.memory, "dtype": None}
        return plan_report(self.model, cache, context=context, device=device, prefill=prefill, **options)  # type: ignore[arg-type]

    def largest(self, prefill: str) -> int:
        """The longest context that fits."""
        found = self.plan(1280, prefill, self.devices[0]).largest
        return next(iter(found.values()))

    def row(self, context: int, prefill: str) -> str:
        """A line of the table."""
        reports = [self.plan(context, prefill, device) for device in self.devices]
        plan = reports[0].plan
        host = f" + {plan.host_total / 2**30:.0f} host" if plan.host_parts else ""
        times = " | ".join(
            f"{duration(r.prefill_seconds)}, {r.decode_ms:.0f} ms" if r.plan.fits else "does not fit" for r in reports
        )
        name = f"{(MODELS | SMALLER)[self.model]}, K2 V{self.value_bits:g}"
        return f"| {name} | {context:,} | {short(plan.form)} | {plan.total / 2**30:.1f} GiB{host} | {times} |"

    def rows(self) -> list[str]:
        """128k, a million, and the largest each way."""
        million = 2**20
        fits = self.plan(million, "exact", self.devices[0])
        prefill = "exact" if fits.plan.fits else "streaming"
        ways = [(131_072, "exact"), (million, prefill), *((self.largest(p), p) for p in ("exact", "streaming"))]
        return [self.row(*way) for way in ways]


def short(form: PrefillForm) -> str:
    """The form of prefill in few words."""
    groups = f", {form.head_groups} groups" if form.head_groups > 1 else ""
    return f"{form.prefill}{', host' * form.host_states}{groups}"


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Print the tables."""
    print("| model, cache (g128) | context | prefill | memory | A100: prefill, per token | H100 |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        for value_bits in VALUE_BITS:
            print("\n".join(Cell(model, value_bits).rows()))
    print("\n| model, cache (g128) | context | prefill | memory | prefill, per token |")
    print("|---|---|---|---|---|")
    for model in SMALLER:
        card = Cell(model, 2.0, ("4090",), None)
        largest = card.largest("exact")
        print("\n".join(card.row(context, "exact") for context in (131_072, 1_000_000, largest) if context <= largest))


if __name__ == "__main__":
    main()
