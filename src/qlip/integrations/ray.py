"""Work on a Ray cluster, with Ray Data. The one file that imports it (extra `ray`)."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qlip.errors import InputError

Item = tuple[int, ...]
Work = Callable[[Item], Any]
MakeWork = Callable[[str, int], Work]
"""Of a device and a number of processes that decode, on the worker: what does an item; its results are JSON."""


def map_on_ray(make: MakeWork, items: Sequence[Item], num_workers: int | None, device: str) -> Iterator[Any]:
    """Do each item on some worker of a cluster: the one that Ray finds (`RAY_ADDRESS`), else one on this machine.

    A worker that dies is replaced and its item done again: so an item must be one that can be done twice.

    Args:
        make: pickles; called once on each worker.
        items: equally many integers each.
        num_workers: processes that each worker starts to decode, a core each; None: what cores there are for it.
        device: "cuda": a worker for each GPU of the cluster; "cpu": one for each core that `num_workers` leaves;
            "auto": the first if there are GPUs.

    Yields:
        the results, in the order in which they are there.

    Raises:
        InputError: Ray is not installed, or has no such device.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs the library `ray`: pip install 'open-qlip[ray]'") from error
    if not items:
        return
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller shows progress
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    gpus = num_gpus > 0 if device == "auto" else device == "cuda"
    if (gpus and not num_gpus) or device == "mps":
        raise InputError(f"the Ray cluster has no {device}: pass --device cpu, or start it with --num-gpus")
    if num_workers is None:
        num_workers = max(0, num_cpus // num_gpus - 1) if gpus else 0
    places = num_gpus if gpus else max(1, num_cpus // (1 + num_workers))
    rows = ray.data.from_items([{"item": list(item)} for item in items], override_num_blocks=len(items))
    done = rows.map_batches(
        _Worker,
        fn_constructor_args=(make, "cuda" if gpus else "cpu", num_workers),
        batch_size=1,
        num_gpus=1 if gpus else 0,
        num_cpus=1 + num_workers,
        compute=ray.data.ActorPoolStrategy(size=min(places, len(items))),
    )
    for row in done.iter_rows():
        yield json.loads(row["result"])


class _Worker:
    """A process of the cluster."""

    def __init__(self, make: MakeWork, device: str, num_workers: int):
        self._work = make(device, num_workers)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self._work(tuple(map(int, item)))) for item in batch["item"]]}
