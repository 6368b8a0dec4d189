"""Regular expressions in an adapter's configuration, bounded before anything matches them.

Python's `re` tries every way to split a text among a pattern's repetitions: `(a+)+$` takes 2^n steps on n letters, and
PEFT matches such patterns of the configuration against the name of every module.
"""

import importlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused

LENGTH = 4096
NAME = 64  # letters of a long module name
STEPS = 2_000_000  # per name, for all patterns together: about 40 ms
PREFIX = 1  # PEFT puts `(.*\.)?` before the patterns of ranks and alphas
MAPS, TEXTS = ("rank_pattern", "alpha_pattern"), ("target_modules", "exclude_modules", "layers_pattern")
_parser: Any = importlib.import_module("re._parser")


def check_patterns(config: Mapping[str, Any], path: Path) -> None:
    """InputRefused where a pattern is no regular expression, or could take more than STEPS for one name."""
    steps: dict[str, int] = {}
    for field, pattern, unbounded in _patterns(config):
        try:
            if len(pattern) > LENGTH:
                raise ValueError(f"it has {len(pattern)} letters")
            most = unbounded + repetitions(_parser.parse(pattern))
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            raise InputRefused(
                f"{path}: {field} has the pattern {pattern[:80]!r} ({error})",
                expected=f"a regular expression of at most {LENGTH} letters, with no repetition inside another",
                todo="write the names of the modules out",
            ) from error
        # The ways to place `most` borders in a name. Plain names, of which there may be thousands, take one step.
        steps[field] = steps.get(field, 0) + (math.comb(NAME + most, most) if most > unbounded else 1)
    if sum(steps.values()) > STEPS:
        raise InputRefused(
            f"{path}: the patterns of {' and '.join(steps)} could take {sum(steps.values()):.1e} steps for one name",
            expected=f"at most {STEPS:.0e}",
            todo="write the names of the modules out instead of repetitions such as .*",
        )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    for field in MAPS:
        value = config.get(field)
        if isinstance(value, dict):
            yield from ((field, key, PREFIX) for key in value)
    for field in TEXTS:
        value = config.get(field)
        if isinstance(value, str):
            yield field, value, 0
        elif field == "layers_pattern" and isinstance(value, list):
            yield from ((field, one, PREFIX) for one in value if isinstance(one, str))


def repetitions(parsed: Any) -> int:
    """How many repetitions of variable length a match may have to place. ValueError where one is inside another."""
    total = 0
    for operator, argument in parsed:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            inner = repetitions(body)
            if int(most) > 1 and (inner or _has_branch(body)):
                raise ValueError("a repetition or a choice is repeated")
            total += inner + (least != most)
        elif name == "BRANCH":
            total += max(map(repetitions, argument[1]))
        elif name == "SUBPATTERN":
            total += repetitions(argument[-1])
        elif name in ("ASSERT", "ASSERT_NOT"):
            total += repetitions(argument[1])
        elif name == "ATOMIC_GROUP":
            total += repetitions(argument)
        elif name == "GROUPREF_EXISTS":
            total += max(repetitions(argument[1]), repetitions(argument[2] or []))
    return total


def _has_branch(parsed: Any) -> bool:
    return any(
        str(operator) in ("BRANCH", "GROUPREF_EXISTS")
        or (str(operator) == "SUBPATTERN" and _has_branch(argument[-1]))
        or (str(operator) == "ATOMIC_GROUP" and _has_branch(argument))
        for operator, argument in parsed
    )
