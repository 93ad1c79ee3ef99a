"""The choice of bits by layer: within the budget, and the best there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import tiny_config

from skvq.engine.allocate import as_layer_bits, choose_bits, fullest, in_steps
from skvq.engine.config import BITS, CacheConfig
from skvq.engine.errors import OptionError
from skvq.engine.planner import Planner, Room
from skvq.engine.sizes import arena_shape, bits_per_element, fullest_choices
from skvq.kernels.layout import stored_bits

WIDTHS = (1.5, 2.0, 3.0, 4.0)


def by_brute_force(losses: list[list[float]], code_bits: float) -> float:
    """Least sum of losses within the budget."""
    best = float("inf")
    for picks in itertools.product(range(len(WIDTHS)), repeat=len(losses)):
        if sum(stored_bits(WIDTHS[j]) for j in picks) <= code_bits * len(losses) + 1e-9:
            best = min(best, sum(row[j] for row, j in zip(losses, picks, strict=True)))
    return best


@settings(max_examples=200, deadline=None)
@given(
    losses=st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=6),
    code_bits=st.floats(1.6, 4.5),
)
def test_the_choice_is_the_optimum_and_within_the_budget(losses: list[list[float]], code_bits: float) -> None:
    chosen = choose_bits(losses, WIDTHS, code_bits)
    assert sum(map(stored_bits, chosen)) <= code_bits * len(losses) + 1e-6
    found = sum(row[WIDTHS.index(bits)] for row, bits in zip(losses, chosen, strict=True))
    assert found == pytest.approx(by_brute_force(losses, code_bits), abs=1e-12)


@given(items=st.integers(1, 40), code_bits=st.floats(1.6, 9.0))
def test_nothing_is_fuller_than_the_fullest(items: int, code_bits: float) -> None:
    """What is left over is less than any item could still use, and no multiset of widths comes closer."""
    room = int(code_bits * 5 * items + 1e-6)
    reachable = {0}
    for _ in range(items):
        reachable = {total + in_steps(bits) for total in reachable for bits in BITS if total + in_steps(bits) <= room}
    assert sum(map(in_steps, fullest(items, BITS, code_bits))) == max(reachable)


@pytest.mark.parametrize("budget", [1.85, 2.0, 2.05, 2.25, 2.5, 3.1])
def test_a_choice_never_takes_more_than_the_plan(budget: float) -> None:
    """Any choice within the budget, with trits or without, fits what is planned before it is known."""
    model = tiny_config(num_layers=3, num_heads=2, num_kv_heads=2, head_size=64)
    open_cache = CacheConfig(bits_budget=budget)
    generator = torch.Generator().manual_seed(int(100 * budget))
    for context in (1, 400, 1410, 1430, 5000):
        room = Room(memory=2**40, weight_bytes=1)
        planner = Planner(model=model, cache=open_cache, room=room, sequences=2, dtype=torch.float16)
        bound = planner.plan(context)
        assert bound.bits_per_element <= budget + 1e-9
        for widths in (WIDTHS, WIDTHS[1:]):
            if stored_bits(widths[0]) <= open_cache.code_bits + 1e-9:
                losses = torch.rand(12, len(widths), generator=generator).tolist()
                chosen = choose_bits(losses, widths, open_cache.code_bits)
                cache = CacheConfig(bits_budget=budget, layer_bits=as_layer_bits(chosen, 2))
                assert bits_per_element(cache, model) <= budget + 1e-9
                assert replace(planner, cache=cache).plan(context).total <= bound.total


def test_uniform_bits_of_every_layer_are_what_one_pair_says() -> None:
    model = tiny_config(num_layers=3)
    shapes = [
        arena_shape(model, c, max_context=3000, max_sequences=2, dtype=torch.float16)
        for c in (
            CacheConfig(key_bits=2, value_bits=1.5, group_size=32),
            CacheConfig(layer_bits=((2, 1.5),) * 3, group_size=32),
        )
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits_budget": 1.7}, ("1.7", "1.85", "larger budget")),
        ({"bits_budget": 2.0, "group_size": 32}, ("2 is below 2.1",)),
        ({"bits_budget": 2.0, "key_bits": 3}, ("bits_budget 2", "key_bits 3", "one or the other")),
        ({"bits_budget": "two"}, ("'two'",)),
        ({"bits_budget": float("nan")}, ("nan",)),
        ({"bits_budget": True}, ("True",)),
        ({"bits_budgets": 2.0}, ("bits_budget",)),
        ({"layer_bits": ((2, 2), (2, 5))}, ("5",)),
        ({"layer_bits": ((2, 2),)}, ("1 layers", "2")),
        ({"layer_bits": ((2, 2), ((2, 2), (3, 2), (4, 2)))}, ("3 heads in layer 1", "2 kv heads")),
        ({"layer_bits": ((2, 2), ((2, 2), (3,)))}, ("pair",)),
        ({"layer_bits": (((2, 2), (3, 2)), (2, 2)), "method": "reorder"}, ("layer 0", "reorder", "span heads")),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as error:
        CacheConfig(**options).fitted(tiny_config(num_layers=2, head_size=64))
    assert all(word in str(error.value) for word in words), error.value


def test_sixteen_bits_have_no_use_for_a_budget() -> None:
    cache = CacheConfig(method="fp", bits_budget=2.0)
    assert not cache.is_open and fullest_choices(cache, tiny_config()) == (cache,)
