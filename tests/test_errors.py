"""The error that a user sees: one line of what is wrong, what to do about it, and whose it is."""

from __future__ import annotations

import pickle

import pytest

from fedgrove.errors import FedgroveError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FedgroveError("a.csv, line 2: not CSV"), "a.csv, line 2: not CSV"),
        (FedgroveError("length is 4", "raise it"), "length is 4; raise it"),
        (FedgroveError("out of memory", client="ash"), "client 'ash': out of memory"),
        (FedgroveError("out of memory", "lower length", client="ash"), "client 'ash': out of memory; lower length"),
        (FedgroveError("two\nlines", "of  advice\n"), "two lines; of advice"),
        (FedgroveError("said in one; with its remedy"), "said in one; with its remedy"),
    ],
)
def test_an_error_is_one_line(error: FedgroveError, line: str) -> None:
    assert str(error) == line


def test_its_parts_are_there_for_whoever_shows_them() -> None:
    error = FedgroveError("out of memory", "lower length", client="ash")
    assert (error.what, error.remedy, error.client) == ("out of memory", "lower length", "ash")
    error = FedgroveError("said in one; with its remedy")
    assert (error.what, error.remedy, error.client) == ("said in one; with its remedy", None, None)


def test_an_error_comes_whole_out_of_another_process() -> None:
    error = pickle.loads(pickle.dumps(FedgroveError("out of memory", "lower length", client="ash")))
    assert (error.what, error.remedy, error.client) == ("out of memory", "lower length", "ash")
    assert str(error) == "client 'ash': out of memory; lower length"
    error = pickle.loads(pickle.dumps(Coded(3, remedy="lower length")))
    assert (str(error), error.number) == ("error 3; lower length", 3)


class Coded(FedgroveError):
    def __init__(self, number: int, remedy: str | None = None):
        super().__init__(f"error {number}", remedy)
        self.number = number
