"""The same tokens fed in other ways: decoded with a cache, in chunks, in padded batches. The answer must not change."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.parity.gates import Comparison
from exporter.parity.graphs import Fed, GraphSession
from exporter.parity.result import CacheCheck
from exporter.parity.statistics import PairTokens, compare, concatenate, score
from exporter.runtime.runner import Runner

Float32 = NDArray[np.float32]
DECODED = 8  # tokens decoded one by one in a check
LONGEST = 96  # tokens of a row in a check, but for the one at the end of the context


def check_cache(runner: Runner, rows: Sequence[Sequence[int]], whole_context: bool) -> list[tuple[str, PairTokens]]:
    """Prefill against cached decoding, through the Runner as users run it. `rows`: token ids of a few documents."""
    row = list(max(rows, key=len))[:LONGEST]
    full = runner.logits(row)
    found = []
    for name, past in (("past 1", 1), ("past middle", len(row) // 2)):
        stop = min(len(row), past + DECODED)
        found.append((f"decode, {name}", pair(full[past:stop], decode_from(runner, row[:stop], past))))
    found.append(("prefill in chunks of 7", pair(full, runner.logits(row, chunk=7))))
    found.append(("decode, batch of unequal rows", _ragged(runner, [list(one)[:LONGEST] for one in rows[:3]])))
    if whole_context:
        found.append((f"decode, past {runner.n_positions - 1}", _last_position(runner, rows)))
    return found


def decode_from(runner: Runner, row: Sequence[int], past: int) -> Float32:
    """(len(row) - past, V): prefill `past` tokens, then one token a call."""
    cache = runner.new_cache(1)
    runner.prefill(cache, 0, row[:past])
    return np.concatenate([runner.decode(cache, [token]) for token in row[past:]])


def check_padding(session: GraphSession, rows: Sequence[Sequence[int]], target: str) -> list[tuple[str, PairTokens]]:
    """A padded batch against each row alone, at real positions; the pad token must not matter."""
    rows = [list(row)[:LONGEST] for row in sorted(rows[:3], key=len)]
    alone = np.concatenate([session.logits(row) for row in rows])
    found = []
    sides = ("left", "right") if target == "cpu" else ("right",)
    for side in sides:
        found.append((f"{side}-padded batch", pair(alone, padded(session, rows, side, pad=0))))
        other = padded(session, rows, side, pad=max(map(max, rows)))
        found.append((f"{side}-padded batch, other pad token", pair(alone, other)))
    return found


def padded(
    session: GraphSession, rows: Sequence[Sequence[int]], side: str, pad: int, *, honest_mask: bool = True
) -> Float32:
    """The real positions of a padded batch, row after row, (sum of lengths, V). A dishonest mask is a mutant."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits = session.feed(ids, mask=mask if honest_mask else np.ones_like(mask), positions=positions).logits
    return logits[mask.astype(bool)]


def decode_with_session(session: GraphSession, row: Sequence[int], past: int, *, stale: bool = False) -> Float32:
    """(len(row) - past, V) with the cache passed from call to call. A stale last slot is a mutant."""
    fed = session.feed(np.array([row[:past]]))
    out = []
    for token in row[past:]:
        cache = [_stale(array) for array in fed.cache] if stale else fed.cache
        fed = Fed(*_step(session, token, cache))
        out.append(fed.logits[0])
    return np.concatenate(out)


def pair(ref: Float32, cand: Float32) -> PairTokens:
    """Statistics of two ways of computing the same logits; the true token plays no role and is the first id."""
    nothing = np.zeros(len(ref), np.int64)
    return compare(score(ref, nothing), score(cand, nothing), nothing)


def comparison(name: str, checks: Sequence[tuple[str, PairTokens]]) -> Comparison:
    """All checks of a kind as one pair: each check counts as a document."""
    tokens = concatenate([part for _, part in checks])
    owner = np.repeat(np.arange(len(checks)), [len(part.kl) for _, part in checks])
    return Comparison(name, tokens, owner, np.full(len(owner), "response"))


def summaries(checks: Sequence[tuple[str, PairTokens]]) -> list[CacheCheck]:
    return [
        CacheCheck(name, len(part.kl), float(part.centered_max.max()), float(part.kl.mean())) for name, part in checks
    ]


def _step(session: GraphSession, token: int, cache: list[NDArray]) -> tuple[Float32, list[NDArray]]:
    fed = session.feed(np.array([[token]]), cache=cache)
    return fed.logits, fed.cache


def _stale(array: NDArray) -> NDArray:
    """The newest slot still holds what the slot before it holds."""
    copy = array.copy()
    copy[:, :, -1] = array[:, :, -2] if array.shape[2] > 1 else 0
    return copy


def _ragged(runner: Runner, rows: Sequence[Sequence[int]]) -> PairTokens:
    """Rows of unequal length decode their last tokens together."""
    steps = min(DECODED, min(map(len, rows)) - 1)
    cache = runner.new_cache(len(rows))
    for i, row in enumerate(rows):
        runner.prefill(cache, i, row[:-steps])
    decoded = [runner.decode(cache, [row[len(row) - steps + step] for row in rows]) for step in range(steps)]
    alone = [runner.logits(row)[-steps:] for row in rows]
    together = np.stack(decoded)  # (steps, rows, V)
    return concatenate([pair(alone[i], together[:, i]) for i in range(len(rows))])


def _last_position(runner: Runner, rows: Sequence[Sequence[int]]) -> PairTokens:
    """The last token that the context holds."""
    tokens = [token for row in rows for token in row]
    tokens = (tokens * (runner.n_positions // len(tokens) + 1))[: runner.n_positions]
    cache = runner.new_cache(1, runner.n_positions)
    runner.prefill(cache, 0, tokens[:-1])
    decoded = runner.decode(cache, tokens[-1:])
    cache = runner.new_cache(1, runner.n_positions)
    return pair(runner.prefill(cache, 0, tokens)[None], decoded)
