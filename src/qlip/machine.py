"""How many cores and threads this process may use, and how threads wait. No torch: it reads this once."""

import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of cgroup v2, as a container sees its own
_OLD_QUOTA = Path("/sys/fs/cgroup/cpu")  # of v1
_LOAD = Path("/proc/loadavg")


def num_cores() -> int:
    """Cores that this process may use: those of its affinity, within a container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota() or cores))


def num_free_cores() -> int:
    """Those of them that nobody else is using now; at least 1.

    Another process counts if the load of the last minute and that of this moment both have it: a run that has just
    ended is only in the first, and a short task only in the second.
    """
    busy = _load()
    return max(1, min(num_cores(), (os.cpu_count() or 1) - round(busy)))


def set_up_threads(environ: MutableMapping[str, str] = os.environ) -> None:
    """Choose how OpenMP's threads wait and how many there are, where a person has not; before torch is imported.

    By default a waiting thread spins for milliseconds. On a busy machine it takes the core from the thread that it
    waits for, and a step takes ten times as long. This is for the command line: a library must not set it for
    a program that uses OpenMP elsewhere.

    Args:
        environ: the process's variables, which its child processes inherit.
    """
    if not environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
    environ.setdefault("OMP_NUM_THREADS", str(num_free_cores()))


def _quota() -> int | None:
    """Cores of a container's quota, rounded up; None without one."""
    with suppress(OSError, ValueError):  # ValueError: "max"
        quota, period = map(int, _QUOTA.read_text().split())
        return -(-quota // period)
    with suppress(OSError, ValueError):
        quota, period = (int((_OLD_QUOTA / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return -(-quota // period) if quota > 0 else None
    return None


def _load() -> float:
    """Processes of this machine that compute, besides this one; 0 where nobody knows."""
    with suppress(OSError, ValueError, IndexError):
        minute, _, _, now, *_ = _LOAD.read_text().split()
        return min(float(minute), int(now.split("/")[0]) - 1)
    with suppress(OSError, AttributeError):  # AttributeError: Windows
        return os.getloadavg()[0]
    return 0.0
