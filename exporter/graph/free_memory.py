"""What this machine, or the container that this runs in, has left of its memory."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_main_memory() -> int:
    """Bytes that this process may still take: the smaller of the machine's and the control group's."""
    return min(psutil.virtual_memory().available, _cgroup_free())


def _cgroup_free() -> int:
    """A container's limit less what it cannot give back; the machine's own size where there is no limit."""
    unlimited = psutil.virtual_memory().total
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return unlimited
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2 here
        return unlimited
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
