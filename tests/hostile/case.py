"""A case: what is done to a good model, and which commands have to refuse the result, with which exit codes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.material import Tree

PAIR = ("inspect", "merge", "export separate", "capture", "verify")  # what reads a base or an adapter
REFUSED = (4,)
DONE = (0,)


@dataclass(frozen=True)
class Case:
    """`name` is its pytest id. `damage` changes the files; `says`: a part of the message of every command."""

    name: str
    damage: Callable[[Tree], object]
    commands: tuple[str, ...]
    codes: tuple[int, ...] = REFUSED
    says: str = ""


def dump(document: Any) -> bytes:
    """JSON with what Python adds to it: NaN, Infinity, numbers of any length."""
    return json.dumps(document).encode()


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """A JSON file with `change` applied: what it returns, or the document that it changed."""
    document = json.loads(path.read_bytes())
    replaced = change(document)
    path.write_bytes(dump(document if replaced is None else replaced))


def with_key(*keys: Any, value: Any) -> Callable[[Any], Any]:
    """A change that sets the value under a path of keys."""

    def change(document: Any) -> None:
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def without(*keys: Any) -> Callable[[Any], Any]:
    """A change that removes the value under a path of keys."""

    def change(document: Any) -> None:
        place = document
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change
