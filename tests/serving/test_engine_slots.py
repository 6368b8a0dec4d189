"""Slots and lines: pure bookkeeping, under any order of arrivals, steps and cancellations."""

from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.serving.batch import Batch
from exporter.serving.requests import Request, Step
from exporter.serving.slots import Slot, longest_head, shared_head, slot_for, swaps
from tests.serving.arithmetic import ArithmeticRunner, as_runner, continuation, held_tokens

CAPACITY, ROWS = 40, 5
ADAPTERS = (None, "a", "bc")
HEADS = ([], [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [7, 7, 7, 7, 7, 7, 7, 7])


@given(st.lists(st.integers(0, 3), max_size=12))
def test_swaps_sort_rows_and_move_no_row_that_stands_in_its_range(ranks: list[int]) -> None:
    rows, wanted = list(enumerate(ranks)), sorted(ranks)
    done = swaps(ranks)
    for a, b in done:
        assert rows[a][1] != wanted[a]
        assert rows[b][1] != wanted[b]
        rows[a], rows[b] = rows[b], rows[a]
    assert [rank for _, rank in rows] == wanted
    misplaced = sum(rank != right for rank, right in zip(ranks, wanted, strict=True))
    assert misplaced / 2 <= len(done) <= max(0, misplaced - 1)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_a_shared_head_ends_where_two_sequences_part(a: list[int], b: list[int]) -> None:
    n = shared_head(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_only_the_same_adapters_head_counts() -> None:
    slots = [Slot(adapter="a", tokens=[1, 2, 3]), Slot(adapter=None, tokens=[1, 2])]
    assert longest_head(slots, None, [1, 2, 3, 4]) == (1, 2)
    assert longest_head(slots, "a", [1, 2, 3, 4]) == (0, 3)
    assert longest_head(slots, "other", [1, 2, 3, 4])[1] == 0


def test_a_new_stream_takes_its_conversations_slot_then_an_empty_one_then_the_oldest() -> None:
    slots = [Slot(tokens=[1, 2, 3], used=5), Slot(tokens=[9], used=4), Slot(), Slot(taken=True)]
    assert slot_for(slots, None, [1, 2, 3, 4]) == 0
    assert slot_for(slots, "a", [1, 2, 3, 4]) == 2
    assert slot_for(slots, None, [1, 2, 8]) == 2
    slots[2].taken = True
    assert slot_for(slots, None, [1, 2, 8]) == 1
    with pytest.raises(ValueError, match="empty"):
        slot_for([Slot(taken=True)], None, [1])


requests = st.builds(
    lambda head, tail, count, adapter: Request((*head, *tail), count, adapter=adapter),
    st.sampled_from(HEADS),
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
    st.integers(1, 12),
    st.sampled_from(ADAPTERS),
)
actions = st.one_of(requests, st.sampled_from(["prefill", "decode", "decode", "decode"]), st.integers(0, 4))


@settings(deadline=None, max_examples=150)
@given(st.lists(actions, max_size=60))
def test_rows_hold_what_the_books_say_and_every_stream_gets_its_own_tokens(script: list[Any]) -> None:
    received: dict[int, list[Any]] = {}
    runner = ArithmeticRunner(adapters=("a", "bc"))
    runners: Any = {adapter: runner.with_adapter(adapter) for adapter in ADAPTERS}
    batch = Batch(runners, ROWS, CAPACITY, lambda stream, event: received[id(stream)].append(event), raising)
    streams, waiting = [], deque()
    for action in [*script, *["prefill", "decode"] * 40]:
        if isinstance(action, Request):
            streams.append(SimpleNamespace(request=action, cached_tokens=0, prompt_logprobs=None))
            received[id(streams[-1])] = []
            waiting.append(streams[-1])
        elif action == "prefill" and batch.prefilling:
            batch.prefill(0.0)
        elif action == "decode" and batch.decoding:
            batch.decode()
        elif isinstance(action, int) and batch.running:
            victim = sorted(batch.running.items())[action % len(batch.running)][1]
            batch.end(victim, Step(None, reason="cancelled"))
        while waiting and batch.has_room:
            batch.admit(waiting.popleft())
        check_books(batch)
    while waiting or batch.running:
        while waiting and batch.has_room:
            batch.admit(waiting.popleft())
        batch.prefill(0.0)
        if batch.decoding:
            batch.decode()
        check_books(batch)
    for stream in streams:
        request, events = stream.request, received[id(stream)]
        expected = continuation(request.prompt, request.max_new_tokens, request.adapter)
        found = [event.id for event in events if event.id is not None]
        assert found == expected[: len(found)]
        assert [event.reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].reason == "cancelled" or (events[-1].reason == "length" and len(found) == len(expected))


def raising(error: BaseException) -> None:
    raise error


def check_books(batch: Batch) -> None:
    for row, slot in enumerate(batch.slots):
        length, active = int(batch._cache.lengths[row]), batch.running.get(row)
        held = held_tokens(batch._cache, row, length).tolist()
        assert slot.tokens == held[: len(slot.tokens)]
        assert slot.taken == (active is not None)
        assert held == slot.tokens if active is None else held == active.tokens[:length]
        if slot.tokens:
            assert slot.adapter == batch._cache.adapters[row]
    assert all(active.row == row for row, active in batch.running.items())
    assert Counter(active.row for active in batch._prefilling) == Counter(
        row for row, active in batch.running.items() if not active.decoding
    )


def test_a_step_computes_no_idle_row() -> None:
    runner = ArithmeticRunner(adapters=("a",))
    runners: Any = {adapter: runner.with_adapter(adapter) for adapter in (None, "a")}
    batch = Batch(runners, 6, CAPACITY, lambda *_: None, raising)
    for i in range(6):
        request = Request((i, i, i), 20, adapter=(None, "a")[i % 2])
        batch.admit(SimpleNamespace(request=request, cached_tokens=0, prompt_logprobs=None))  # pyright: ignore
    batch.prefill(10)
    batch.decode()
    assert runner.calls[-2:] == [(None, 3, 1), ("a", 3, 1)]
    for active in [batch.running[0], batch.running[4]]:
        batch.end(active, Step(None, reason="cancelled"))
    batch.decode()
    assert sum(rows for _, rows, _ in runner.calls[-2:]) == 4


def test_the_runner_is_only_what_the_engine_uses() -> None:
    assert as_runner(ArithmeticRunner()).n_positions == 64
