"""Nothing is timed before this agrees: attention over the cache with the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.errors import SkvqError
from skvq.engine.model_config import FULL_SPAN
from skvq.engine.report import Reporter
from skvq.engine.stress import fill_fast, last_token_step

GATE_TOKENS = 3000


GATE_ERROR = 0.02
"""Largest relative error of attention against float32 over what the cache holds; 16-bit kernels have about 0.003."""


def random_query(setup: CacheSetup, heads: int) -> Tensor:
    """[1, 1, H, D] in the cache's dtype."""
    shape = setup.arena.shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, heads, shape.head_size, dtype=torch.float32, generator=generator).to(shape.dtype).to(setup.device)


def gate(setup: CacheSetup, heads: int, tokens: int, report: Reporter) -> float:
    """Error of the first layer's attention against float32 over the cache as it unpacks. Raises SkvqError if it is wrong."""
    with SequenceCache(setup) as sequence:
        fill_fast(sequence, tokens, seed=1, vocab=256, report=report)
        q = random_query(setup, heads)
        out, _ = setup.method.attend(0, q, last_token_step(sequence))
        keys, values, _ = (t.float() for t in sequence.window(0, sequence.length))
        if sequence.packed:
            old_keys, old_values = sequence.stage(0, 0, sequence.packed)
            keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
        keys, values = (t.transpose(0, 1) for t in (keys, values))
        expected, _ = setup.rope.distances.attend(q[0].float(), sequence.length - 1, keys, values, 0, FULL_SPAN)
        error = float((out[0].float() - expected).norm() / expected.norm())
    if not error < GATE_ERROR:
        raise SkvqError(
            f"attention is off by {error:.2%} from float32 over {tokens:,} tokens: nothing is measured; please report it"
        )
    return error
