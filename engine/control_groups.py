"""What the control groups of a process leave it (containers, Slurm jobs, systemd slices)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""The process's groups, with lines ``0::/path`` or ``9:memory:/path``; and where they are mounted."""
MEMORY_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of a group, v2 and v1: limit, usage and, in memory.stat, cached pages of files that it would give up."""


def memory_left(groups: Path = GROUPS, root: Path = ROOT) -> list[int]:
    """Bytes that may still be taken by each group with a limit."""
    return [
        room
        for version, files in MEMORY_FILES.items()
        for folder in _folders(groups, root, version)
        if (room := _memory_of(folder, *files)) is not None
    ]


def processors(groups: Path = GROUPS, root: Path = ROOT) -> float | None:
    """Processors' worth of time that the process may take, such as 1.5; None if no group limits it."""
    found = [_quota_of(folder) for version in ("", "cpu", "cpu,cpuacct") for folder in _folders(groups, root, version)]
    return min((quota for quota in found if quota is not None), default=None)


def _folders(groups: Path, root: Path, version: str) -> Iterator[Path]:
    """The group's folder and those of the groups around it; ``version``: empty for v2, else the controller of v1."""
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kind, path = line.split(":", 2)
        if kind == version:
            top = root / kind
            inner = top / path.strip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _memory_of(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """Bytes that may still be taken in one group; None if it has no limit."""
    if not (folder / limit).is_file() or (most := (folder / limit).read_text().strip()) == "max":
        return None
    kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(most) - int((folder / usage).read_text()) + int(kinds[cached])


def _quota_of(folder: Path) -> float | None:
    """Time in one group over the period that it is for; None if it has no limit."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text().split()
    elif (folder / "cpu.cfs_quota_us").is_file():
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
