"""Work on a Ray cluster, with Ray Data. The one file that imports it (extra `ray`)."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlip.errors import InputError, MissingExtra

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
        InputError: Ray is not installed, has no such device, or no machine with so many cores.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("--engine ray needs the library `ray`: pip install 'open-qlip[ray]'") from error
    if not items:
        return
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller shows progress
    machines = _machines(ray)
    num_gpus = sum(machine.gpus for machine in machines)
    gpus = num_gpus > 0 if device == "auto" else device == "cuda"
    if (gpus and not num_gpus) or device == "mps":
        raise InputError(f"the Ray cluster has no {device}: pass --device cpu, or start it with --num-gpus")
    if gpus:
        machines = [machine for machine in machines if machine.gpus]
    if num_workers is None:
        num_workers = min(max(0, machine.cpus // machine.gpus - 1) for machine in machines) if gpus else 0
    places = sum(machine.places(1 + num_workers, gpus) for machine in machines)
    if not places:
        most = max(machine.cpus for machine in machines)
        kind = "machine with a GPU" if gpus else "machine"
        raise InputError(
            f"num_workers is {num_workers}: a worker of the Ray cluster needs {1 + num_workers} CPUs on one "
            f"machine, and the largest {kind} has {most}: lower --num-workers, or start Ray with --num-cpus"
        )
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


class _Machine(NamedTuple):
    """What a machine of the cluster has for workers."""

    cpus: int
    gpus: int

    def places(self, num_cpus: int, on_gpu: bool) -> int:
        """How many workers of `num_cpus` cores, and a GPU each if they need one, it holds."""
        return min(self.cpus // num_cpus, self.gpus) if on_gpu else self.cpus // num_cpus


def _machines(ray: Any) -> list[_Machine]:
    """All machines of the cluster that are alive. Ray waits for ever for what none of them has."""
    total = ray.cluster_resources()
    several = sum(name.startswith("node:") and name != "node:__internal_head__" for name in total) > 1
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]] if several else [total]
    return [_Machine(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in found]


class _Worker:
    """A process of the cluster."""

    def __init__(self, make: MakeWork, device: str, num_workers: int):
        self._work = make(device, num_workers)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self._work(tuple(map(int, item)))) for item in batch["item"]]}
