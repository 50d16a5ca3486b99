r"""Bugs planted on purpose, which a test has to notice: where an edit applies, and which of them run by default.

An edit is anchored by what it changes, not by how that is spelled today: a regular expression, inside one function if
need be. One that does not match exactly as often as it says is an error, so that a rename cannot silently disable it.

    MUTATIONS = {"the tail is not masked": [Edit(r"mask = \w+ < n\b", "mask = True", within="_kernel")], …}

    @pytest.mark.parametrize("name", mutations(MUTATIONS, always=["the tail is not masked"]))

`always` names one for each class of failure; the others run by `pytest -m mutations`.
"""

import ast
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pytest


class NoSuchMutation(ValueError):
    """The source has changed so that an edit means nothing any more."""


@dataclass(frozen=True)
class Edit:
    """Replace what `pattern` matches (`times` times, in the function `within`) by `replacement`, as re.sub does."""

    pattern: str
    replacement: str
    within: str | None = None
    times: int = 1


def edited(text: str, edits: Iterable[Edit]) -> str:
    """The source with all edits. NoSuchMutation where one does not match, or changes nothing."""
    for edit in edits:
        start, end = span_of(text, edit.within) if edit.within else (0, len(text))
        part, found = re.subn(edit.pattern, edit.replacement, text[start:end])
        if found != edit.times:
            where = f" in {edit.within}" if edit.within else ""
            raise NoSuchMutation(f"{edit.pattern!r} matches {found} times{where}, not {edit.times}")
        if part == text[start:end]:
            raise NoSuchMutation(f"{edit.pattern!r}: the replacement changes nothing")
        text = text[:start] + part + text[end:]
    return text


def span_of(text: str, name: str) -> tuple[int, int]:
    """Where the function or class of that name begins, decorators included, and ends."""
    nodes = [node for node in ast.walk(ast.parse(text)) if getattr(node, "name", None) == name]
    if len(nodes) != 1:
        raise NoSuchMutation(f"{len(nodes)} functions or classes are called {name}")
    (node,) = nodes
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return sum(map(len, lines[: first - 1])), sum(map(len, lines[: node.end_lineno]))


def mutations(table: Collection[str], always: Collection[str]) -> list[Any]:
    """Names of the table as parameters; those not in `always` are marked `mutations`."""
    if unknown := set(always) - set(table):
        raise NoSuchMutation(f"no mutation is called {', '.join(sorted(unknown))}")
    marks = {name: () if name in always else (pytest.mark.mutations,) for name in table}
    return [pytest.param(name, marks=marks[name], id=name) for name in table]
