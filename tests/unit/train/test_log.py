import io
import json
import logging
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler

from qlip.errors import InputError
from qlip.train import log as log_module
from qlip.train import terminal
from qlip.train.log import open_log, read_log
from qlip.train.terminal import Terminal
from qlip.train.trackers import require

STAGE1 = {
    "loss": 4.868,
    "reconstruction": 0.007045,
    "alignment": 3.1499,
    "commitment": 0.0476,
    "quantizer/tokens": 2.13,
    "quantizer/codebook": -2.57,
    "grad_norm": 5.279,
    "grad_norm/vision": 3.204,
    "grad_norm/text": 1.107,
    "grad_norm/decoder": 3.909,
    "grad_norm/other": 0.404,
    "bit_entropy": 27.89,
    "distinct_tokens": 0.867,
    "logit_scale": 2.608,
    "lr/vision": 2e-4,
    "lr/text": 2e-5,
    "lr/decoder": 2e-3,
    "lr/other": 5e-4,
    "images_per_s": 12350.0,
    "tflops_per_s": 412.3,
    "mfu": 0.417,
    "memory_gib": 63.21,
}
HELD_OUT = {
    "psnr": 20.98,
    "ssim": 0.6334,
    "bit_entropy": 27.95,
    "distinct_tokens": 0.8674,
    "top1": 0.18,
    "top5": 0.4,
}


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (log_module, terminal):
        monkeypatch.setattr(module, "time", clock)
    return clock


def lines(out):
    return read_log(out / "log.jsonl")


def test_a_line_holds_what_was_handed_over_and_the_speed_of_training_alone(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(log_module, "world_size", lambda: 4)
    monkeypatch.setattr(log_module, "peak_flops", lambda device: 1e13)
    with open_log(tmp_path, 0, 100, flops_per_image=2e11) as log:
        for _ in range(2):
            clock.now += 2
            log.count(128)
        log.write(2, {"loss": torch.tensor(1.5), "lr/vision": 1e-3})
        clock.now += 50  # the evaluation
        log.results(2, {"psnr": 20.5})
        with log.paused():
            clock.now += 70  # saving
        clock.now += 4
        log.count(128)
        with log.paused():
            clock.now += 80
            log.results(3, {})  # an evaluation between two lines
        clock.now += 4
        log.count(128)
        log.write(4, {"loss": 1.25})
    first, evaluation, second = lines(tmp_path)
    expected = {"step": 2, "loss": 1.5, "lr/vision": 1e-3, "images_per_s": 64, "tflops_per_s": 3.2, "mfu": 0.32}
    assert {name: first[name] for name in expected} == expected
    assert evaluation == {"step": 2, "eval/psnr": 20.5}
    assert second["step"] == 4 and second["images_per_s"] == 32


def test_memory_is_what_the_system_says(tmp_path):
    with open_log(tmp_path, 0, 1) as log:
        log.write(1, {"loss": 0.0})
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("nothing to compare with")
    kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    assert lines(tmp_path)[0]["memory_gib"] == pytest.approx(int(kib) / 2**20, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_on_a_gpu_is_the_most_of_the_steps_since_the_last_line(tmp_path):
    with open_log(tmp_path, 0, 3, device="cuda") as log:
        for step, gib in ((1, 2), (2, 1)):
            x = torch.empty(gib * 2**30, dtype=torch.uint8, device="cuda")
            del x
            log.write(step, {"loss": 0.0})
        x = torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
        del x
        log.results(2, {"psnr": 1.0})
        log.write(3, {"loss": 0.0})
    most = [entry["memory_gib"] for entry in lines(tmp_path) if "loss" in entry]
    assert most[0] - most[2] == pytest.approx(2, abs=0.1) and most[1] - most[2] == pytest.approx(1, abs=0.1)


def test_a_resumed_run_has_every_step_once_whatever_the_crash_left(tmp_path):
    with open_log(tmp_path, 0, 6) as log:
        for step in range(1, 6):
            log.write(step, {"loss": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with open_log(tmp_path, 3, 6) as log:
        for step in range(4, 7):
            log.write(step, {"loss": -step})
    assert [(e["step"], e["loss"]) for e in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, -4), (5, -5), (6, -6)]


def test_a_line_is_in_the_file_before_the_next_step(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, 0, 2) as log:
        log.write(1, {"loss": 2.0})
        assert lines(tmp_path)[0]["loss"] == 2.0
        raise KeyboardInterrupt


def test_pictures_are_kept_by_name_and_step(tmp_path):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    with open_log(tmp_path, 0, 1000) as log:
        log.image(600, "reconstructions", picture)
    kept = Image.open(tmp_path / "images" / "reconstructions-0000600.png")
    assert np.array_equal(np.asarray(kept), np.asarray(picture))


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_module, "rank", lambda: 1)
    with open_log(tmp_path / "run", 0, 1, log_to=("tensorboard",)) as log:
        log.count(4)
        log.write(1, {"loss": 1.0})
        log.results(1, {"psnr": 1.0})
        log.image(1, "grid", Image.new("RGB", (2, 2)))
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("tensorboard", r"pip install 'open-qlip\[tensorboard\]'"), ("wandb", "pip install wandb")],
)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, name, remedy):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=remedy):
        require([name])
    with pytest.raises(InputError, match=remedy), open_log(tmp_path / "run", 0, 1, log_to=[name]):
        pass
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(InputError, match="log_to has 'mlflow'.*tensorboard, wandb"):
        require(["mlflow"])


def test_tensorboard_reads_what_the_log_holds_and_no_step_twice_after_a_crash(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 5), (3, 7)):
        with open_log(tmp_path, start, 6, log_to=("tensorboard",)) as log:
            for step in range(start + 1, stop):
                log.count(2)
                log.write(step, {"loss": step + start / 10, "lr/vision": 1e-3})
                log.results(step, {"psnr": 20 + step})
                log.image(step, "grid", Image.new("RGB", (6, 4), (10 * step, 0, 0)))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    for name in ("loss", "lr/vision", "images_per_s", "eval/psnr"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        written = [(e["step"], e[name]) for e in lines(tmp_path) if name in e]
        assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6] == [step for step, _ in written]
        assert np.allclose([v for _, v in shown], [v for _, v in written])
    pictures = events.Images("grid")
    assert [picture.step for picture in pictures] == [1, 2, 3, 4, 5, 6]
    shown = Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    assert shown.size == (6, 4) and shown.getpixel((0, 0)) == (60, 0, 0)


def wandb_records(folder):
    """What an offline run holds: blocks of (checksum, length, type), each a protobuf record, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, i = next(folder.glob("*.wandb")).read_bytes(), 7
    while i < len(data):
        (length,) = struct.unpack_from("<H", data, i + 4)
        yield Record.FromString(data[i + 7 : i + 7 + length])
        i += 7 + length


def test_wandb_offline_keeps_values_pictures_and_the_recipe_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "recipe.json").write_text(json.dumps({"batch_size": 7}))
    with pytest.raises(RuntimeError), open_log(tmp_path, 0, 6, log_to=("wandb",)) as log:
        log.write(1, {"loss": 1.5})
        log.image(1, "grid", Image.new("RGB", (6, 4)))
        log.results(1, {"psnr": 21.0})
        raise RuntimeError
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    records = list(wandb_records(run))
    history = {item.nested_key[0]: item.value_json for r in records for item in r.history.item}
    assert json.loads(history["loss"]) == 1.5 and json.loads(history["eval/psnr"]) == 21
    config = {item.key: item.value_json for r in records for item in r.run.config.update}
    assert config["batch_size"] == "7"
    assert len(list(run.rglob("grid_1_*.png"))) == 1
    with open_log(tmp_path, 1, 6, log_to=("wandb",)) as log:
        log.write(2, {"loss": 1.25})
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb" / "id").read_text()}


def screen(width, **options):
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=50, **options)


def shown(terminal, width):
    console = screen(width)
    console.print(terminal.panel())
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_panel_fits_and_shows_everything(width):
    terminal = Terminal("training runs/[b16]", 0, 120_000, console=screen(width))
    terminal.write(40_000, {f"eval/{name}": value for name, value in (HELD_OUT | {"top1": 0.19}).items()})
    terminal.write(60_000, {f"eval/{name}": value for name, value in HELD_OUT.items()})
    terminal.write(61_230, STAGE1)
    text = shown(terminal, width)
    assert max(map(len, text.splitlines())) <= width and "training runs/[b16]" in text
    if width >= 80:
        assert text.count("\n") <= 23  # the usual 24 lines, and the cursor's
    for value in (
        "61,230/120,000",
        "51%",
        "12,350 images/s",
        "41.7%",
        "63.21",
        "0.007045",
        "-2.57",
        "2e-05",
        "1.107",
    ):
        assert value in text
    words = " ".join(text.replace("│", " ").split())
    assert "held out at step 60,000" in words
    assert "top1 0.18 (best 0.19 at 40,000)" in words and "psnr 20.98 dB ssim" in words.replace("top1", "")
    for name in ("reconstruction", "alignment", "tokens", "codebook", "vision", "distinct_tokens", "memory_gib"):
        assert name in words
    terminal.close(failed=False)


def test_best_is_the_least_of_what_should_be_small_and_survives_a_resume():
    past = [
        {
            "step": 10,
            "eval/fd_resnet50": 30.0,
            "eval/perceptual": 0.2,
            "eval/psnr": 20.0,
            "eval/ssim": float("nan"),
        }
    ]
    terminal = Terminal("training", 10, 30, past, console=screen(80))
    terminal.write(20, {"eval/fd_resnet50": 35.0, "eval/perceptual": 0.3, "eval/psnr": 21.0, "eval/ssim": 0.5})
    text = shown(terminal, 80)
    assert "fd_resnet50 35 (best 30 at 10)" in text and "psnr 21 dB " in text and "ssim 0.5" in text
    assert "perceptual 0.3 (best 0.2 at 10)" in text and text.count("best") == 2
    terminal.close(failed=False)


def test_the_first_step_is_shown_and_then_a_line_every_half_minute(clock):
    console = Console(file=io.StringIO(), width=80)
    terminal = Terminal("training", 0, 1000, console=console)
    terminal.show(1, {"loss": 1.25, "quantizer": 3.0})
    assert console.file.getvalue().startswith("step 1/1,000  loss 1.25")
    for _ in range(63):  # steps of a second, and no line of the log among them
        clock.now += 1
        terminal.count()
    assert len(console.file.getvalue().splitlines()) == 3
    terminal.write(64, {f"eval/{name}": value for name, value in (HELD_OUT | {"a_long_name": 1.0}).items()})
    assert len(console.file.getvalue().splitlines()) == 4  # none is wrapped at 80 columns


def test_a_line_after_an_evaluation_is_of_training(clock):
    console = Console(file=io.StringIO(), width=80)
    terminal = Terminal("training", 0, 1000, console=console)
    terminal.write(1, {"loss": 1.25, "images_per_s": 8.0})
    terminal.write(1, {"eval/psnr": 20.0})
    clock.now += 31
    terminal.count()
    *_, evaluation, last = console.file.getvalue().splitlines()
    assert "psnr 20" in evaluation and last.startswith("step 2/1,000  loss 1.25  images_per_s 8")
    assert "psnr" not in last


def test_the_panel_shows_that_the_first_step_is_under_way():
    terminal = Terminal("training", 0, 10, console=screen(80))
    assert "the first step is under way" in shown(terminal, 80)
    terminal.show(1, {"loss": 1.25})
    assert "1.25" in shown(terminal, 80)
    terminal.close(failed=False)


def test_time_left_follows_the_pace_and_leaves_out_the_first_step(clock):
    terminal = Terminal("training", 0, 1010, console=screen(80))
    clock.now += 300  # compiling
    terminal.count()
    for _ in range(9):
        clock.now += 3
        terminal.count()
    assert "-:--:-- left" in shown(terminal, 80)
    terminal.write(10, {"loss": 1.0})
    text = shown(terminal, 80)
    assert "10/1,010" in text and "0:05:27 elapsed" in text and "0:50:00 left" in text
    terminal.close(failed=False)


def test_a_file_gets_a_line_at_evaluations_and_every_half_minute(clock):
    console = Console(file=io.StringIO(), width=40)
    terminal = Terminal("training", 0, 100, console=console)
    for step in range(1, 101):
        clock.now += 1
        terminal.count()
        terminal.write(step, {"loss": 1 / step, "images_per_s": 64.0})
        if step == 50:
            terminal.write(step, {"eval/psnr": 21.25, "eval/top1": 0.5})
    terminal.close(failed=False)
    assert console.file.getvalue().splitlines() == [
        "step 1/100  loss 1  images_per_s 64  -:--:-- left",
        "step 31/100  loss 0.03226  images_per_s 64  0:01:09 left",
        "step 50/100  psnr 21.25 dB  top1 0.5",
        "step 80/100  loss 0.0125  images_per_s 64  0:00:20 left",
        "step 100/100  loss 0.01  images_per_s 64  0:00:00 left",
    ]


def test_messages_of_the_log_and_the_panel_share_a_console(monkeypatch):
    console = screen(80)
    monkeypatch.setattr(logging.getLogger("qlip"), "handlers", [RichHandler(console=console)])
    Terminal("training", 0, 10).close(failed=False)
    assert "training" in console.file.getvalue()
