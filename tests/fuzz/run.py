"""Read changed files of every kind: `python -m tests.fuzz.run`. Only a result or an InputError may come of it.

Input number `i` is the same in every run: a failure names it, and `--first i --inputs 1` reads it again.
"""

import argparse
import logging
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import Target, targets

from qlip.errors import InputError

MOST_S = 10
MOST_BYTES = 2 << 30
REPORTED = 3  # failures of a kind and a line of code


@dataclass(frozen=True)
class Failure:
    """An input that ended in something else.

    Attributes:
        number: of the input.
        kind: of file.
        reason: the exception's last lines.
    """

    number: int
    kind: str
    reason: str


class TooSlow(BaseException):
    """Reading took longer than `MOST_S`. No Exception: nobody may catch it."""


def fuzz(numbers: range, kinds: tuple[str, ...] = ()) -> tuple[list[Failure], Counter[str]]:
    """Read inputs.

    Args:
        numbers: of the inputs.
        kinds: of files, by the names in `targets`; empty: all.

    Returns:
        the failures, and how many inputs of each kind were read without an error.
    """
    chosen = {name: target for name, target in targets().items() if not kinds or name in kinds}
    failures, good = [], Counter[str]()
    for number in numbers:
        kind = list(chosen)[number % len(chosen)]
        with tempfile.TemporaryDirectory(prefix="qlip-fuzz-") as folder:
            reason = _read(chosen[kind], number, Path(folder))
        if reason:
            failures.append(Failure(number, kind, reason))
        elif reason is None:
            good[kind] += 1
    return failures, good


def change(target: Target, number: int) -> bytes:
    """Input `number`."""
    rng = random.Random(number)
    return target.change(rng, rng.choice(target.seeds))


def _read(target: Target, number: int, folder: Path) -> str | None:
    """What went wrong; empty after an InputError, None if nothing did."""
    path = folder / target.name
    path.write_bytes(change(target, number))
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(MOST_S)
    try:
        target.read(path)
    except InputError:
        return ""
    except (Exception, TooSlow):
        return "".join(traceback.format_exc().splitlines(keepends=True)[-7:])
    finally:
        signal.alarm(0)
    return None


def _too_slow(*_: object) -> None:
    raise TooSlow


def limit_memory() -> None:
    """Let this process have `MOST_BYTES` more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, resource.RLIM_INFINITY))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=300_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--kinds", nargs="*", default=(), help="of files; all by default")
    parser.add_argument("--keep", type=Path, help="folder for inputs that failed")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    limit_memory()
    failures, good = fuzz(range(options.first, options.first + options.inputs), tuple(options.kinds))
    seen: Counter[tuple[str, ...]] = Counter()
    for failure in failures:
        place = (failure.kind, *failure.reason.splitlines()[-3:])
        seen[place] += 1
        if seen[place] <= REPORTED:
            print(f"input {failure.number:,} ({failure.kind}):\n{failure.reason}")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                target = targets()[failure.kind]
                (options.keep / f"{failure.number}-{target.name}").write_bytes(change(target, failure.number))
    print(f"{options.inputs:,} inputs, {len(failures):,} failures, {sum(good.values()):,} read without an error")
    print(", ".join(f"{kind} {count:,}" for kind, count in sorted(good.items())), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
