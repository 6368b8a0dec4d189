"""JSON from files that may be hostile: what parses here can be walked, printed and copied without surprises."""

import json
from typing import Any

DEPTH = 64  # real configurations have fewer than ten levels; a thousand end Python's stack wherever they are printed


def parse_json(data: bytes, **options: Any) -> Any:
    """The value of `data`. ValueError for what is no JSON in UTF-8, nests deeply, or holds half a surrogate pair."""
    try:
        value = json.loads(data.decode("utf-8-sig"), **options)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    _check(value)
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                item.encode()
        if not below:
            return
        level = below
    raise ValueError("it nests too deeply")
