"""The same files from a Ray cluster of this machine, with two workers of which one dies in the middle."""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.unit.jobs.test_tokens import contents, pictures

from qlip.errors import InputError
from qlip.integrations.ray import map_on_ray
from qlip.jobs import tokens_job
from qlip.jobs.tokens import tokenize
from qlip.jobs.tokens_job import Job


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[ray\]'"):
        next(map_on_ray(None, [(1,)], 0, "cpu"))


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, logging_level="error")
    import tests.unit.integrations.test_ray as here

    ray.cloudpickle.register_pickle_by_value(here)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Dying:
    """Makes workers that note their process; the one that comes to the third unit first dies of it."""

    made: tokens_job._RayWorker
    notes: str

    def __call__(self, device, num_workers):
        work = self.made(device, num_workers)

        def tokenize_unit(item):
            notes = Path(self.notes)
            (notes / f"pid-{os.getpid()}").touch()
            if item[0] == 2 and not (notes / "died").exists():
                (notes / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(item)

        return tokenize_unit


@pytest.mark.slow
def test_a_dead_worker_loses_nothing(cluster, small_model, tmp_path, monkeypatch):
    small_model.save(tmp_path / "small")
    (tmp_path / "notes").mkdir()
    folder = pictures(tmp_path / "in", 24)
    (tmp_path / "in" / "05.png").write_bytes(b"junk")
    monkeypatch.chdir(tmp_path)
    job = Job("small", ("in",), Path("local"), shard_rows=2, batch_size=2, num_workers=0, device="cpu")
    assert folder.endswith("/in")
    tokenize(job)
    made = tokens_job._RayWorker
    monkeypatch.setattr(tokens_job, "_RayWorker", lambda *a: Dying(made(*a), str(tmp_path / "notes")))
    done = tokenize(replace(job, out=Path("ray"), engine="ray"))
    assert done.num_rows == 23 and len(done.failures) == 1
    assert (tmp_path / "notes" / "died").exists() and len(list((tmp_path / "notes").glob("pid-*"))) >= 3
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    local, ray = (json.loads((tmp_path / name / "_manifest.json").read_text()) for name in ("local", "ray"))
    assert local.pop("environment") != ray.pop("environment") and local == ray
    again = tokenize(replace(job, out=Path("ray"), engine="ray"))
    assert again.num_skipped == 23


class Played:
    """Ray, of which only what a cluster has and what is asked of it is looked at."""

    def __init__(self, *machines: dict[str, float]):
        self.machines, self.asked = machines, {}
        self.data = SimpleNamespace(
            DataContext=SimpleNamespace(get_current=SimpleNamespace),
            from_items=lambda items, override_num_blocks: self,
            ActorPoolStrategy=lambda size: size,
        )

    def is_initialized(self):
        return True

    def nodes(self):
        return [{"Alive": True, "Resources": machine} for machine in self.machines]

    def cluster_resources(self):
        kinds = {f"node:{i}": 1.0 for i in range(len(self.machines))}
        return {kind: sum(m.get(kind, 0) for m in self.machines) for kind in ("CPU", "GPU")} | kinds

    def map_batches(self, function, **options):
        self.asked = options
        return self

    def iter_rows(self):
        return iter(())


@pytest.mark.parametrize(
    ("machines", "num_workers", "device", "places"),
    (
        ([{"CPU": 2.0}], 3, "cpu", None),
        ([{"CPU": 4.0}], 3, "cpu", 1),
        ([{"CPU": 3.0}, {"CPU": 3.0}], 3, "cpu", None),
        ([{"CPU": 5.0}, {"CPU": 9.0}], 3, "cpu", 3),
        ([{"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0}], 3, "cuda", None),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}], None, "auto", 4),
        ([{"GPU": 1.0}], None, "auto", None),
    ),
)
def test_what_no_machine_has_is_refused(monkeypatch, machines, num_workers, device, places):
    ray = Played(*machines)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    items = [(i,) for i in range(9)]
    if places is None:
        with pytest.raises(InputError, match="num_workers is .* CPUs on one machine"):
            list(map_on_ray(None, items, num_workers, device))
    else:
        list(map_on_ray(None, items, num_workers, device))
        assert ray.asked["compute"] == places
