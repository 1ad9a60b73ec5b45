"""Memory of this process, from Linux's /proc."""

from pathlib import Path


def status_kb(field):
    """A figure of /proc/self/status, such as VmRSS (resident now) or VmHWM (most so far)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
