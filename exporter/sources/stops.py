"""Which tokens end an answer, as a model's files list them."""

from collections.abc import Mapping
from typing import Any


def listed_stops(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of generation_config.json's `eos_token_id`, else of config.json's; empty where neither lists any."""
    for value in (generation_config.get("eos_token_id"), config.get("eos_token_id")):
        ids: list[Any] = value if isinstance(value, list) else [value]
        if ids and all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            return tuple(ids)
    return ()
