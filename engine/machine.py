"""What this machine has: a device, its memory, and the dtype that suits it."""

from __future__ import annotations

from pathlib import Path

import torch

from skvq.engine.control_groups import memory_left
from skvq.engine.errors import OptionError, require_known
from skvq.engine.options import require_type
from skvq.kernels.interface import Backend, BackendUnavailable
from skvq.kernels.registry import get_backend

CUDA_BYTES = 1 << 30
"""Bytes of a GPU that are nobody's tensors: CUDA's context, code and workspaces of its libraries, rounding of the allocator. On
an H200 with torch 2.11 it was 0.75 GiB after a million tokens."""

MEMINFO = Path("/proc/meminfo")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str | torch.device) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, else the CPU. Raises OptionError if there is none."""
    require_type("device", name, str, torch.device)
    name = str(name)
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {name!r}: torch {torch.__version__} sees no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name!r} does not exist; GPUs on this machine: {torch.cuda.device_count()}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")  # which is never open


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute dtype of that name; ``auto`` is float32 on a CPU and bfloat16 on a GPU. Raises OptionError for another."""
    require_type("dtype", name, str, torch.dtype)
    name = str(name).removeprefix("torch.")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    require_known(name, ("auto", *DTYPES), "dtype")
    return DTYPES[name]


def find_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name for a device. Raises OptionError, with the reason, where it cannot be used."""
    try:
        return get_backend(name, device)
    except BackendUnavailable as error:
        raise OptionError(str(error)) from None


def set_threads(count: int) -> None:
    """CPU threads that torch, and with it every CPU kernel of ours, computes on."""
    torch.set_num_threads(count)


def pinnable_memory(device: torch.device) -> int:
    """Bytes of host memory that can be pinned for a GPU; none if the device is the host itself."""
    return available_memory(torch.device("cpu")) if device.type == "cuda" else 0


def cuda_bytes(device: torch.device | str) -> int:
    """What CUDA itself takes of a device: nothing of a CPU."""
    return 0 if torch.device(device).type == "cpu" else CUDA_BYTES


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken: free memory of the GPU, or of this machine within its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives its own back
    if not MEMINFO.is_file():
        raise OptionError(f"skvq runs on Linux: there is no {MEMINFO} here to tell how much memory is free")
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *memory_left()])
