"""Workers end with the run that reads from them, also when it is killed and cannot tell them."""

import signal
import subprocess
import sys
import time

import pytest

fcntl = pytest.importorskip("fcntl")

PROGRAM = """
import fcntl, multiprocessing, os, sys, time
from torch.utils.data import DataLoader, Dataset
from qlip.data.workers import {start}

class Endless(Dataset):
    def __getitem__(self, i):
        if i > 1:
            time.sleep(100)
        self.file = open(sys.argv[1])
        fcntl.flock(self.file, fcntl.LOCK_SH)
        return os.getpid()

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    multiprocessing.set_forkserver_preload(["torch.utils.data"])
    batches = iter(DataLoader(Endless(), None, sampler=range(9), num_workers=2, worker_init_fn={start}))
    print(next(batches), next(batches), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize(("method", "start"), [("fork", "end_with_run"), ("forkserver", "outlive_signals")])
def test_workers_end_within_two_seconds_of_a_killed_run(tmp_path, method, start):
    """Each of them holds a lock, which the system lets go when it has ended."""
    script = tmp_path / "run.py"
    script.write_text(PROGRAM.format(method=method, start=start))
    with subprocess.Popen([sys.executable, script, script], stdout=subprocess.PIPE) as run, script.open() as file:
        assert len({run.pid, *map(int, run.stdout.readline().split())}) == 3
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run.send_signal(signal.SIGKILL)
        begin = time.monotonic()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert time.monotonic() - begin < 2
