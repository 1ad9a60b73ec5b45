"""What this process may use of the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has under SLURM or `taskset`, or with a quota of a
    container.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, math.floor(int(quota) / int(period))))
    return cores


def physical_memory() -> int:
    """Bytes of memory that this process may use; 0 where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [text for text in (_read("memory.max"), _read("memory/memory.limit_in_bytes")) if text.isdigit()]
    return min([memory, *map(int, limits)])


def _read(name: str) -> str:
    """A limit of this process's control group, or of the root one as containers see their own."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.split("::", 1)[1].lstrip("/") for line in groups if line.startswith("0::")), "")
    except OSError:
        return ""
    for folder in dict.fromkeys((CGROUPS / own, CGROUPS)):
        try:
            return (folder / name).read_text().strip()
        except OSError:
            continue
    return ""
