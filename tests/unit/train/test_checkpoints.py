import json
import multiprocessing
import os
import random
import resource
import threading
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import qlip.train.checkpoint as module
from qlip.errors import InputError
from qlip.train.checkpoint import (
    Checkpoints,
    best_checkpoint,
    checkpoint_step,
    latest_checkpoint,
    load_checkpoint,
    read_tensors,
)

PROCESSES = multiprocessing.get_context("forkserver")  # one import of torch for all of them
PROCESSES.set_forkserver_preload(["qlip.train.checkpoint", "torch.distributed.fsdp"])


def some_state():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.weight": nn.Parameter(torch.randn(3, 5, generator=generator)),
        "model.logit_scale": nn.Parameter(torch.tensor(2.6592)),
        "model.half": torch.randn(7, generator=generator).bfloat16(),
        "model.transposed": torch.randn(4, 6, generator=generator).T,
        "model.channels_last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "model.part": torch.randn(10, generator=generator)[::2],
        "model.nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "optimizer.step": torch.tensor(2**40 + 1),
        "optimizer.mask": torch.tensor([True, False]),
        "optimizer.empty": torch.empty(0, 4),
    }


def blank(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def bits(state):
    """Bits, so that NaN and the sign of zero count."""
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().view(-1).view(torch.uint8).tolist())
        for name, t in state.items()
    }


def write(out, step=1, state=None, results=None, keep=9, best=None):
    with Checkpoints(out, keep, best) as checkpoints:
        checkpoints.save(state or {"x": torch.full((3,), float(step))}, step, results)
    return latest_checkpoint(out)


def join(process, seconds=60):
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    assert not alive, "a process hangs"
    return process.exitcode


def test_every_bit_comes_back_in_place_and_nothing_is_said(tmp_path, recwarn, capfd):
    state = some_state()
    path = write(tmp_path, 500, state)
    assert path == tmp_path / "checkpoints" / "step-0000500" and checkpoint_step(path) == 500
    live = blank(state)
    live["model.weight"].requires_grad_()
    assert load_checkpoint(path, live) == 500
    assert bits(live) == bits(state) and live["model.transposed"].stride() == state["model.transposed"].stride()
    assert bits(read_tensors(path, ("model.", "optimizer."))) == bits(state)
    model = read_tensors(path, "model.")
    assert bits(model) == bits({k: v for k, v in state.items() if k.startswith("model.")})
    assert not any(path.rglob("*.metadata")) and not recwarn.list and capfd.readouterr() == ("", "")


def test_training_goes_on_while_it_writes(tmp_path, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(module, "save_tensors", lambda *args: go.wait(30) and save_file(*args))
    state = some_state()
    before = bits(state)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(state, 1)
        for tensor in state.values():
            tensor.detach().zero_()
        checkpoints.check()
        assert latest_checkpoint(tmp_path) is None
        go.set()
        checkpoints.save(state, 2)  # waits for the first
        assert latest_checkpoint(tmp_path).name == "step-0000001"
    assert bits(read_tensors(latest_checkpoint(tmp_path), "")) == bits(state)
    assert bits(read_tensors(tmp_path / "checkpoints" / "step-0000001", "")) == before


def test_the_best_of_what_should_be_small_is_the_least(tmp_path):
    scores = {1: 0.4, 2: 0.2, 3: float("nan"), 4: 0.3, 5: 0.2}
    with Checkpoints(tmp_path, 1, "perceptual") as checkpoints:
        for step, score in scores.items():
            assert checkpoints.is_best({"perceptual": score}) == (step in (1, 2))
            checkpoints.save({"x": torch.ones(1)}, step, {"perceptual": score, "psnr": step})
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-0000002", "step-0000005"]
    assert checkpoint_step(best_checkpoint(tmp_path, "perceptual")) == 2
    again = Checkpoints(tmp_path, 1, "perceptual")
    assert not again.is_best({"perceptual": 0.2}) and again.is_best({"perceptual": 0.1})


def test_the_latest_and_the_best_are_kept(tmp_path):
    scores = {1: 5.0, 2: 7.0, 3: None, 4: 7.0, 5: float("nan"), 6: 6.0}
    with Checkpoints(tmp_path, 2, "psnr") as checkpoints:
        for step, score in scores.items():
            results = None if score is None else {"psnr": score, "loss": -score}
            assert checkpoints.is_best(results) == (step in (1, 2))
            checkpoints.save({"x": torch.ones(1)}, step, results)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-000000{step}" for step in (2, 5, 6)
    ]
    assert checkpoint_step(best_checkpoint(tmp_path, "psnr")) == 2
    assert checkpoint_step(best_checkpoint(tmp_path, "loss")) == 2 and best_checkpoint(tmp_path, "fid") is None
    info = json.loads((tmp_path / "checkpoints" / "step-0000002" / "checkpoint.json").read_text())
    assert (info["step"], info["results"], info["world_size"]) == (2, {"psnr": 7.0, "loss": -7.0}, 1)
    again = Checkpoints(tmp_path, 1, "psnr")
    assert not again.is_best({"psnr": 7.0}) and again.is_best({"psnr": 7.1}) and not again.is_best({})
    again.save({"x": torch.ones(1)}, 10_000_000, {"psnr": 8.0})  # more digits than the name's seven
    again.wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-10000000"]


def test_a_checkpoint_that_is_there_stays(tmp_path):
    write(tmp_path, 3)
    path = write(tmp_path, 3, {"x": torch.zeros(3)})
    assert read_tensors(path, "x")["x"].tolist() == [3, 3, 3] and len(list(path.parent.iterdir())) == 1


def test_what_is_unfinished_is_no_checkpoint_and_goes(tmp_path):
    path = write(tmp_path, 3)
    (path.parent / ".step-0000004.unfinished").mkdir()
    (path.parent / ".step-0000004.unfinished" / "rank-00000.safetensors").write_bytes(b"x")
    (path.parent / "step-0000003-copy").mkdir()  # a user's
    assert latest_checkpoint(tmp_path) == path and latest_checkpoint(tmp_path / "other") is None
    Checkpoints(tmp_path, 2)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-0000003", "step-0000003-copy"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"b": torch.zeros(2, 3), "c": torch.zeros(1)}, r"of c it has none, this run has \(\[1\]"),
        ({}, r"of b it has \(\[2, 3\].* this run has none"),
        ({"b": torch.zeros(3, 2)}, r"of b it has \(\[2, 3\].* this run has \(\[3, 2\]"),
        ({"b": torch.zeros(2, 3).double()}, r"of b it has .*float32.* this run has .*float64"),
    ],
)
def test_a_checkpoint_of_something_else_fills_nothing(tmp_path, other, words):
    path = write(tmp_path, 5, {"a": torch.ones(2), "b": torch.ones(2, 3)})
    live = {"a": torch.zeros(2)} | other
    with pytest.raises(InputError, match="of another model or task: " + words):
        load_checkpoint(path, live)
    assert not live["a"].any()
    with pytest.raises(InputError, match="no tensors whose names begin with 'model.'"):
        read_tensors(path, "model.")


def damage_cut(path):
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def damage_middle(path):
    """A value is another: only a checksum tells."""
    file = path / "rank-00000.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-2] ^= 1
    file.write_bytes(contents)


def damage_header(path):
    (path / "rank-00000.safetensors").write_bytes(b"\xff" * 100)


def damage_lost_file(path):
    (path / "rank-00000.safetensors").unlink()


def damage_lost_tensor(path):
    save_file({"a": load_file(path / "rank-00000.safetensors")["a"]}, path / "rank-00000.safetensors")


def damage_lost_part(path):
    file = path / "rank-00000.safetensors"
    save_file(load_file(file) | {"b": torch.ones(1, 3)}, file)


def damage_json(path):
    (path / "checkpoint.json").write_text("{")


def damage_no_json(path):
    (path / "checkpoint.json").unlink()


@pytest.mark.parametrize("damage", [f for name, f in list(globals().items()) if name.startswith("damage_")])
def test_damage_is_told(tmp_path, damage):
    state = {"a": torch.ones(2), "b": torch.ones(2, 3)}
    path = write(tmp_path, 5, state)
    damage(path)
    with pytest.raises(InputError, match="step-0000005: not a readable checkpoint.*delete it"):
        load_checkpoint(path, state)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_tensors(path, "")


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/checkpoints cannot be written .*--resume"):
        Checkpoints(tmp_path / "file", 2)


def test_a_folder_that_vanishes_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("")
    checkpoints.save({"x": torch.ones(3)}, 1)
    with pytest.raises(InputError, match="cannot be written"):
        checkpoints.wait()


def fill_the_disk(out):
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    with Checkpoints(out, 2) as checkpoints:
        checkpoints.save({"x": torch.ones(3)}, 1)
        checkpoints.wait()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        checkpoints.save({"x": torch.ones(1_000_000)}, 2)
        with pytest.raises(InputError, match="checkpoints cannot be written .*make room"):
            for _ in range(3000):
                checkpoints.check()
                time.sleep(0.01)
        checkpoints.wait()
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-0000001"]
        assert read_tensors(latest_checkpoint(out), "x")["x"].tolist() == [1, 1, 1]
        checkpoints.save({"x": torch.ones(1_000_000)}, 3)
        with pytest.raises(InputError, match="cannot be written"):
            checkpoints.save({"x": torch.ones(3)}, 4)
        checkpoints.save({"x": torch.ones(1_000_000)}, 5)
        raise KeyError("the first error")  # it must come out, and the process end


def test_a_full_disk_is_told_and_spares_what_is_there(tmp_path, capfd):
    # spawned: a fork server has the stderr of when it was started, which `capfd` does not read
    process = multiprocessing.get_context("spawn").Process(target=fill_the_disk, args=(tmp_path,))
    process.start()
    assert join(process) == 1
    assert "KeyError: 'the first error'" in capfd.readouterr().err


def save_for_ever(out):
    step = checkpoint_step(latest_checkpoint(out))
    checkpoints = Checkpoints(out, 1)
    while True:
        step += 1
        checkpoints.save({f"x{i}": torch.full((100, 100), float(step)) for i in range(20)}, step)


def test_killed_at_any_moment_the_one_before_is_whole(tmp_path):
    write(tmp_path, 1)
    for seed in range(4):
        process = PROCESSES.Process(target=save_for_ever, args=(tmp_path,))
        before = checkpoint_step(latest_checkpoint(tmp_path))
        process.start()
        while checkpoint_step(latest_checkpoint(tmp_path)) < before + 3 and process.is_alive():
            time.sleep(0.001)
        time.sleep(random.Random(seed).random() / 20)
        process.kill()
        process.join()
        path = latest_checkpoint(tmp_path)
        assert checkpoint_step(path) >= before + 3
        assert all((x == checkpoint_step(path)).all() for x in read_tensors(path, "x").values())


class Small(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.wide = nn.Linear(6, 5)  # 5 rows over 2 ranks: uneven
        self.narrow = nn.Linear(3, 1)  # 1 row: an empty shard
        self.logit_scale = nn.Parameter(torch.randn(()))
        self.register_buffer("count", torch.randint(2**40, ()))


def sharded(seed):
    model = Small(seed)
    fully_shard(model, ignored_params={model.logit_scale})
    return model.state_dict() | {"plain": torch.full((4, 4), float(seed))}


def unsharded(seed):
    return Small(seed).state_dict() | {"plain": torch.full((4, 4), float(seed))}


def two_ranks(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    (folder / "two").mkdir(exist_ok=True)
    with Checkpoints(folder / "two", 3, "psnr") as checkpoints:
        checkpoints.save(sharded(1), 1, {"psnr": 1.0} if rank == 0 else {})
        checkpoints.wait()
        path = latest_checkpoint(folder / "two")
        for make in (sharded, unsharded):  # FSDP, DDP
            live = make(9)
            assert load_checkpoint(path, live) == 1
            assert all(x.equal(y) for x, y in zip(live.values(), make(1).values(), strict=True))
        checkpoints.save(unsharded(2), 2)
        live = sharded(9)
        assert load_checkpoint(folder / "one" / "checkpoints" / "step-0000007", live) == 7
        assert all(x.equal(y) for x, y in zip(live.values(), sharded(7).values(), strict=True))
        checkpoints.wait()

        with pytest.raises(InputError, match="one for all of them"):
            load_checkpoint(folder / "two" / "checkpoints" / f"step-000000{rank + 1}", live)
        live |= {"more": torch.ones(1)} if rank else {}
        with pytest.raises(InputError, match="of more it has none"):
            load_checkpoint(path, live)

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
        checkpoints.save(sharded(3), 3)
        steps = 0
        with pytest.raises(InputError, match="cannot be written"):
            while True:
                checkpoints.check()
                steps += 1
                dist.all_reduce(torch.ones(1))  # the training's own traffic
                time.sleep(0.01 * rank)
        counts = [None, None]
        dist.all_gather_object(counts, steps)
        assert counts[0] == counts[1]  # both hear of it at the same step
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        checkpoints.save(sharded(4), 4)
    dist.barrier()
    dist.destroy_process_group()


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path):
    write(tmp_path / "one", 7, unsharded(7))
    processes = [PROCESSES.Process(target=two_ranks, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    assert [join(process) for process in processes] == [0, 0]
    folder = tmp_path / "two" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step-000000{step}" for step in (1, 2, 4)]
    for step in (1, 2, 4):
        files = [load_file(folder / f"step-000000{step}" / f"rank-0000{rank}.safetensors") for rank in (0, 1)]
        assert all(files) and sum(t.nbytes for f in files for t in f.values()) == sum(
            t.nbytes for t in unsharded(1).values()
        )  # each rank its share, nothing twice
        live = unsharded(9)
        assert load_checkpoint(folder / f"step-000000{step}", live) == step
        assert bits(live) == bits(unsharded(step)) == bits(read_tensors(folder / f"step-000000{step}", ""))
    (folder / "step-0000001" / "rank-00001.safetensors").unlink()
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_tensors(folder / "step-0000001", "")


def separate_folders(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with pytest.raises(InputError, match="one for all of them"):
        Checkpoints(folder / f"disk-{rank}", 2)
    dist.destroy_process_group()


def test_ranks_with_a_disk_each_are_told(tmp_path):
    processes = [PROCESSES.Process(target=separate_folders, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    assert [join(process) for process in processes] == [0, 0]
