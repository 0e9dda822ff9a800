"""Two hundred inputs of the fuzzer; `make fuzz` reads 300,000."""

from dataclasses import replace

import pytest
from tests.fuzz.run import change, fuzz
from tests.fuzz.targets import targets

KINDS = targets()


@pytest.mark.parametrize("kind", KINDS)
def test_good_inputs_are_read(kind, tmp_path):
    for seed in KINDS[kind].seeds:
        (tmp_path / KINDS[kind].name).write_bytes(seed)
        KINDS[kind].read(tmp_path / KINDS[kind].name)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged images
def test_changed_inputs_give_a_result_or_an_input_error():
    failures, good = fuzz(range(200))
    assert not failures
    assert good.total() > 20  # they are not all refused at the first byte


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_the_same_in_every_run(kind):
    assert [change(KINDS[kind], number) for number in range(5)] == [change(KINDS[kind], n) for n in range(5)]


def test_a_reader_that_fails_or_hangs_is_reported(monkeypatch):
    def hang(path):
        while True:
            pass

    monkeypatch.setattr("tests.fuzz.run.MOST_S", 1)
    for read, reason in ((hang, "TooSlow"), (lambda path: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr(
            "tests.fuzz.run.targets", lambda read=read: {"a": replace(KINDS["prompts"], read=read)}
        )
        ((failure,), _) = fuzz(range(1))
        assert failure.number == 0 and reason in failure.reason
