"""What a person sees of a run while it goes."""

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlip.train.measures import measure
from qlip.train.trackers import Sink

PLAIN_EVERY_S, DRAW_EVERY_S = 30, 1  # drawing takes 13 ms
_EVALUATION = "eval/"  # before the names of an evaluation's numbers
PANEL_WIDTH, COLUMN_WIDTH = 120, 25  # at most, at least

_TITLES = {"grad_norm": "gradient norm", "lr": "learning rate"}
_RUN = ("memory_gib", "tflops_per_s", "mfu", "logit_scale", "reconstruction_weight")


class Terminal(Sink):
    """A panel on stderr that a person watches; a line now and then where nobody does, as in a file.

    It is drawn when a step ends and by no thread of its own: processes that decode images are forked from this
    one, and would inherit a lock that such a thread holds.
    """

    def __init__(
        self,
        title: str,
        start_step: int,
        total_steps: int,
        past: Sequence[dict[str, float]] = (),
        console: Console | None = None,
    ):
        """Start drawing.

        Args:
            title: of the panel.
            start_step: the last step that is done.
            total_steps: of the run.
            past: entries of the log until then.
            console: None takes the one that the log's messages go to, so that they stand above the panel.
        """
        self._title, self._step, self._total = title, start_step, total_steps
        self._console = console or _console()
        self._begin = time.monotonic()
        self._drawn = self._shown = -math.inf  # when the panel was, and values were
        self._marks: deque[tuple[float, int]] = deque(maxlen=50)  # when which step was done
        self._latest: dict[str, float] = {}
        self._best: dict[str, tuple[float, int]] = {}
        self._evaluated = 0
        self._live: Live | None = None
        for entry in past:
            self._take(int(entry["step"]), entry)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self.panel, console=self._console, auto_refresh=False)
            self._live.start(refresh=True)

    def count(self) -> None:
        """Move the bar."""
        self._step += 1
        if not self._marks:  # not before the first step is over, which may compile for minutes
            self._marks.append((time.monotonic(), self._step))
        if self._live:
            if time.monotonic() - self._drawn >= DRAW_EVERY_S:
                self._draw()
        elif self._latest and time.monotonic() - self._shown > PLAIN_EVERY_S:  # the log's lines are far apart
            self._print({name: value for name, value in self._latest.items() if not name.startswith(_EVALUATION)})

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show the first step's values as soon as they are there."""
        self._step = step
        self._latest |= values
        if self._live:
            self._draw()
        else:
            self._print(values)

    def write(self, step: int, entry: dict[str, float]) -> None:
        """Show the values."""
        self._step = step
        self._take(step, entry)
        evaluated = _is_evaluation(entry)
        if not evaluated:
            self._marks.append((time.monotonic(), step))
        age = time.monotonic() - self._shown
        if evaluated or step == self._total or age >= (DRAW_EVERY_S if self._live else PLAIN_EVERY_S):
            self._shown = time.monotonic()
            if self._live:
                self._draw()
            else:
                self._print(entry)

    def close(self, failed: bool) -> None:
        """Leave the panel as it is."""
        if self._live:
            self._live.stop()

    def line(self, entry: dict[str, float]) -> str:
        """An entry as a line of plain text."""
        words = [f"step {self._step:,}/{self._total:,}"]
        if _is_evaluation(entry):
            words += [
                f"{name.removeprefix(_EVALUATION)} {_with_unit(name, value)}"
                for name, value in entry.items()
                if name != "step"
            ]
        else:
            names = ("loss", "images_per_s", "mfu")
            words += [f"{name} {_number(name, entry[name])}" for name in names if name in entry]
            words.append(f"{self._left()} left")
        return "  ".join(words)

    def panel(self) -> Panel:
        """The whole view: progress, then the latest values by groups, then the evaluations."""
        width = min(self._console.width, PANEL_WIDTH)
        rate = self._latest.get("images_per_s")
        elapsed = timedelta(seconds=int(time.monotonic() - self._begin))
        times = [f"{elapsed} elapsed", f"{self._left()} left" if self._marks else "the first step is under way"]
        times += [f"{_number('images_per_s', rate)} images/s"] if rate else []
        bar = Table.grid(expand=True, padding=(0, 1, 0, 0))
        bar.add_column(ratio=1)
        bar.add_row(
            ProgressBar(self._total, self._step),
            f"{self._step:,}/{self._total:,}",
            f"{self._step / self._total:.0%}",
        )
        parts: list[RenderableType] = [bar, Text("  ·  ".join(times), style="dim")]
        if groups := _groups(self._latest):
            parts += [Text(), _in_columns(groups, max(1, (width - 4) // COLUMN_WIDTH))]
        if self._best:
            parts += [Text(), Text(f"held out at step {self._evaluated:,}", style="bold"), self._results()]
        return Panel(Group(*parts), title=Text(self._title), title_align="left", border_style="dim", width=width)

    def _results(self) -> Columns:
        cells = []
        for name, (best, step) in self._best.items():
            value = self._latest[name]
            cell = Text.assemble((f"{name.removeprefix(_EVALUATION)} ", "cyan"), _with_unit(name, value))
            if value != best:
                cell.append(f" (best {_number(name, best)} at {step:,})", style="dim")
            cells.append(cell)
        return Columns(cells, padding=(0, 3))

    def _take(self, step: int, entry: dict[str, float]) -> None:
        self._latest |= entry
        for name, value in entry.items():
            if name.startswith(_EVALUATION) and math.isfinite(value):
                self._evaluated = step
                if name not in self._best or measure(name.removeprefix(_EVALUATION)).is_better(
                    value, self._best[name][0]
                ):
                    self._best[name] = value, step

    def _left(self) -> str:
        """Time to the end, at the pace of the last lines, evaluations and saving included."""
        if len(self._marks) < 2 or self._marks[-1][1] == self._marks[0][1]:
            return "-:--:--"
        (since, first), (until, last) = self._marks[0], self._marks[-1]
        return str(timedelta(seconds=int((until - since) / (last - first) * (self._total - self._step))))

    def _print(self, entry: dict[str, float]) -> None:
        """Print a line where nobody watches; it is not wrapped, so that a file can be searched."""
        self._shown = time.monotonic()
        self._console.print(self.line(entry), soft_wrap=True, highlight=False, markup=False)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._live:
            self._live.refresh()


def _console() -> Console:
    """The console of the log's messages, or a new one on stderr."""
    handlers = logging.getLogger("qlip").handlers
    return next((h.console for h in handlers if hasattr(h, "console")), None) or Console(stderr=True)


def _is_evaluation(entry: dict[str, float]) -> bool:
    return any(name.startswith(_EVALUATION) for name in entry)


def _with_unit(name: str, value: float) -> str:
    """A number of an evaluation."""
    return f"{_number(name, value)} {measure(name.removeprefix(_EVALUATION)).unit}".rstrip()


def _groups(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Values of a training step by what they are about, under short names; what is not known is a loss."""
    groups: dict[str, dict[str, float]] = {"losses": {}}
    for name, value in values.items():
        family, _, member = name.partition("/")
        if family in ("step", "images_per_s", "eval"):
            continue
        if member or family in ("grad_norm", "lr"):
            title, name = family, member or "all"
        elif family in _RUN:
            title = "run"
        else:
            title = "codes" if "entropy" in name or "tokens" in name else "losses"
        groups.setdefault(_TITLES.get(title, title), {})[name] = value
    return {title: members for title, members in groups.items() if members}


def _in_columns(groups: dict[str, dict[str, float]], num_columns: int) -> Table:
    """Groups side by side; each goes under the shortest column."""
    columns: list[list[RenderableType]] = [[] for _ in range(min(num_columns, len(groups)))]
    heights = [0] * len(columns)
    for title, members in groups.items():
        shortest = heights.index(min(heights))
        table = Table.grid(expand=True, padding=(0, 1, 0, 0))
        table.add_column(ratio=1, no_wrap=True, style="cyan")
        table.add_column(justify="right", no_wrap=True)
        for name, value in members.items():
            table.add_row(name, _number(name, value))
        columns[shortest] += [Text()] * bool(columns[shortest]) + [Text(title, style="bold"), table]
        heights[shortest] += len(members) + 2
    side_by_side = Table.grid(expand=True, padding=(0, 3, 0, 0))
    for _ in columns:
        side_by_side.add_column(ratio=1)
    side_by_side.add_row(*(Group(*column) for column in columns))
    return side_by_side


def _number(name: str, value: float) -> str:
    if name == "mfu":
        return f"{value:.1%}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
