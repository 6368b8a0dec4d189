"""The same tokens fed in other ways: decoded with a cache, in chunks, in padded batches. The answer must not change."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.parity.gates import Comparison
from exporter.parity.graphs import Call, Graph
from exporter.parity.result import CacheCheck, GateResult, number
from exporter.parity.statistics import PairTokens, compare, concatenate, score
from exporter.runtime.runner import Runner

Float32 = NDArray[np.float32]
Checks = list[tuple[str, PairTokens]]
DECODED = 8  # tokens decoded one by one in a check
LONGEST = 96  # tokens of a row in a check, but for the one at the end of the context


def check_cache(runner: Runner, rows: Sequence[Sequence[int]], whole_context: bool) -> Checks:
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


def cache_error(runner: Runner, rows: Sequence[Sequence[int]]) -> GateResult:
    """Keys and values of prefill and cached decoding against one prefill's: squared error over square, recorded.

    The last token's stand in no logits yet. The figure is that of the tensor that is furthest off.
    """
    row = list(max(rows, key=len))[:LONGEST]
    past = len(row) // 2
    row = row[: past + DECODED]
    whole, decoded = runner.new_cache(1), runner.new_cache(1)
    runner.prefill(whole, 0, row)
    runner.prefill(decoded, 0, row[:past])
    for token in row[past:]:
        runner.decode(decoded, [token])
    ref, cand = whole.filled(0), decoded.filled(0)
    errors = [_nmse(ref[name], cand[name]) for name in ref]
    worst = int(np.argmax(errors))  # NaN too
    return GateResult(
        gate="recorded",
        pair="O-D",
        statistic="cache_nmse",
        scope="all",
        outcome="RECORDED",
        kind="correctness",
        estimate=number(errors[worst]),
        lower=None,
        upper=None,
        limit=None,
        bound="none",
        tokens=len(row),
        documents=1,
        detail=f"worst: {list(ref)[worst].removeprefix('past_key_values.')}",
    )


def _nmse(ref: NDArray, cand: NDArray) -> float:
    ref = ref.astype(np.float64)
    return float(np.square(cand - ref).sum() / max(np.square(ref).sum(), np.finfo(np.float64).tiny))


def check_cache_in_graph(graph: Graph, rows: Sequence[Sequence[int]], context: int, whole_context: bool) -> Checks:
    """The same of a graph too large for the Runner, the cache fed and returned; rows of unequal length are left out."""
    row = list(max(rows, key=len))[:LONGEST]
    calls, checks = [Call(np.array([row]))], list[tuple[str, int, slice]]()
    for name, past in (("past 1", 1), ("past middle", len(row) // 2)):
        stop = min(len(row), past + DECODED)
        calls += decode_calls(row[:stop], past, len(calls))
        checks.append((f"decode, {name}", len(calls) - (stop - past), slice(past, stop)))
    checks.append(("prefill in chunks of 7", len(calls), slice(0, len(row))))
    calls += chunk_calls(row, 7, len(calls))
    tokens = fill(rows, context) if whole_context else []
    if tokens:
        calls += [Call(np.array([tokens])), *decode_calls(tokens, context - 1, len(calls) + 1)]
    logits = [one[0] for one in graph.run(calls)]
    found = []
    for name, first, positions in checks:
        length = positions.stop - positions.start
        found.append((name, pair(logits[0][positions], np.concatenate(logits[first : first + length])[:length])))
    if tokens:
        found.append((f"decode, past {context - 1}", pair(logits[-3][-1:], logits[-1])))
    return found


def check_padding(graph: Graph, rows: Sequence[Sequence[int]], target: str) -> Checks:
    """A padded batch against each row alone, at real positions; the pad token must not matter."""
    rows = [list(row)[:LONGEST] for row in sorted(rows[:3], key=len)]
    sides = ("left", "right") if target == "cpu" else ("right",)
    pads = {"": 0, ", other pad token": max(map(max, rows))}
    batches = [(side, name, padded_call(rows, side, pad)) for side in sides for name, pad in pads.items()]
    logits = list(graph.run([*(Call(np.array([row])) for row in rows), *(call for _, _, call in batches)]))
    alone = np.concatenate([one[0] for one in logits[: len(rows)]])
    return [
        (f"{side}-padded batch{name}", pair(alone, one[real_positions(rows, side)]))
        for (side, name, _), one in zip(batches, logits[len(rows) :], strict=True)
    ]


def padded_call(rows: Sequence[Sequence[int]], side: str, pad: int, *, honest_mask: bool = True) -> Call:
    """The rows as one batch, padded on one side with the token `pad`. A dishonest mask is a mutant."""
    real = real_positions(rows, side)
    ids = np.full(real.shape, pad)
    ids[real] = np.concatenate([np.array(row) for row in rows])
    positions = np.maximum(real.cumsum(axis=1) - 1, 0)
    return Call(ids, real.astype(np.int64) if honest_mask else np.ones(real.shape, np.int64), positions)


def real_positions(rows: Sequence[Sequence[int]], side: str) -> NDArray[np.bool_]:
    """(B, S): where a batch that is padded on `side` holds the rows' tokens."""
    lengths = np.array([[len(row)] for row in rows])
    starts = lengths.max() - lengths if side == "left" else np.zeros_like(lengths)
    places = np.arange(lengths.max())[None]
    return (places >= starts) & (places < starts + lengths)


def decode_calls(row: Sequence[int], past: int, first: int, *, is_stale: bool = False) -> list[Call]:
    """Prefill `past` tokens, then one token a call, each after the one before; `first`: the prefill's number."""
    calls = [Call(np.array([row[:past]]))]
    for i in range(past, len(row)):
        calls.append(Call(np.array([[row[i]]]), past=i, after=first + i - past, is_stale=is_stale))
    return calls


def chunk_calls(row: Sequence[int], chunk: int, first: int) -> list[Call]:
    """The row in chunks, each after the one before; `first`: the number of the first."""
    starts = range(0, len(row), chunk)
    return [
        Call(np.array([row[start : start + chunk]]), past=start, after=first + i - 1 if i else None)
        for i, start in enumerate(starts)
    ]


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
    tokens = fill(rows, runner.n_positions)
    cache = runner.new_cache(1, runner.n_positions)
    runner.prefill(cache, 0, tokens[:-1])
    decoded = runner.decode(cache, tokens[-1:])
    cache = runner.new_cache(1, runner.n_positions)
    return pair(runner.prefill(cache, 0, tokens)[None], decoded)


def fill(rows: Sequence[Sequence[int]], length: int) -> list[int]:
    """The rows' tokens, again and again, `length` of them."""
    tokens = [token for row in rows for token in row]
    return (tokens * (length // len(tokens) + 1))[:length]
