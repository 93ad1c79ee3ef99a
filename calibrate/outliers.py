"""Tokens whose keys stand out wherever they occur: sinks that do not sit at the start (KVSink, arXiv 2508.04257)."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.calibrate.stats import SINKS, LayerStats
from skvq.engine.filters import KeyOutliers, stands_out

THRESHOLD = KeyOutliers().threshold
"""Robust deviations from the median key norm, as the filter rule ``key-outliers`` counts them."""

LEAST_SEEN, LEAST_LAYERS = 3, 0.25
"""Occurrences of a token in the corpus, and share of the layers it stands out in, from which it is named."""


class OutlierTokens:
    """Counts, layer by layer, which token ids of texts int64 [S, T] have outlying keys in most places they occur."""

    def __init__(self, texts: Tensor) -> None:
        first = min(SINKS, texts.shape[1] // 2)
        self._first = first
        self._ids, self._of = texts[:, first:].flatten().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self._seen = torch.bincount(self._of)
        self._layers = 0
        self._outlying = torch.zeros(len(self._ids), dtype=torch.int64)

    def see(self, stats: LayerStats) -> None:
        """One more layer."""
        norm = stats.turned_keys[:, self._first :].norm(dim=-1).mean(-1).flatten().cpu()  # [S * T], mean over kv heads
        out = stands_out(norm[None], THRESHOLD)[0]
        count = torch.zeros(len(self._ids), dtype=torch.int64).index_add_(0, self._of, out.long())
        self._outlying += 2 * count > self._seen
        self._layers += 1

    def found(self) -> tuple[int, ...]:
        """Ids that stand out in enough layers, rising."""
        named = (self._outlying >= max(1.0, LEAST_LAYERS * self._layers)) & (self._seen >= LEAST_SEEN)
        return tuple(self._ids[named].tolist())
