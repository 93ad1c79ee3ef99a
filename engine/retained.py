"""Tokens that leave the window: what filter rules keep goes to the sequence's retained slots, in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skvq.engine.errors import OptionError
from skvq.engine.filters import AttentionSinks, FilterRule, LeavingTokens
from skvq.kernels.interface import FullSlots


def retain(rules: Sequence[FilterRule], full: FullSlots, slot: int, leaving: LeavingTokens, first: int, dropped: int) -> Tensor:
    """Ask the rules; copy what they keep into free retained slots of sequence slot ``slot``. bool [T]: the tokens retained.

    Each rule has slots of its own, in the order of the rules. The tokens begin at place ``first`` of the sequence; ``dropped``
    went before it: positions are kept without them. Nothing here waits for the device.
    """
    positions = (leaving.positions - dropped).int()
    retained = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    start = 0
    for rule in rules:
        slots = slice(start, start + rule.budget)
        start += rule.budget
        if type(rule) is AttentionSinks and first + dropped >= rule.n:
            continue  # a sinks' rule has nothing to say of later tokens, which are nearly all
        held = full.positions[slot, slots]
        wanted = kept_by(rule, leaving) & ~retained
        taken, source = seats(held < 0, wanted)
        full.positions[slot, slots] = torch.where(taken, positions[source], held)
        for kept, new in ((full.keys, leaving.keys), (full.values, leaving.values)):
            here = kept[slot][:, slots]  # [KH, slots, D]
            here.copy_(torch.where(taken[None, :, None], new[source].transpose(0, 1), here))
        retained |= wanted & (wanted.cumsum(0) <= taken.sum())
    return retained


def kept_by(rule: FilterRule, leaving: LeavingTokens) -> Tensor:
    """What the rule keeps, bool [T]. Raises OptionError, naming the rule, if it fails or keeps anything else."""
    try:
        kept: object = rule.keep(leaving)
    except Exception as error:
        raise OptionError(f"filter rule {rule!r}: keep failed: {type(error).__name__}: {error}") from error
    device = leaving.positions.device
    if not isinstance(kept, Tensor) or (kept.dtype, kept.shape, kept.device) != (torch.bool, leaving.positions.shape, device):
        got = f"{kept.dtype} {tuple(kept.shape)} on {kept.device}" if isinstance(kept, Tensor) else type(kept).__name__
        wanted = f"a bool tensor [{len(leaving.positions)}] on {device}"
        raise OptionError(f"filter rule {rule!r}: keep must return {wanted}, got {got}")
    return kept


def seats(free: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Give the tokens of ``wanted`` [T] the slots of ``free`` [S], both in order, while there are any of both.

    Returns which slots are taken, bool [S], and by which token, int64 [S] (any where not taken).

    >>> taken, source = seats(torch.tensor([True, False, True]), torch.tensor([False, True, False, False]))
    >>> taken, source[taken]
    (tensor([ True, False, False]), tensor([1]))
    """
    order = torch.argsort(wanted.byte(), descending=True, stable=True)
    rank = free.cumsum(0) - 1
    return free & (rank < wanted.sum()), order[rank.clamp(0, len(wanted) - 1)]
