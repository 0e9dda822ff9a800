"""How much of a batch is text and how much pictures, and what exactly stands in it (paper eq. 7).

The paper mixes text-only : image→text : text→image as 60:1:3, and over the first 10,000 steps the text's share
falls linearly to 12:1:3, the "calm-down". It does not say of what these are shares. Here they are shares of
*tokens*, that is of the places in a batch's rows: documents differ in length, and what a language model forgets
or keeps goes with the tokens that it sees.

Everything is a function of the seed and the step's number alone, so that a run goes on exactly where it ended, and
each rank knows its part without asking the others:

1. A picture takes up a fixed `room`: its tokens, the longest caption and what stands around them.
2. `pictures_before(step)`: the sum of the steps' rates, rounded down. So the shares are met exactly over time.
3. Of a step's rows as few as hold them get its pictures, and are spread evenly over the batch, so that ranks have
   alike work. All that is free in them and in the other rows is text: it goes on in the endless sequence of the
   text's epochs where the row before ended.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qlip.errors import InputError

KINDS = ("text", "image_to_text", "text_to_image")


@dataclass(frozen=True)
class MixConfig:
    """The shares of text : image→text : text→image, in tokens.

    Attributes:
        mix: at the beginning.
        final_mix: from `calm_down_steps` on; before, it goes over linearly.
        calm_down_steps: 0: the final mix from the beginning.
    """

    mix: tuple[float, float, float] = (60, 1, 3)
    final_mix: tuple[float, float, float] = (12, 1, 3)
    calm_down_steps: int = 10_000

    def __post_init__(self):
        for name in ("mix", "final_mix"):
            weights = getattr(self, name)
            if len(weights) != len(KINDS) or not all(0 <= weight < float("inf") for weight in weights):
                raise InputError(f"{name} is {weights}: it must be three numbers, 0 or more")
            if not sum(weights):
                raise InputError(f"{name} sums to nothing: give text, image→text or text→image a weight above 0")
        if self.calm_down_steps < 0:
            raise InputError(f"calm_down_steps is {self.calm_down_steps}: it must be 0 or more")

    def uses(self, kind: str) -> bool:
        """Whether there is ever anything of a kind."""
        i = KINDS.index(kind)
        return self.final_mix[i] > 0 or (self.calm_down_steps > 0 and self.mix[i] > 0)

    def weights(self, steps: np.ndarray) -> np.ndarray:
        """(n,) numbers of steps, from 0 → (n, 3) weights."""
        done = np.minimum(steps / self.calm_down_steps, 1) if self.calm_down_steps else np.ones(len(steps))
        return np.array(self.mix) + done[:, None] * (np.array(self.final_mix) - np.array(self.mix))


class RowPlan(NamedTuple):
    """What stands in a row.

    Attributes:
        pictures: numbers of its pictures, counted over all steps.
        drawn: for each whether it is text→image; else it is image→text.
        text_start: the first place of its text, counted over all steps.
        text_length: how many places of it are text.
    """

    pictures: range
    drawn: list[bool]
    text_start: int
    text_length: int


class Plan:
    """What stands in each row of each step."""

    def __init__(self, config: MixConfig, batch_size: int, row_length: int, room: int, seed: int):
        """Work out the rates.

        Args:
            config: the mix.
            batch_size: rows of a step.
            row_length: places of a row, the last target included.
            room: the most places that a picture takes up.
            seed: of which pictures are drawn and which described.

        Raises:
            InputError: a picture is longer than a row, or there are more pictures than the rows hold.
        """
        self.config, self.seed = config, seed
        self.batch_size, self.row_length, self.room = batch_size, row_length, room
        self.with_pictures = config.uses(KINDS[1]) or config.uses(KINDS[2])
        self.per_row = row_length // room
        if self.with_pictures and not self.per_row:
            raise InputError(
                f"sequence_length {row_length - 1} is shorter than a picture with its caption, {room} tokens: "
                f"raise it to {room - 1} at least"
            )
        weights = config.weights(np.arange(config.calm_down_steps + 1))
        shares = weights[:, 1:].sum(1) / weights.sum(1)
        most = self.per_row * room / row_length
        shares[weights[:, 0] == 0] = most  # pictures alone; what they leave free stays empty
        if self.with_pictures and shares.max() > most:
            raise InputError(
                f"the mix asks for {shares.max():.0%} pictures, and {self.per_row} of {room} tokens fill "
                f"{most:.0%} of a row: give them less weight, or choose another sequence_length"
            )
        rates = shares * batch_size * row_length / room
        self._rates = rates * self.with_pictures
        self._sums = np.concatenate([[0.0], np.cumsum(self._rates)])

    def pictures_before(self, step: int) -> int:
        """How many pictures the steps before this one have, counted from 0."""
        within = min(step, len(self._rates))
        return int(self._sums[within] + (step - within) * self._rates[-1] + 1e-6)

    def rows(self, step: int) -> list[RowPlan]:
        """The rows of a step, counted from 0."""
        first, end = self.pictures_before(step), self.pictures_before(step + 1)
        text, described, drawn = self.config.weights(np.array([step]))[0]
        kinds = self._kinds(step, end - first, drawn / (described + drawn) if described + drawn else 0.0)
        place = step * self.batch_size * self.row_length - first * self.room
        num_rows = -(-(end - first) // max(self.per_row, 1))  # with pictures
        rows, done = [], 0
        for row in range(self.batch_size):
            with_pictures = (row + 1) * num_rows // self.batch_size > row * num_rows // self.batch_size
            count = min(self.per_row, end - first - done) if with_pictures else 0
            free = self.row_length - count * self.room
            numbers = range(first + done, first + done + count)
            rows.append(RowPlan(numbers, kinds[done : done + count], place, free if text else 0))
            place, done = place + free, done + count
        return rows

    def _kinds(self, step: int, count: int, share: float) -> list[bool]:
        """Which of a step's pictures are text→image: their share of them, rounded up or down by chance."""
        rng = np.random.default_rng((self.seed, step))
        number = int(count * share + rng.random())
        return rng.permutation(np.arange(count) < number).tolist()
