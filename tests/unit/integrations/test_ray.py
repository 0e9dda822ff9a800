"""The same files from a Ray cluster of this machine, with two workers of which one dies in the middle."""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

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
