"""How good answers are, by the rules of POPE, VQAv2 (TextVQA has the same) and GQA.

Answers are JSON lines as LLaVA's evaluation writes them, `{"question_id": …, "text": …}`, or a JSON list of
objects with `answer` in the place of `text`, as VQA's server takes. They are compared with the benchmarks' own
files.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from qlip.data.values import read_text, text_of
from qlip.errors import InputError, one_line
from qlip.files import json_lines
from qlip.guarded import parse_json

Benchmark = Literal["pope", "vqa", "gqa"]

# VQA's words that are written with an apostrophe: without one of theirs they mean the same.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd "
    "you'd've you'll you're you've"
)
_WHOLE = {word[:i] + word[i + 1 :]: word for word in _APOSTROPHES.split() for i, c in enumerate(word) if c == "'"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def score(benchmark: Benchmark, answers: Path, labels: Path) -> dict[str, float]:
    """Score a file of answers.

    Args:
        benchmark: whose rules; "vqa" also reads TextVQA's labels.
        answers: see above; every question of `labels` must have one.
        labels: the benchmark's own file: POPE's JSON lines with `label`, VQA's `annotations` or TextVQA's `data`
            with `answers`, GQA's questions by id with `answer`.

    Returns:
        num_questions, and what `pope` returns, or accuracy, in [0, 1].

    Raises:
        InputError: a file cannot be read, or a question has no answer.
    """
    given = _answers(answers)
    wanted = _labels(benchmark, labels)
    missing = wanted.keys() - given.keys()
    if missing:
        raise InputError(
            f"{answers} has no answer to {len(missing)} of {len(wanted)} questions, as {min(missing)!r}"
        )
    pairs = [(given[question], label) for question, label in wanted.items()]
    if benchmark == "pope":
        return pope(pairs)
    rule = vqa_accuracy if benchmark == "vqa" else exact_match
    return {"num_questions": len(pairs), "accuracy": _mean(rule(*pair) for pair in pairs)}


def pope(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """POPE's numbers from (answer, "yes" or "no").

    An answer is no if its first sentence has the word no or not, else yes: POPE's own rule.

    Returns:
        num_questions; accuracy, precision, recall and f1 of "yes", and yes_share, in [0, 1]. What has no
        denominator is 0.
    """
    said = [(says_yes(answer), label == "yes") for answer, label in pairs]
    hits, yes = sum(a and b for a, b in said), sum(a for a, _ in said)
    precision, recall = hits / max(1, yes), hits / max(1, sum(b for _, b in said))
    return {
        "num_questions": len(said),
        "accuracy": _mean(a == b for a, b in said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / ((precision + recall) or 1),
        "yes_share": _mean(a for a, _ in said),
    }


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer."""
    return not {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split())


def vqa_accuracy(answer: str, people: list[str]) -> float:
    """VQA's soft accuracy against the answers of ten people: min(n/3, 1), n of nine of them having said the same.

    It is the mean over who of the ten is left out. All answers are normalised before, also where the ten agree
    (VQA's script leaves those as they are, and its server takes what was normalised before).
    """
    answer, people = normalize_answer(answer), [normalize_answer(one) for one in people]
    same = sum(one == answer for one in people)
    return _mean(min((same - (one == answer)) / 3, 1.0) for one in people)


def exact_match(answer: str, label: str) -> float:
    """GQA's accuracy, of the answer in lower case without the dot at its end."""
    return float(answer.strip().rstrip(".").lower() == label.strip().lower())


def normalize_answer(text: str) -> str:
    """An answer as VQA compares them: no articles, digits for numbers, apostrophes put back, no punctuation."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    kept = text
    digits_apart = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        inside = not (f"{mark} " in text or f" {mark}" in text or digits_apart)
        kept = kept.replace(mark, " " if inside else "")
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", kept).lower().split()]
    return " ".join(_WHOLE.get(word, word) for word in words if word not in ("a", "an", "the"))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / max(1, len(numbers))


def _answers(path: Path) -> dict[str, str]:
    """By question; null is an empty answer."""
    try:
        pairs = [(str(e["question_id"]), said(e["text"] if "text" in e else e["answer"])) for e in _entries(path)]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: an answer has no {error}: each needs question_id and text or answer") from error
    return _by_question(path, pairs)


def _labels(benchmark: Benchmark, path: Path) -> dict[str, Any]:
    """By question."""
    found = _entries(path)
    try:
        if benchmark == "gqa":
            assert isinstance(found, Mapping)
            return {str(key): said(entry["answer"]) for key, entry in found.items()}
        if benchmark == "pope":
            pairs: list[tuple[str, Any]] = [(str(e["question_id"]), e["label"].lower()) for e in found]
        else:
            entries = found.get("annotations", found.get("data")) if isinstance(found, Mapping) else found
            pairs = [(str(e["question_id"]), [_person(one) for one in e["answers"]]) for e in entries]
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not the labels of {benchmark} ({error!r}): name the benchmark's own file"
        ) from error
    return _by_question(path, pairs)


def said(value: Any) -> str:
    """An answer as text: null and NaN are nothing, numbers are as they are written.

    Raises:
        InputError: it is a list, an object, or no valid text.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    try:
        return text_of(value) or ""
    except InputError as error:
        raise InputError(f"an answer {error}: fix it") from error


def _person(answer: Any) -> str:
    return said(answer["answer"] if isinstance(answer, Mapping) else answer)


def _by_question(path: Path, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for question, value in pairs:
        if question in found:
            raise InputError(f"{path} has two entries for question {question!r}: keep one")
        found[question] = value
    return found


def _entries(path: Path) -> Any:
    """JSON, or JSON lines."""
    try:
        try:
            found = parse_json(read_text(path))
            return [found] if isinstance(found, dict) and "question_id" in found else found
        except ValueError:
            return [entry for _, _, entry in json_lines(path)]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(error)}): name a file of JSON or JSON lines"
        ) from error
