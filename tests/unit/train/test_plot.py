import math
import warnings

import numpy as np
import pytest
from PIL import Image

from qlip.errors import InputError
from qlip.train import plot
from qlip.train.plot import draw_curves, plot_calibration, plot_log


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def legend(axis):
    return {text.get_text() for text in axis.get_legend().get_texts()} if axis.get_legend() else set()


def test_both_stages_get_the_panels_that_they_have_values_for():
    stage1 = {
        "loss": 4.0,
        "reconstruction": 0.1,
        "alignment": 3.0,
        "quantizer/tokens": 2.0,
        "quantizer/codebook": -2.5,
    }
    stage1 |= {"grad_norm": 3.0, "grad_norm/vision": 1.0, "lr/vision": 1e-4, "lr/text": 1e-5, "bit_entropy": 27.0}
    stage2 = {
        "loss": 1.0,
        "perceptual": 0.3,
        "adversarial": 0.7,
        "discriminator": 1.2,
        "grad_norm/discriminator": 1.0,
    }
    stage2 |= {"images_per_s": 60.0}
    found = panels(draw_curves([{"step": 1} | stage1, {"step": 2} | stage1, {"step": 2, "eval/psnr": 20.0}]))
    assert {"loss", "alignment (nats)", "held-out PSNR (dB)"} <= found.keys()
    assert not {"perceptual", "adversarial", "held-out top-1"} & found.keys()
    assert legend(found["quantizer"]) == {"tokens", "codebook"}
    assert legend(found["gradient norm"]) == {"all", "vision"} and legend(found["learning rate"]) == {
        "vision",
        "text",
    }
    found = panels(draw_curves([{"step": 1} | stage2]))
    assert legend(found["adversarial"]) == {"adversarial", "discriminator"}
    assert {"perceptual", "images a second"} <= found.keys() and "alignment (nats)" not in found


@pytest.mark.parametrize("first", [1e4, 1e30])
def test_the_first_steps_do_not_hide_the_rest(first):
    entries = [{"step": i, "loss": (first if i < 5 else 0) + 5 + math.sin(i)} for i in range(1, 400)]
    bottom, top = panels(draw_curves(entries))["loss"].get_ylim()
    assert bottom < 4 and top > 6 and (top - bottom < 10 or top / bottom < 100)


def test_a_spike_does_not_hide_the_rest_and_what_is_not_a_number_is_left_out():
    entries = [
        {"step": i, "grad_norm": 1e9 if i == 70 else 3 + math.sin(i), "loss": math.nan} for i in range(1, 400)
    ]
    entries[5]["grad_norm"] = math.inf
    found = panels(draw_curves(entries))
    assert found.keys() == {"gradient norm"} and found["gradient norm"].get_ylim()[1] < 10


def test_towers_whose_rates_differ_by_factors_are_all_seen():
    entries = [
        {"step": i, "lr/decoder": 2e-3 * (1 - i / 400), "lr/text": 2e-5 * (1 - i / 400)} for i in range(1, 401)
    ]
    axis = panels(draw_curves(entries))["learning rate"]
    assert axis.get_yscale() == "log" and axis.get_ylim()[0] < 1e-6 and axis.get_ylim()[1] > 2e-3


def test_long_runs_are_drawn_as_means_of_neighbours():
    steps = np.arange(1, 120_001, 10)
    entries = [{"step": int(step), "alignment": 3 - step / 1e5} for step in steps]
    (line,) = panels(draw_curves(entries))["alignment (nats)"].lines
    assert len(line.get_xdata()) <= 400
    assert np.allclose(line.get_ydata(), 3 - line.get_xdata() / 1e5)


@pytest.mark.parametrize(
    "text", ["", '{"step": 1, "loss": 3.0}\n', '{"step": 1, "loss": 0.0}\n{"step": 2, "loss": 0.0}\n']
)
def test_a_run_that_has_hardly_begun(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    plot_log(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size > (100, 100)


def calibration(tmp_path, monkeypatch, *args):
    figures = []
    save = plot.save_figure
    monkeypatch.setattr(plot, "save_figure", lambda figure, out: (figures.append(figure), save(figure, out)))
    plot_calibration(*args, tmp_path / "calibration.png")
    assert Image.open(tmp_path / "calibration.png").size > (600, 200)
    return figures[0]


def test_calibration_shows_both_limits_and_the_weight(tmp_path, monkeypatch):
    alignment = [(i, 3 + 1000 / i**3) for i in range(10, 1000, 10)]
    reconstruction = [(i, 0.006 + 10 / i**2) for i in range(10, 1000, 10)]
    figure = calibration(tmp_path, monkeypatch, alignment, reconstruction, 3.0, 0.006)
    assert figure.get_suptitle().endswith("3 / 0.006 ≈ 500")
    for axis, limit, scale in zip(figure.axes, (3.0, 0.006), ("linear", "log"), strict=True):
        assert axis.get_yscale() == scale and axis.texts[0].get_text().endswith(f"{limit:g}")
        assert axis.get_ylim()[0] < limit < axis.get_ylim()[1]
        assert limit in axis.lines[1].get_ydata()


def test_calibration_of_runs_that_went_wrong(tmp_path, monkeypatch):
    alignment = [(1, 1e12), (2, math.nan), (3, 5.0), (4, 5.0)]
    figure = calibration(tmp_path, monkeypatch, alignment, [(1, 0.0), (2, 0.5)], 5.0, 0.5)
    assert figure.axes[0].get_ylim()[0] < 5
    calibration(tmp_path, monkeypatch, [], [(1, math.inf)], 1.0, 1.0)


def test_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[train\]'"):
        plot_calibration([(1, 1.0)], [(1, 1.0)], 1.0, 1.0, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
