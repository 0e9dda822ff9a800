"""Threads are as many as are free, and wait without spinning, unless a person has chosen otherwise."""

import os
import subprocess
import sys

import pytest

from qlip import machine
from qlip.machine import num_cores, num_free_cores, set_up_threads


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A machine: 8 cores, all of them allowed; the files are written by the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in ("_QUOTA", "_OLD_QUOTA", "_LOAD"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_a_containers_quota_counts(place, quota, cores):
    (place / "_QUOTA").write_text(quota)
    assert num_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [(200_000, 2), (-1, 8)])
def test_a_quota_of_the_older_kind_counts_too(place, quota, cores):
    (place / "_OLD_QUOTA").mkdir()
    (place / "_OLD_QUOTA" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (place / "_OLD_QUOTA" / "cpu.cfs_period_us").write_text("100000")
    assert num_cores() == cores


def test_without_affinity_and_files_the_machines_cores_count(place, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_cores() == num_free_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == num_free_cores() == 1
    monkeypatch.delattr(os, "getloadavg")
    assert num_free_cores() == 1


@pytest.mark.parametrize(
    ("load", "free"),
    [
        ("0.00 0.00 0.00 1/200 99", 8),
        ("2.90 2.00 1.00 4/200 99", 5),
        ("6.00 6.00 6.00 1/200 99", 8),  # a run that has just ended
        ("0.10 0.00 0.00 7/200 99", 8),  # a short task
        ("90.0 90.0 90.0 91/900 99", 1),
    ],
)
def test_threads_follow_what_is_free(place, load, free):
    (place / "_LOAD").write_text(load)
    assert num_free_cores() == free


def test_a_small_container_on_a_large_busy_machine_has_its_own_cores(place, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (place / "_LOAD").write_text("30.0 30.0 30.0 31/900 99")
    assert num_free_cores() == 8


def test_where_only_the_load_is_known(place, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (2.2, 0.0, 0.0))
    assert num_free_cores() == 6


@pytest.mark.parametrize("chosen", ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
def test_what_a_person_has_set_stays(place, chosen):
    environ = {chosen: "7", "OMP_NUM_THREADS": "3"}
    set_up_threads(environ)
    assert environ == {chosen: "7", "OMP_NUM_THREADS": "3"}


def test_the_command_line_sets_it_before_torch_reads_it():
    program = (
        "import sys, qlip.cli; assert 'torch' not in sys.modules; main = sys.modules['qlip.cli.main']\n"
        "def dispatch(argv): import torch; print(torch.__config__.parallel_info())\n"
        "main._dispatch = dispatch; main.main()"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    environ["OMP_DISPLAY_ENV"] = "true"
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    count = num_cores()
    assert any(f"get_num_threads() : {n}\n" in done.stdout for n in range(1, count + 1))
    if "libgomp" in done.stderr or "OMP_WAIT_POLICY" in done.stderr:
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
