"""What files hold becomes text, a label or nothing, and never Python's spelling of something else."""

import datetime
from decimal import Decimal

import pytest

from qlip.data.values import about_of, decode, label_of, lines, text_of, texts_of
from qlip.errors import InputError

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("value", [None, NAN, "", " \n", b" "])
def test_what_is_no_text(value):
    assert text_of(value) is None and texts_of([value]) == [] and about_of(value) is None


def test_text_of_strings_and_bytes():
    assert text_of("a cat") == text_of(b"a cat") == text_of(b"\xef\xbb\xbfa cat") == text_of(bytearray(b"a cat"))
    assert texts_of(["a", None, b"b", NAN]) == ["a", "b"] and texts_of("a") == ["a"]


@pytest.mark.parametrize(
    "value", [3, True, 3.5, INFINITE, {"en": "a"}, ["a"], ("en", "a"), b"\xff", "\ud800", Decimal(3)]
)
def test_what_is_refused_as_text(value):
    with pytest.raises(InputError):
        text_of(value)


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3 ", "3.0", b"3\n", "+3", Decimal(3), "003"])
def test_what_is_label_3(value):
    label = label_of(value)
    assert label == 3 and type(label) is int


@pytest.mark.parametrize("value", [None, NAN, "", "NaN", "NA", "null", b""])
def test_what_is_no_label(value):
    assert label_of(value) is None


@pytest.mark.parametrize(
    "value", ["cat", 3.5, "3.5", True, INFINITE, 2**63, "9" * 40, [3], {"id": 3}, "1_000", b"\xff"]
)
def test_what_is_refused_as_a_label(value):
    with pytest.raises(InputError):
        label_of(value)


def test_facts_about_a_sample_are_text_in_a_stated_form():
    assert about_of(datetime.date(2020, 1, 2)) == "2020-01-02"
    assert about_of(datetime.datetime(2020, 1, 2, 3, 4)) == "2020-01-02T03:04:00"
    assert about_of(Decimal("1.50")) == "1.50" and about_of(7) == "7" and about_of(b"me") == "me"
    assert about_of(["CC0", datetime.date(2020, 1, 2)]) == '["CC0", "2020-01-02"]'
    for value in (b"\xff", "\ud800", [object()]):
        with pytest.raises(InputError):
            about_of(value)


def test_lines_end_at_line_feeds_alone():
    assert lines("a\u2028b\u0085c\x0bd\r\n\n e \n") == ["a\u2028b\u0085c\x0bd", "e"]


def test_encodings_that_are_not_utf8_are_named():
    assert decode("\ufeffä".encode()) == "ä"
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 0xe9 at 3\): save it as UTF-8"):
        decode("café".encode("latin-1"))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        with pytest.raises(InputError, match="is UTF-16 or UTF-32"):
            decode("a cat".encode(encoding))
