"""A step is what transformers' own loss and peft's own layers make of it; parts and processes change nothing."""

import copy
import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from tests.conftest import encoded

from qlip.data.loader import batches
from qlip.errors import InputError
from qlip.llava.data import ConversationFile, Conversations
from qlip.train.distributed import processes, rank
from qlip.train.parallel import ComputeConfig

pytest.importorskip("transformers")
from qlip.llava.model import build
from qlip.llava.task import LlavaTask, LlavaTaskConfig, merged

FP32 = ComputeConfig(device="cpu", precision="fp32")
ASKED = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "a red square"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory, llm):
    """A JSON file of eight conversations about six pictures, the tokenizer's folder, the language model's."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encoded(i % 4, i))
    entries = [{"id": i, "image": f"{i}.png", "conversations": ASKED * (1 + i % 2)} for i in range(6)]
    entries += [{"id": i, "conversations": ASKED * (1 + i % 2)} for i in (6, 7)]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json", llm


def made(files, **changes):
    """Model, and batches of eight."""
    torch.manual_seed(0)
    model, processor = build("qlip-tiny", files[1])
    dataset = Conversations(ConversationFile(files[0], files[0].parent), processor, None, 256)
    return model, dataset


def task_of(model, compute=FP32, **config):
    return LlavaTask(model, LlavaTaskConfig(**{"lr": 1e-3, "grad_clip": 1e9} | config), compute, 8)


def gradients(task):
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


def test_the_loss_and_its_gradient_are_transformers(files):
    model, dataset = made(files)
    batch = next(batches(dataset, None, 8))
    theirs = copy.deepcopy(model)
    inputs = {name: value for name, value in batch.items() if name not in ("keys", "pixel_values")}
    seen = (batch["input_ids"] == model.config.image_token_id).any(1)
    loss = theirs(**inputs, pixel_values=batch["pixel_values"][seen]).loss
    theirs.model.vision_tower.requires_grad_(False)
    loss.backward()
    task = task_of(model)
    values = task.step(batch, 1)
    assert abs(float(values["loss"] - loss.detach())) < 1e-6  # measured: 4.8e-7
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None and "vision_tower" not in n}
    assert_close(gradients(task), expected, 5e-7)  # measured: 8.9e-8


def test_parts_and_recomputation_change_nothing(files):
    batch = next(batches(made(files)[1], None, 8))
    whole, parts = (
        task_of(made(files)[0]),
        task_of(made(files)[0], ComputeConfig(device="cpu", precision="fp32", micro_batch_size=1, recompute=True)),
    )
    first, second = whole.step(batch, 1), parts.step(batch, 1)
    for name in ("loss", "accuracy", "grad_norm"):
        assert abs(float(first[name] - second[name])) < 5e-6, name  # measured: 1.4e-6 of 6
    assert_close(gradients(parts), gradients(whole), 5e-7)  # measured: 8.9e-8; two parts have no picture


def test_the_first_stage_trains_the_projector_alone(files):
    model, dataset = made(files)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    task = task_of(model, train="projector")
    for step, batch in zip((1, 2), batches(dataset, None, 8), strict=False):
        task.step(batch, step)
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert {name.split(".")[0] for name in task.state_dict()} == {"model", "optimizer"}
    assert len(task.state_dict()) == 4 * 4  # each with two running means and a count of steps


def test_the_eye_stays_and_the_rates_are_each_its_own(files):
    model, dataset = made(files)
    before = {name: p.clone() for name, p in model.model.vision_tower.state_dict().items()}
    task = task_of(model, projector_lr=1e-4, optimizer="muon")
    assert {group["name"]: group["lr"] for group in task.optimizer.param_groups} == {
        "projector": 1e-4,
        "llm": 1e-3,
    }
    task.step(next(batches(dataset, None, 8)), 1)
    for name, p in model.model.vision_tower.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_lora_merges_as_peft_does(files):
    pytest.importorskip("peft")
    model, dataset = made(files)
    frozen = {name: p.clone() for name, p in model.state_dict().items()}
    task = task_of(model, lora_rank=4, lora_alpha=8, lora_dropout=0.0)
    batch = next(batches(dataset, None, 8))
    for step in (1, 2, 3):
        task.step(batch, step)
    state = model.state_dict()
    for name, p in frozen.items():
        moved = "multi_modal_projector" in name
        here = name if name in state else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(state[here], p) != moved, name
    plain = merged(state, 8.0)
    assert plain.keys() == frozen.keys()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen = (batch["input_ids"] == model.config.image_token_id).any(1)
    inputs["pixel_values"] = batch["pixel_values"][seen]
    snapshot = task.snapshot()
    assert not any("lora" in name for name in snapshot.state_dict())
    with torch.no_grad():
        theirs, ours = model.eval()(**inputs).logits, snapshot(**inputs).logits
    assert (theirs - ours).abs().max() < 1e-6  # measured: 1.2e-7
    assert (ours - made(files)[0](**inputs).logits).abs().max() > 1e-3


def test_a_batch_without_pictures(files):
    model, dataset = made(files)
    batch = next(batches(dataset, None, 8))
    words = ~(batch["input_ids"] == model.config.image_token_id).any(1)
    task = LlavaTask(model, LlavaTaskConfig(lr=1e-3), FP32, 2)
    task.step({name: value[words] for name, value in batch.items() if name != "keys"}, 1)
    for name, grad in gradients(task).items():
        assert bool(grad.any()) != ("projector" in name), name


def test_settings_that_cannot_be():
    for message, settings in {
        "lr is 0": {"lr": 0.0},
        "lora_rank is for the language model": {"train": "projector", "lora_rank": 4},
        "lora_dropout is 1": {"lora_dropout": 1.0},
        "must be 0 or more": {"weight_decay": -1.0},
    }.items():
        with pytest.raises(InputError, match=message):
            LlavaTaskConfig(**settings)


# Of three batches; 6 and 7 have no picture: so one process has none in the first, the other in the last.
ROWS = ((0, 1, 6, 7), (2, 3, 4, 5), (6, 7, 0, 1))


def trained(task, dataset, mine=slice(None)):
    """The losses of three steps on one's share of the rows."""
    losses = []
    for step, rows in enumerate(ROWS, 1):
        batch = dataset.collate([dataset[0, i] for i in rows], None)
        losses.append(task.step({name: value[mine] for name, value in batch.items()}, step)["loss"])
    return torch.stack(losses)


def several(index, port, files, sharding, settings, out):
    """What each of two processes does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}
    torch.set_num_threads(1)
    with processes("cpu"):
        model, dataset = made(files)
        task = task_of(model, ComputeConfig(device="cpu", precision="fp32", sharding=sharding), **settings)
        losses = trained(task, dataset, slice(2 * index, 2 * index + 2))
        snapshot = task.snapshot().state_dict()
        if rank() == 0:
            torch.save({"losses": losses, **snapshot}, out)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("settings", [{}, {"train": "projector"}, {"lora_rank": 4, "lora_dropout": 0.0}], ids=str)
def test_two_processes_learn_what_one_does(files, sharding, settings, tmp_path):
    if "lora_rank" in settings:
        pytest.importorskip("peft")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(several, (port, files, sharding, settings, tmp_path / "out.pt"), nprocs=2)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    model, dataset = made(files)
    task = task_of(model, **settings)
    torch.testing.assert_close(found.pop("losses"), trained(task, dataset), rtol=0, atol=1e-4)
    alone = task.snapshot().state_dict()
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        # Adam divides by the root of a small number: where a gradient is near 0, rounding decides its sign
        assert (found[name] - value).abs().mean() < 1e-4, name
