"""What a run looks like: its curves as a picture. The one file that imports matplotlib."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlip.errors import MissingExtra
from qlip.files import whole_file
from qlip.train.log import read_log
from qlip.train.measures import MEASURES, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]

CODE_USE = ("bit_entropy", "distinct_tokens")  # of training they have panels


def _title(found: Measure) -> str:
    return f"{found.title} ({found.unit})" if found.unit else found.title


PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "reconstruction (MSE)": ("reconstruction",),
    "alignment (nats)": ("alignment",),
    "quantizer": ("quantizer", "quantizer/*"),
    "commitment": ("commitment",),
    "perceptual": ("perceptual",),
    "adversarial": ("adversarial", "discriminator", "r1"),
    "code use (bits)": ("bit_entropy",),
    "different tokens (share)": ("distinct_tokens",),
    "gradient norm": ("grad_norm", "grad_norm/*"),
    "learning rate": ("lr", "lr/*"),
    "weight of reconstruction": ("reconstruction_weight",),
    **{f"held-out {_title(found)}": (f"eval/{name}",) for name, found in MEASURES.items() if name not in CODE_USE},
    "images a second": ("images_per_s",),
}
"""Title of a panel → patterns of the log's names that it shows."""

MAX_POINTS = 400  # of a curve; of more, neighbours are averaged
LOG_RANGE = 10  # above this ratio an axis of positive values is logarithmic


def require_matplotlib() -> None:
    """Say before a run starts that its plots need the extra.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("training draws its curves with matplotlib: pip install 'open-qlip[train]'") from error


def plot_log(log: Path, out: Path) -> None:
    """Draw the curves of a `log.jsonl`: the panels of `PANELS` that it has values for.

    Args:
        log: the file.
        out: the PNG to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    save_figure(draw_curves(read_log(log)), out)


def draw_curves(entries: Sequence[Mapping[str, float]]) -> "Figure":
    """A figure of the curves in a log's entries."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    curves = {name: points for name in names if (points := _finite(entries, name))}
    panels: dict[str, dict[str, Points]] = {}
    for title, patterns in PANELS.items():
        for name in (n for n in curves if any(fnmatch(n, pattern) for pattern in patterns)):
            total = any(other.startswith(f"{name}/") for other in curves)
            label = "all" if total else name.removeprefix(f"{patterns[0]}/")
            panels.setdefault(title, {})[label] = curves[name]
    num_columns = min(4 if len(panels) > 9 else 3, max(len(panels), 1))
    num_rows = max(math.ceil(len(panels) / num_columns), 1)
    figure = new_figure(3.4 * num_columns, 2.6 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for label, points in members.items():
            _draw(axis, points, label)
        _finish(axis, title, list(members.values()), entries[-1]["step"])
        if len(members) > 1:
            axis.legend(frameon=False, fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if panels:
        figure.supxlabel("step", fontsize=9)
    else:
        figure.set_layout_engine("none")  # which warns of a figure without axes
    return figure


def plot_calibration(
    alignment: Points, reconstruction: Points, alignment_limit: float, reconstruction_limit: float, out: Path
) -> None:
    """Draw the two runs of `qlip calibrate` and the weight that follows from where they end.

    Args:
        alignment: (step, loss) of the run with alignment only.
        reconstruction: (step, loss) of the run with reconstruction only.
        alignment_limit: estimate of L_align(∞).
        reconstruction_limit: estimate of L_mse(∞).
        out: the PNG to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = new_figure(8, 3.2)
    axes = figure.subplots(1, 2)
    runs = {
        "alignment only: contrastive loss (nats)": (alignment, alignment_limit),
        "reconstruction only: MSE": (reconstruction, reconstruction_limit),
    }
    for axis, (title, (points, limit)) in zip(axes, runs.items(), strict=True):
        points = [point for point in points if math.isfinite(point[1])]
        last = max((step for step, _ in points), default=1)
        _draw(axis, points)
        if axis is axes[1] and any(value > 0 for _, value in points):
            axis.set_yscale("log")
        _finish(axis, title, [[*points, (last, limit)]], last)
        axis.axhline(limit, color="black", linestyle="--", linewidth=1)
        place = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
        axis.annotate(f"$L(\\infty)$ ≈ {limit:.4g}", (0.03, limit), (0, 4), fontsize=9, **place)
    ratio = alignment_limit / reconstruction_limit if reconstruction_limit else math.nan
    figure.suptitle(
        f"$\\alpha_r/\\alpha_a$ ≈ {alignment_limit:.4g} / {reconstruction_limit:.4g} ≈ {ratio:.3g}", fontsize=11
    )
    figure.supxlabel("step", fontsize=9)
    save_figure(figure, out)


def _finite(entries: Sequence[Mapping[str, float]], name: str) -> Points:
    return [(int(e["step"]), e[name]) for e in entries if name in e and math.isfinite(e[name])]


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # needs no display, and no state of pyplot's

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", out: Path) -> None:
    """Write a PNG file."""
    with whole_file(out) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def _draw(axis: "Axes", points: Points, label: str = "") -> None:
    """Draw a curve; of a long one the means over equal stretches."""
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [np.mean(points[i : i + size], axis=0) for i in range(0, len(points), max(size, 1))]
    if parts:
        steps, values = zip(*parts, strict=True)
        axis.plot(steps, values, label=label, linewidth=1.3, marker="o" if len(parts) < 20 else None, markersize=3)


def _finish(axis: "Axes", title: str, curves: Sequence[Points], last_step: float) -> None:
    """Scales and title."""
    from matplotlib.ticker import MaxNLocator

    _scale(axis, title, curves)
    axis.set_xlim(0, 1.02 * last_step)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _scale(axis: "Axes", title: str, curves: Sequence[Points]) -> None:
    """A vertical axis on which neither the first steps nor a spike hides the rest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.array([value for points in curves for _, value in points])
    tops = [max(value for _, value in points) for points in curves]
    low, high = np.quantile(values, (0.02, 0.98))
    if title == "learning rate":  # from zero to zero: towers differ by factors, not times
        if min(tops) > 0 and max(tops) > LOG_RANGE * min(tops):
            axis.set_yscale("log")
            axis.set_ylim(bottom=min(tops) / 100)
    elif values.min() > 0 and high > LOG_RANGE * low:
        axis.set_yscale("log")
    elif title == "images a second":
        axis.set_ylim(0, 1.1 * max(tops))
    elif np.ptp(values) > 5 * (high - low) > 0 and axis.get_yscale() == "linear":
        axis.set_ylim(low - 0.2 * (high - low), high + 0.2 * (high - low))
    if axis.get_yscale() == "log":
        bottom, top = axis.get_ylim()
        bottom, top = axis.set_ylim(max(bottom, low / LOG_RANGE), min(top, high * LOG_RANGE))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 100 * bottom else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
