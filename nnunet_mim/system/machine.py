"""Cores and memory that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Number of cores this process may use; SLURM, `taskset` and the quota of a container make them fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _group_limit("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, math.floor(int(quota) / int(period))))
    return cores


def physical_memory() -> int:
    """Bytes of memory this process may use; 0 where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [text for text in map(_group_limit, ("memory.max", "memory/memory.limit_in_bytes")) if text.isdigit()]
    return min([memory, *map(int, limits)])


def _group_limit(name: str) -> str:
    """A limit of this process's control group, else of the root group, which containers see as theirs; "" if none."""
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
