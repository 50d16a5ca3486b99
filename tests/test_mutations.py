"""Edits that plant bugs: they match what they say, inside the function that they name, or fail."""

import pytest

from tests.mutations import Edit, NoSuchMutation, edited, mutations

SOURCE = """
def one(n):
    return n + 1


@decorated
def two(n):
    return n + 1
"""


def test_an_edit_stays_within_its_function():
    text = edited(SOURCE, [Edit(r"n \+ 1", "n", within="two"), Edit("@decorated", "@other", within="two")])
    assert text == SOURCE.replace("@decorated", "@other").replace("two(n):\n    return n + 1", "two(n):\n    return n")


@pytest.mark.parametrize(
    "edit, says",
    [
        (Edit(r"n \+ 2", "n"), "matches 0 times"),
        (Edit(r"n \+ 1", "n"), "matches 2 times, not 1"),
        (Edit("return", "return", times=2), "changes nothing"),
        (Edit("n", "m", within="three"), "0 functions or classes are called three"),
    ],
)
def test_an_edit_that_no_longer_means_anything_fails(edit, says):
    with pytest.raises(NoSuchMutation, match=says):
        edited(SOURCE, [edit])


def test_all_but_one_of_each_class_are_marked():
    first, second = mutations({"a": [], "b": []}, always=["a"])
    assert not first.marks and [mark.name for mark in second.marks] == ["mutations"]
    with pytest.raises(NoSuchMutation, match="is called c"):
        mutations({"a": []}, always=["c"])
