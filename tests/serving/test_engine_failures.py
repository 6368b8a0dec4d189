"""What fails ends the streams that it touches, tells them why, and leaves the others and the engine alone."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from exporter.errors import EnvironmentLacking, ParityFailed
from exporter.runtime.cache import KeyValueCache
from exporter.serving import batch
from exporter.serving.engine import BatchingEngine
from exporter.serving.requests import EngineClosed, OutOfMemory, Step
from tests.serving.arithmetic import (
    FAULT,
    POISON,
    ArithmeticRunner,
    asked,
    continuation,
    ids,
    read,
    run,
    started,
)


@pytest.mark.parametrize("token", [POISON, FAULT])
def test_a_failing_step_ends_only_the_streams_it_touches(token: int) -> None:
    async def main(engine: BatchingEngine) -> None:
        others = [engine.submit(asked([i, 2, 3], 30)) for i in range(2)]
        for stream in others:
            await anext(stream)
        bad = engine.submit(asked([4, token, 5], 30))
        expected = ParityFailed if token == POISON else EnvironmentLacking
        with pytest.raises(expected, match="not finite" if token == POISON else "a fault of the session"):
            await read(bad)
        assert await read(bad) == []
        for i, stream in enumerate(others):
            assert ids(await read(stream)) == continuation([i, 2, 3], 30)[1:]
        assert ids(await read(engine.submit(asked([4, 6, 5], 3)))) == continuation([4, 6, 5], 3)

    with started(pause=0.002) as engine:
        run(main(engine))
        stats = engine.stats()
        assert (stats.failed, stats.running, dict(stats.finished)) == (1, 0, {"length": 3})


BAD = [*range(8), 40, 41]  # its head is a neighbour's
DEFECTS: dict[str, tuple[Any, str, Callable[..., bool], dict[str, Any]]] = {
    "sampling, for one prompt": (batch, "next_token", lambda _, context, *rest: context == BAD, {}),
    "sampling, at a step with others": (batch, "next_token", lambda _, context, *rest: context[:-2] == BAD, {}),
    "logprobs": (batch, "logprobs", lambda *_: True, {"top_logprobs": 3}),
    "echo": (batch, "logprobs", lambda *_: True, {"top_logprobs": 3, "echo_logprobs": True}),
    "a head that is copied": (KeyValueCache, "copy_slots", lambda *_: True, {}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_one_streams_own_work_ends_that_stream_alone(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, breaks, options = DEFECTS[defect]
    original = getattr(owner, name)

    def breaking(*arguments: Any) -> Any:
        return 1 / 0 if breaks(*arguments) else original(*arguments)

    async def main(engine: BatchingEngine) -> None:
        neighbours = [[*range(8), i] for i in range(2)]
        streams = [engine.submit(asked(prompt, 30)) for prompt in neighbours]
        for stream in streams:
            await anext(stream)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, breaking)
            with pytest.raises(EnvironmentLacking, match="an internal error: ZeroDivisionError"):
                await read(engine.submit(asked(BAD, 20, **options)))
            for stream, prompt in zip(streams, neighbours, strict=True):
                assert ids(await read(stream)) == continuation(prompt, 30)[1:]
        assert ids(await read(engine.submit(asked(BAD, 20)))) == continuation(BAD, 20)

    with started(pause=0.002) as engine:
        run(main(engine))
        stats = engine.stats()
        assert (stats.failed, stats.running, dict(stats.finished)) == (1, 0, {"length": 3})


@pytest.mark.parametrize(("error", "told"), [(MemoryError, "out of memory"), (TypeError, "internal error: TypeError")])
def test_a_stream_that_cannot_get_its_slot_is_told_and_the_slot_stays_free(
    error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = list(range(20))

    def breaking(*_: Any) -> Any:
        raise error

    async def main(engine: BatchingEngine) -> None:
        await read(engine.submit(asked([*head, 50, 51], 1)))
        running = engine.submit(asked([7, 8], 40))
        await anext(running)
        with monkeypatch.context() as patch:
            patch.setattr(batch, "generators", breaking)
            with pytest.raises(EnvironmentLacking, match=told):
                await read(engine.submit(asked([*head, 50, 51], 5)))
        assert engine.alive
        assert ids(await read(running)) == continuation([7, 8], 40)[1:]
        again = engine.submit(asked([*head, 52, 53], 5))
        assert ids(await read(again)) == continuation([*head, 52, 53], 5)
        assert again.cached_tokens == 20  # the slot kept what it held

    with started(pause=0.002, slots=2) as engine:
        run(main(engine))
        stats = engine.stats()
        assert (stats.failed, stats.running, dict(stats.finished)) == (1, 0, {"length": 3})


def test_a_step_without_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*_: Any) -> Any:
        raise MemoryError

    async def main(engine: BatchingEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ArithmeticRunner, "append", breaking)
            with pytest.raises(OutOfMemory):
                await read(engine.submit(asked([1, 2], 5)))
        assert ids(await read(engine.submit(asked([1, 2], 5)))) == continuation([1, 2], 5)

    with started() as engine:
        run(main(engine))


def test_a_defect_of_the_engine_itself_ends_what_runs_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(engine: BatchingEngine) -> None:
        stream = engine.submit(asked([1, 2], 50))
        await anext(stream)
        with monkeypatch.context() as patch:
            patch.setattr(engine._batch, "decode", lambda: 1 / 0)
            with pytest.raises(EnvironmentLacking, match="an internal error: ZeroDivisionError"):
                await read(stream)
        assert ids(await read(engine.submit(asked([1, 2], 5)))) == continuation([1, 2], 5)

    with started(pause=0.002) as engine:
        run(main(engine))


def test_a_worker_that_dies_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[BaseException] = []

    async def main(engine: BatchingEngine) -> None:
        monkeypatch.setattr(engine, "_let_out", lambda: 1 / 0)
        stream = engine.submit(asked([1, 2], 50))
        assert (await read(stream))[-1] == Step(None, reason="shutdown")
        await asyncio.to_thread(engine._thread.join)
        assert not engine.alive
        with pytest.raises(EngineClosed):
            engine.submit(asked([1], 1))

    with started(on_defect=found.append) as engine:
        run(main(engine))
    assert list(map(type, found)) == [ZeroDivisionError]
