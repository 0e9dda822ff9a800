"""What a data worker does first, whatever way it was started."""

import multiprocessing
import os
import signal
from threading import Thread


def end_with_run(worker: int) -> None:
    """End as soon as the process that reads from this worker has ended, also after SIGKILL.

    PyTorch looks every five seconds whether its parent has changed. With `forkserver`, the default from Python
    3.14 on, the parent is the server and not the run.

    Args:
        worker: its number; `worker_init_fn` of a `DataLoader` is called with it.
    """
    if multiprocessing.parent_process():
        Thread(target=_wait, name="end-with-run", daemon=True).start()


def outlive_signals(worker: int) -> None:
    """As `end_with_run`; and ignore SIGTERM and Ctrl-C, which the run answers when they go to the whole group.

    Args:
        worker: its number.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_run(worker)


def _wait() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()  # of a pipe that the system closes with the process
    os._exit(1)
