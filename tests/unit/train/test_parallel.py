"""Two processes with half the batch each learn what one learns with the whole: DDP and FSDP2, both stages."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from tests.conftest import LABELS, small_config

from qlip.data.teacher import Teacher
from qlip.errors import InputError
from qlip.figures.memory import random_batch
from qlip.model import QLIP, TextConfig
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer
from qlip.train import parallel
from qlip.train.distributed import (
    any_rank,
    average,
    average_gradients,
    gather_rows,
    mean_over_ranks,
    processes,
    rank,
    world_size,
)
from qlip.train.losses import contrastive_loss, sigmoid_loss
from qlip.train.parallel import ComputeConfig, whole
from qlip.train.stage1 import Stage1, Stage1Config
from qlip.train.stage2 import Stage2, Stage2Config
from qlip.train.task import NonFinite

BATCH_SIZE, STEPS = 16, 3
FP32 = {"precision": "fp32", "device": "cpu"}

TASKS = {
    "stage1 adamw": (Stage1, Stage1Config(lr=1e-3, layer_decay=0.8), {}),
    "stage1 lamb": (Stage1, Stage1Config(optimizer="lamb", lr=1e-3, vision_lr=2e-3), {}),
    "stage1 muon sigmoid": (
        Stage1,
        Stage1Config(optimizer="muon", contrastive="sigmoid", lr=1e-3, layer_decay=0.8),
        {"micro_batch_size": 4},
    ),
    "stage1 parts": (
        Stage1,
        Stage1Config(lr=1e-3, reconstruct_every=2),
        {"micro_batch_size": 4, "recompute": True},
    ),
    "stage1 gradient": (Stage1, Stage1Config(lr=1e-3, balance="gradient", balance_every=2), {}),
    "stage1 teacher": (Stage1, Stage1Config(lr=1e-3, teacher_weight=30.0), {"micro_batch_size": 4}),
    "stage1 reconstruction": (Stage1, Stage1Config(lr=1e-3, alignment_weight=0.0), {}),
    "stage2": (Stage2, Stage2Config(discriminator_width=32, r1_every=2, perceptual_weight=0.0, ema=0.5), {}),
    "stage2 parts": (
        Stage2,
        Stage2Config(
            discriminator_width=32, perceptual_weight=0.0, adversary="patchgan", freeze_ids=True, ema=0.0
        ),
        {"micro_batch_size": 4},
    ),
}


TEACHER = Teacher("teacher", "", (64, 64), width=12, grid=(2, 2), grid_width=6)


def build_model() -> QLIP:
    vocabulary = TextTokenizer.train([f"a photo of a {label}." for label in LABELS], 600, 16)
    specials = {k: getattr(vocabulary, k) for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    text = TextConfig(**{**small_config().text.__dict__, **specials})
    torch.manual_seed(0)
    processor = ImageProcessor(resize=32, crop=32)
    return QLIP(small_config(text=text), image_processor=processor, text_tokenizer=vocabulary)


def global_batch(model: QLIP, step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    input_ids, _ = model.text_tokenizer([LABELS[(i + step) % 4] for i in range(BATCH_SIZE)])
    return {
        "pixel_values": torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator),
        "input_ids": input_ids,
        "group": torch.arange(BATCH_SIZE) % 4,
    } | teacher_features(generator)


def teacher_features(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of five samples of the first half and two of the second."""
    known = torch.zeros(BATCH_SIZE, 1)
    known[[0, 2, 3, 4, 6, 9, 15]] = 1
    pooled = torch.randn(BATCH_SIZE, 12, generator=generator) * known
    grid = torch.randn(BATCH_SIZE, 2, 2, 6, generator=generator) * known[:, :, None, None]
    return {"teacher/pooled": pooled.half(), "teacher/grid": grid.half()}


def train(name: str, sharding: str) -> dict[str, torch.Tensor]:
    """Three steps on this process's share; the snapshot's weights, and the last step's values averaged."""
    kind, config, compute = TASKS[name]
    model = build_model()
    teacher = (TEACHER,) if name == "stage1 teacher" else ()
    task = kind(model, config, ComputeConfig(**FP32 | compute, sharding=sharding), BATCH_SIZE, *teacher)
    share = BATCH_SIZE // world_size()
    for step in range(1, STEPS + 1):
        batch = global_batch(model, step)
        own = {k: v[rank() * share : (rank() + 1) * share] for k, v in batch.items()}
        values = mean_over_ranks(task.step(own | {"keys": [""] * share}, step))
    state = task.snapshot().state_dict()
    if teacher:
        state |= {f"head.{k}": whole(v).clone() for k, v in task.extra.heads.state_dict().items()}
    return state | {f"value.{k}": torch.tensor(v) for k, v in values.items()}


def losses_with_gather() -> dict[str, torch.Tensor]:
    """A contrastive loss over gathered rows, and an average, with the gradients that DDP would average."""
    torch.manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(2, BATCH_SIZE, 8), dim=-1)
    weight = torch.eye(8).requires_grad_()
    share = slice(rank() * BATCH_SIZE // world_size(), (rank() + 1) * BATCH_SIZE // world_size())
    images, texts = (part[share] @ weight for part in embeds)
    scale, bias, group = torch.tensor(10.0), torch.tensor(-3.0), torch.arange(BATCH_SIZE)[share] % 5
    loss = contrastive_loss(images, texts, scale, group) + sigmoid_loss(images, texts, scale, bias, group)
    loss = loss + average(images.mean(0)).pow(3).sum()
    loss.backward()
    module = torch.nn.Linear(1, 1)
    module.weight.grad = torch.full((1, 1), float(rank()))
    average_gradients(module)
    return {
        "gradient": average(weight.grad),
        "loss": average(loss.detach()),
        "gathered": gather_rows(texts.detach()),
        "any": torch.tensor([any_rank(rank() == 0), any_rank(False)]),
        "averaged": module.weight.grad * 2 / max(1, world_size() - 1),
    }


def a_bad_sample_of_rank_1() -> list:
    """What rank 0 hears of it."""
    model = build_model()
    task = Stage1(model, Stage1Config(), ComputeConfig(**FP32), BATCH_SIZE)
    share = BATCH_SIZE // world_size()
    own = {k: v[rank() * share : (rank() + 1) * share] for k, v in global_batch(model, 1).items()}
    if rank() == 1:
        own["pixel_values"][2] = float("nan")
    try:
        task.step(own, 1)
    except NonFinite as error:
        return ["reconstruction" in error.names, error.culprit]
    return []


def chosen_where_only_rank_1_is_fast() -> list[bool]:
    """Whether each rank computes in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "speedup", lambda *_: 10.0 * rank())
        parallel._is_faster.cache_clear()
        mine = parallel.settled(ComputeConfig(device="cpu"), torch.device("cpu")).precision == "bf16"
    parallel._is_faster.cache_clear()
    return [bool(flag) for flag in gather_rows(torch.tensor([int(mine)]))]


def worker(index: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with processes("cpu"):
        results = {"gather": losses_with_gather()}
        results["chosen"] = {"bf16": torch.tensor(chosen_where_only_rank_1_is_fast())}
        results["bad"] = {"term and rank": torch.tensor(a_bad_sample_of_rank_1())}
        for sharding in ("ddp", "fsdp"):
            results |= {f"{name} {sharding}": train(name, sharding) for name in TASKS}
    if index == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, str(folder)), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_learn_what_one_learns(two_processes, name):
    start = build_model().state_dict()
    alone = train(name, "ddp")
    moved = max((alone[key] - start[key]).abs().max().item() for key in start)  # the heads are no part of it
    assert moved > 1e-3
    for sharding in ("ddp", "fsdp"):
        both = two_processes[f"{name} {sharding}"]
        assert both.keys() == alone.keys()
        for key, value in alone.items():
            if key != "value.distinct_tokens":  # of a part of the batch each
                torch.testing.assert_close(
                    both[key], value, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
                )


def test_gather_and_average_have_the_gradient_of_the_whole_batch(two_processes):
    alone = losses_with_gather()
    both = two_processes["gather"]
    for key in ("gradient", "loss", "gathered"):
        torch.testing.assert_close(both[key], alone[key], rtol=1e-5, atol=1e-6)
    assert both["any"].tolist() == [True, False]
    assert both["averaged"].item() == 1.0  # twice the mean of ranks 0 and 1


def test_a_loss_that_is_not_finite_is_told_by_term_and_rank(two_processes):
    assert two_processes["bad"]["term and rank"].tolist() == [True, 1]


def test_all_processes_compute_in_the_precision_that_the_first_one_measures(two_processes):
    assert two_processes["chosen"]["bf16"].tolist() == [False, False]


@pytest.fixture
def speeds(monkeypatch):
    """How many times as fast bfloat16 is, for products and attention."""
    parallel._is_faster.cache_clear()
    rates = {"product": 3.0, "attention": 3.0}
    monkeypatch.setattr(parallel, "speedup", lambda device, dtype, work: rates[work])
    yield rates
    parallel._is_faster.cache_clear()


@pytest.mark.parametrize(
    ("product", "attention", "expected"),
    [(3, 3, ("bf16", "bf16")), (1.3, 0.5, ("bf16", "fp32")), (1.1, 3, ("fp32", "fp32")), (0, 0, ("fp32", "fp32"))],
)
def test_auto_takes_bfloat16_where_it_is_faster(speeds, caplog, product, attention, expected):
    speeds |= {"product": product, "attention": attention}
    with caplog.at_level("INFO", "qlip"):
        for _ in range(2):
            found = parallel.settled(ComputeConfig(), torch.device("cpu"))
            assert (found.precision, found.attention) == expected
    said = [record.getMessage() for record in caplog.records]
    name = "bfloat16" if expected[0] == "bf16" else "float32"
    assert said[0] == f"precision: {name} (bfloat16 runs at {product:.2g} times the speed of float32 here)"
    assert len(said) == (2 if expected[0] == "bf16" else 1)  # once, not twice


def test_what_a_person_names_is_not_asked_of_the_device(speeds):
    speeds.clear()
    for precision in ("bf16", "fp32"):
        config = ComputeConfig(precision=precision, attention="fp32")
        assert parallel.settled(config, torch.device("cpu")) == config


@pytest.mark.parametrize(("attention", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_attention_is_computed_as_the_config_says(small_model, monkeypatch, attention, dtype):
    seen = set()
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "qlip.model.layers.F.scaled_dot_product_attention",
        lambda q, k, v, **rest: (seen.add(v.dtype), real(q, k, v, **rest))[1],
    )
    compute = ComputeConfig(device="cpu", precision="bf16", attention=attention)
    Stage1(small_model, Stage1Config(), compute, 8).step(random_batch(small_model.config, 8), 1)
    assert seen == {dtype}


def test_without_a_compiler_a_run_does_without_and_says_so(monkeypatch, caplog):
    parallel._can_compile.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level("WARNING", "qlip"):
        for _ in range(2):
            config = ComputeConfig(device="cpu", precision="fp32", compile=True)
            assert not parallel.settled(config, torch.device("cpu")).compile
    parallel._can_compile.cache_clear()
    (record,) = caplog.records
    assert "C++ compiler" in record.getMessage()


def test_what_cannot_be_shared_out_is_named():
    with pytest.raises(InputError, match="micro_batch_size 5 does not divide the 16 samples"):
        ComputeConfig(micro_batch_size=5).num_parts(16)
    assert ComputeConfig(micro_batch_size=4).num_parts(16) == 4
    with pytest.raises(InputError, match="sharding is 'fsdp', but there is one process"):
        train("stage2", "fsdp")
