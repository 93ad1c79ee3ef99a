"""Which form a model's weights are held in."""

from __future__ import annotations

import torch

from skvq.engine.storage import DenseForm, Form


def form_of(backend: str, device: torch.device, dtype: torch.dtype) -> Form:
    """The form that goes with a backend: what the file has where numba's kernels multiply it in float32, else dense."""
    if backend == "numba" and dtype == torch.float32:
        from skvq.engine.stored import StoredForm

        return StoredForm()
    return DenseForm(device, dtype)
