"""What a run looks like: the loss curves as a picture. The one file that imports matplotlib."""

from pathlib import Path

from qlip.errors import InputError
from qlip.train.log import read_log

PANELS = {
    "loss": ("loss",),
    "reconstruction (MSE)": ("reconstruction",),
    "alignment (nats)": ("alignment",),
    "code use (bits)": ("bit_entropy",),
    "held-out PSNR (dB)": ("eval/psnr",),
    "held-out top-1": ("eval/top1",),
}


def require_matplotlib() -> None:
    """Say before a run starts that its plots need the extra.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("training draws its curves with matplotlib: pip install 'open-qlip[train]'") from error


def plot_log(log: Path, out: Path) -> None:
    """Draw the curves of a `log.jsonl`.

    Args:
        log: the file.
        out: the PNG to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    entries = read_log(log)
    panels = {title: names for title, names in PANELS.items() if any(names[0] in e for e in entries)}
    figure = Figure(figsize=(10, 2.8 * ((len(panels) + 2) // 3)), layout="constrained")
    axes = figure.subplots((len(panels) + 2) // 3, 3, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(e["step"], e[name]) for e in entries if name in e]
            axis.plot(*zip(*points, strict=True), label=name, marker="o" if name.startswith("eval") else None)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.savefig(out, dpi=110)
