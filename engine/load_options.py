"""What ``Engine.load`` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skvq.engine.config import ON_FULL, PREFILLS, CacheConfig
from skvq.engine.errors import require_known
from skvq.engine.options import require_type


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """See ``Engine.load``, which has chosen device and dtype. Raises OptionError for a value of a wrong type."""

    model: str
    max_context: int | None
    max_sequences: int
    total_tokens: int | None
    cache: CacheConfig
    backend: str
    device: torch.device
    dtype: torch.dtype
    calibration: Path | None
    dummy_weights: bool
    rope_scaling: str | None
    prefill: str
    on_full: str
    cuda_graph: bool
    download: bool
    chat_template_kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        require_known(self.prefill, PREFILLS, "prefill")
        require_known(self.on_full, ON_FULL, "on_full")
        require_type("backend", self.backend, str)
        require_type("dummy_weights", self.dummy_weights, bool)
        require_type("cuda_graph", self.cuda_graph, bool)
        require_type("download", self.download, bool)
        require_type("rope_scaling", self.rope_scaling, str, None)
