"""Rows of the matrices that make queries and keys, where a file has them in another order than RoPE here pairs channels in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skvq.engine.model_config import ModelConfig


def stored_rows(name: str, config: ModelConfig, *, interleaved: bool = False) -> NDArray[np.int64] | None:
    """Stored row of each canonical row of a weight, or None where they are the same: of all that makes no queries or keys.

    interleaved: channels that are turned together lie side by side, as llama.cpp has those of ``llama``, and GLM its own.
    """
    part = name.split(".")[-2]
    if part not in ("q_proj", "k_proj") or not (interleaved or config.rotary_size):
        return None
    size = config.own_head_size
    head = halved_rows(size, config.turned_size, interleaved=interleaved)
    heads = config.num_heads if part == "q_proj" else config.num_kv_heads
    return (np.arange(heads)[:, None] * size + head).reshape(-1)


INTERLEAVED = ("glm",)
"""Families that turn neighbouring channels in Hugging Face's checkpoints."""


def halved_rows(head_size: int, turned: int, *, interleaved: bool) -> NDArray[np.int64]:
    """Stored row of each canonical row of a head of which RoPE turns the first ``turned`` channels: (i, i + turned/2), or if
    ``interleaved`` (2i, 2i + 1), as in a ``llama`` file, whose converter interleaves each head.

    The others are pairs of their own, behind those in each half.

    >>> halved_rows(8, 4, interleaved=False).tolist(), halved_rows(6, 6, interleaved=True).tolist()
    ([0, 1, 4, 5, 2, 3, 6, 7], [0, 2, 4, 1, 3, 5])
    """
    rows = np.arange(head_size)
    pairs = rows[:turned].reshape(-1, 2).T if interleaved else rows[:turned].reshape(2, -1)
    return np.concatenate([pairs, rows[turned:].reshape(2, -1)], axis=1).reshape(-1)
