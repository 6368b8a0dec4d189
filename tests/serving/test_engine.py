"""The engine with a model of arithmetic: who gets what when, and how every stream ends."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

from exporter.errors import EnvironmentLacking, UsageError
from exporter.runtime.sampling import Sampling
from exporter.serving.engine import BatchingEngine
from exporter.serving.requests import EngineClosed, QueueFull, Request, Step
from tests.serving.arithmetic import (
    POSITIONS,
    STOP,
    VOCABULARY,
    ArithmeticRunner,
    as_runner,
    asked,
    continuation,
    ids,
    read,
    run,
    started,
)


def test_a_stream_is_its_prompts_continuation_and_ends_with_a_reason() -> None:
    async def main(engine: BatchingEngine) -> None:
        steps = await read(engine.submit(asked([3, 1, 4], 5)))
        assert ids(steps) == continuation([3, 1, 4], 5)
        assert [step.reason for step in steps] == [None] * 4 + ["length"]
        stop = continuation([3, 1, 4], 5)[2]
        steps = await read(engine.submit(asked([3, 1, 4], 50, stop_tokens=(stop, STOP))))
        assert ids(steps) == continuation([3, 1, 4], 3)
        assert steps[-1].reason == "stop"
        # The last position gives one more token, which has no position of its own.
        steps = await read(engine.submit(asked([1] * (POSITIONS - 2), 50)))
        assert ids(steps) == continuation([1] * (POSITIONS - 2), 3)
        assert steps[-1].reason == "length"

    with started() as engine:
        run(main(engine))
        assert engine.stats().finished == {"length": 2, "stop": 1}


def test_more_streams_than_slots_and_several_adapters_all_get_their_own() -> None:
    prompts = [list(np.random.default_rng(i).integers(0, 9, 1 + i % 17)) for i in range(60)]
    names = [(None, "a", "long")[i % 3] for i in range(60)]

    async def main(engine: BatchingEngine) -> list[list[Step]]:
        streams = [
            engine.submit(asked([int(token) for token in prompt], 1 + i % 13, adapter=name))
            for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
        return await asyncio.gather(*map(read, streams))

    with started(adapters=("a", "long")) as engine:
        for i, steps in enumerate(run(main(engine))):
            assert ids(steps) == continuation(prompts[i], 1 + i % 13, names[i])
        stats = engine.stats()
        assert stats.requests == 60
        assert stats.finished == {"length": 60}
        assert stats.new_tokens == sum(1 + i % 13 for i in range(60))
        assert stats.prompt_tokens == sum(map(len, prompts))
        assert (stats.running, stats.waiting, stats.slots) == (0, 0, 4)
        assert 1 < stats.decode_rows / stats.decode_steps <= 4


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def main(engine: BatchingEngine) -> None:
        first = engine.submit(asked([1, 2], 40))
        await anext(first)  # it has the only slot
        waiting = [engine.submit(asked([1, i], 1)) for i in range(3)]
        with pytest.raises(QueueFull, match="3 requests are waiting") as refusal:
            engine.submit(asked([9], 1))
        assert refusal.value.retry_after >= 1
        assert engine.stats().waiting == 3
        first.cancel()
        assert [ids(await read(stream)) for stream in waiting] == [continuation([1, i], 1) for i in range(3)]
        assert ids(await read(engine.submit(asked([9], 1)))) == continuation([9], 1)
        assert engine.stats().rejected == 1

    with started(pause=0.01, slots=1, queue=3) as engine:
        run(main(engine))


def test_a_cancelled_stream_frees_its_slot_at_the_next_step_and_leaves_the_queue_at_once() -> None:
    async def main(engine: BatchingEngine) -> None:
        running, waiting = engine.submit(asked([1, 2], 60)), engine.submit(asked([3, 4], 60))
        await anext(running)
        waiting.cancel()
        assert await read(waiting) == [Step(None, reason="cancelled")]
        assert engine.stats().running == 1
        began = time.monotonic()
        running.cancel()
        assert (await read(running))[-1].reason == "cancelled"
        assert time.monotonic() - began < 0.2
        assert engine.stats().running == 0
        running.cancel()  # again: harmless
        assert await read(running) == []

    with started(pause=0.02, slots=1) as engine:
        run(main(engine))
        assert engine.stats().finished == {"cancelled": 2}


def test_a_deadline_ends_a_stream_wherever_it_is() -> None:
    async def main(engine: BatchingEngine) -> None:
        soon = time.monotonic() + 0.15
        running = engine.submit(asked([1, 2], 60, deadline=soon))
        waiting = engine.submit(asked([3, 4], 60, deadline=soon))
        steps = await read(running)
        assert 0 < len(ids(steps)) < 15
        assert ids(steps) == continuation([1, 2], len(ids(steps)))
        assert steps[-1] == Step(None, reason="deadline")
        assert await read(waiting) == [Step(None, reason="deadline")]
        assert await read(engine.submit(asked([1], 5, deadline=time.monotonic()))) == [Step(None, reason="deadline")]

    with started(pause=0.02, slots=1) as engine:
        run(main(engine))


def test_lines_of_clients_and_adapters_take_turns() -> None:
    """Twelve requests of one client do not hold up the one of another, nor those of another adapter."""

    async def main(engine: BatchingEngine) -> list[str]:
        order = []

        async def note(name: str, stream: Any) -> None:
            await read(stream)
            order.append(name)

        streams = [("many", engine.submit(asked([1, 2], 2, client="many"))) for _ in range(12)]
        streams += [("one", engine.submit(asked([1, 2], 2, client="one")))]
        streams += [("adapter", engine.submit(asked([1, 2], 2, client="many", adapter="a")))]
        await asyncio.gather(*(note(*stream) for stream in streams))
        return order

    with started(pause=0.005, slots=1, adapters=("a",)) as engine:
        order = run(main(engine))
    assert order.index("one") <= 3
    assert order.index("adapter") <= 4


def test_a_long_prompt_does_not_hold_up_running_streams() -> None:
    """The gap between two tokens is bounded by the stall and a step, not by the prompt, and short prompts pass by."""

    async def main(engine: BatchingEngine) -> tuple[list[float], list[str]]:
        running = engine.submit(asked([1, 2], 40))
        await anext(running)
        times, order = [time.monotonic()], []

        async def note(prompt: list[int]) -> None:
            assert ids(await read(engine.submit(asked(prompt, 1)))) == continuation(prompt, 1)
            order.append("long" if len(prompt) > 3 else "short")

        others = asyncio.gather(note([5] * 60), note([7, 8, 9]))
        async for _ in running:
            times.append(time.monotonic())
        await others
        return np.diff(times).tolist(), order

    pause = 0.004  # 60 tokens: 0.24 s; the least chunk of 16 tokens 0.064 s
    with started(pause=pause, stall=0.02) as engine:
        run(read_all(engine, asked([6] * 30, 1)))  # so that the time of a token is known
        calls = engine._runner.calls  # pyright: ignore
        del calls[:]
        gaps, order = run(main(engine))
    assert max(gaps) < 0.24 * 0.75
    chunks = [tokens for _, _, tokens in calls if tokens > 1]
    assert max(chunks) <= 17
    assert sum(chunks) == 2 + 60 + 3
    assert order == ["short", "long"]


async def read_all(engine: BatchingEngine, request: Request) -> list[Step]:
    return await read(engine.submit(request))


def test_a_shared_head_is_computed_once() -> None:
    head = list(range(30))

    async def main(engine: BatchingEngine) -> list[int]:
        streams = [engine.submit(asked([*head, 40 + i, 1], 3)) for i in range(6)]
        for i, stream in enumerate(streams):
            assert ids(await read(stream)) == continuation([*head, 40 + i, 1], 3)
        other = engine.submit(asked([*head, 40, 1], 3, adapter="a"))
        assert ids(await read(other)) == continuation([*head, 40, 1], 3, "a")
        return [stream.cached_tokens for stream in [*streams, other]]

    with started(slots=2, adapters=("a",)) as engine:
        cached = run(main(engine))
        assert cached == [0, 30, 30, 30, 30, 30, 0]
        assert engine.stats().reused_tokens == sum(cached)


def test_the_longest_ago_of_several_heads_is_given_up_first() -> None:
    heads = [[i] * 20 for i in range(3)]

    async def cached(engine: BatchingEngine, head: list[int]) -> int:
        stream = engine.submit(asked([*head, 50, 51], 1))
        await read(stream)
        return stream.cached_tokens

    async def main(engine: BatchingEngine) -> None:
        for head in heads:
            assert await cached(engine, head) == 0
        # A prompt that is computed again leaves its last two tokens for the logits.
        assert await cached(engine, heads[0]) == await cached(engine, heads[1]) == 20
        assert await cached(engine, [9] * 20) == 0  # in the place of heads[2]
        assert await cached(engine, heads[1]) == 20
        assert await cached(engine, heads[2]) == 0

    with started(slots=3) as engine:
        run(main(engine))


def test_what_was_decoded_is_not_reused() -> None:
    """A decoded token's keys are not bit for bit a prompt's: the next turn computes the last answer again."""

    async def main(engine: BatchingEngine) -> None:
        answer = ids(await read(engine.submit(asked(range(10), 12))))
        turn = [*range(10), *answer, 3, 4]
        stream = engine.submit(asked(turn, 5))
        assert ids(await read(stream)) == continuation(turn, 5)
        assert stream.cached_tokens == 10

    with started() as engine:
        run(main(engine))


def test_logprobs_of_prompt_and_answer() -> None:
    """The model's logits are 1 for one token and 0 for the 96 others."""
    certain, other = 1 - np.log(np.e + VOCABULARY - 1), -np.log(np.e + VOCABULARY - 1)

    async def main(engine: BatchingEngine) -> None:
        prompt = [5, 6, continuation([5, 6], 1)[0], 8]
        await read(engine.submit(asked(prompt, 1)))  # its head could be reused
        stream = engine.submit(asked(prompt, 2, top_logprobs=2, echo_logprobs=True))
        steps = await read(stream)
        for step, expected in zip(steps, continuation(prompt, 2), strict=True):
            assert step.id == expected
            assert step.logprob == pytest.approx(certain)
            assert step.top == ((expected, pytest.approx(certain)), (min({0, 1} - {expected}), pytest.approx(other)))
        echoed = stream.prompt_logprobs
        assert echoed is not None
        assert [step.id for step in echoed] == prompt
        assert echoed[0].logprob is None
        assert [step.logprob for step in echoed[1:]] == pytest.approx([other, certain, other])
        assert stream.cached_tokens == 0
        alone = engine.submit(asked(prompt, 0, top_logprobs=0, echo_logprobs=True))
        assert await read(alone) == [Step(None, reason="length")]
        assert alone.prompt_logprobs is not None
        assert [step.logprob for step in alone.prompt_logprobs] == [step.logprob for step in echoed]

    with started() as engine:
        run(main(engine))


def test_draining_finishes_every_accepted_stream_and_takes_no_more() -> None:
    async def main(engine: BatchingEngine) -> None:
        streams = [engine.submit(asked([i, 1], 10)) for i in range(9)]
        drained = asyncio.create_task(asyncio.to_thread(engine.drain, 30))
        await asyncio.sleep(0.02)
        with pytest.raises(EngineClosed):
            engine.submit(asked([1], 1))
        for i, steps in enumerate(await asyncio.gather(*map(read, streams))):
            assert ids(steps) == continuation([i, 1], 10)
        assert await drained

    with started(pause=0.003, slots=2) as engine:
        run(main(engine))


def test_what_is_not_finished_when_time_is_up_is_told() -> None:
    async def main(engine: BatchingEngine) -> list[list[Step]]:
        streams = [engine.submit(asked([i, 1], 50)) for i in range(3)]
        await anext(streams[0])
        assert not await asyncio.to_thread(engine.drain, 0.1)
        await asyncio.to_thread(engine.stop)
        return await asyncio.gather(*map(read, streams))

    with started(pause=0.02, slots=2) as engine:
        for i, steps in enumerate(run(main(engine))):
            assert steps[-1] == Step(None, reason="shutdown")
            got = ids(steps)
            assert got == continuation([i, 1], 50)[(i == 0) :][: len(got)]


def test_an_engine_that_never_started_can_be_stopped() -> None:
    engine = BatchingEngine(as_runner(ArithmeticRunner()), cache_bytes=1 << 20)
    assert not engine.alive
    engine.stop()
    engine.stop()


@pytest.mark.parametrize(
    "request_",
    [
        asked([]),
        asked([-1]),
        asked([VOCABULARY]),
        asked([1] * (POSITIONS + 1)),
        asked([1], 0),
        asked([1], 1, adapter="unknown"),
        asked([1], 1, top_logprobs=-1),
    ],
)
def test_a_bad_request_is_refused(request_: Request) -> None:
    async def main(engine: BatchingEngine) -> None:
        with pytest.raises(UsageError):
            engine.submit(request_)

    with started() as engine:
        run(main(engine))


def test_slots_are_as_many_as_the_cache_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 8 * POSITIONS
    runner = as_runner(ArithmeticRunner())
    stats = BatchingEngine(runner, slots=9, cache_bytes=5 * one + 3).stats()
    assert (stats.slots, stats.cache_bytes, stats.capacity) == (5, 5 * one, POSITIONS)
    assert BatchingEngine(runner, slots=9, cache_bytes=5 * one, capacity=16).stats().slots == 9
    with pytest.raises(UsageError, match=r"takes 512 B, and 511 B .*\n.* at least 512 bytes"):
        BatchingEngine(runner, cache_bytes=one - 1)
    monkeypatch.setattr("exporter.serving.engine.free_memory", lambda provider: 2 * one - 2)
    with pytest.raises(EnvironmentLacking, match="a slot of 64 positions takes 512 B, and 511 B"):
        BatchingEngine(runner)
    for options in ({"slots": 0}, {"queue": 0}, {"capacity": 0}, {"capacity": 65}, {"stall": 0.0}):
        with pytest.raises(UsageError):
            BatchingEngine(runner, **options)  # pyright: ignore


def test_a_seed_draws_the_same_whatever_runs_beside_it() -> None:
    """The logits are nearly flat, so any other use of the generator would show."""
    request = asked([3, 4], 12, sampling=Sampling(temperature=1.0, seed=11))

    async def main(engine: BatchingEngine) -> tuple[list[int], list[int], list[int]]:
        alone = ids(await read(engine.submit(request)))
        others = [
            engine.submit(asked([i, 4], 20, sampling=Sampling(temperature=2.0, top_p=0.8, seed=i))) for i in range(3)
        ]
        beside = engine.submit(request)
        await asyncio.gather(*map(read, others))
        other_seed = engine.submit(asked([3, 4], 12, sampling=Sampling(temperature=1.0, seed=12)))
        return alone, ids(await read(beside)), ids(await read(other_seed))

    with started() as engine:
        alone, beside, other_seed = run(main(engine))
    assert alone == beside != other_seed


def streams_alive() -> int:
    kinds = [type(one).__name__ for one in gc.get_objects()]
    return kinds.count("EngineStream") + kinds.count("Active")


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_a_thousand_requests_leave_nothing_behind() -> None:
    async def main(engine: BatchingEngine, count: int) -> None:
        for _ in range(count // 20):
            streams = [engine.submit(asked([i % 7, i % 5, 3], 1 + i % 6)) for i in range(20)]
            for stream in streams[::5]:
                stream.cancel()
            await asyncio.gather(*map(read, streams))

    with started() as engine:
        run(main(engine, 400))
        gc.collect()
        before, threads = psutil.Process().memory_info().rss, threading.active_count()
        run(main(engine, 1000))
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 4 << 20
        assert threading.active_count() == threads
        assert within(10.0, lambda: not streams_alive())  # the worker may still be leaving the step that ended the last
        assert engine.stats().running == engine.stats().waiting == 0
