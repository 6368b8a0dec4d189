"""All shards of a merge: each is written, read again and proven, and noted in the journal; a few at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from exporter.files import partial_path
from exporter.merging.card import shard_names
from exporter.merging.journal import FinishedShard, Journal
from exporter.merging.layout import ShardLayout
from exporter.merging.output import OutputTensor
from exporter.merging.plan import MergePlan
from exporter.merging.proof import prove_shard
from exporter.merging.stream import write_shard
from exporter.merging.threads import single_threaded, thread_pool
from exporter.progress import SILENT, Progress, Task

# Files at once: one file takes one writer, and while one shard waits for its bytes the others compute.
WORKERS = 3
# A signal that comes just before a wait without end is handled only after it.
POLL_SECONDS = 0.25


def write_shards(
    out: Path,
    plan: MergePlan,
    layouts: Sequence[ShardLayout],
    journal: Journal,
    *,
    memory: int,
    proven: bool,
    check_inputs: Callable[[], None],
    progress: Progress,
) -> dict[str, FinishedShard]:
    """Write what the journal does not have yet, under partial names. memory: bytes, shared by the workers.

    check_inputs raises if the files that were read are not those of the plan; a shard is noted only after it.
    """
    names = shard_names(len(plan.shards))
    proving = progress.task("proving", plan.nbytes, "B") if proven else SILENT.task("proving", 0)
    nbytes = sum(layout.size for layout in layouts)
    with progress.task("merging", nbytes, "B") as writing, proving as reading:
        stopping = Event()
        written, proved = _Stoppable(writing, stopping), _Stoppable(reading, stopping)

        def make(name: str, layout: ShardLayout, shard: tuple[OutputTensor, ...]) -> FinishedShard:
            known = journal.finished(name)
            if known is not None:
                written.advance(layout.size)
                proved.advance(sum(tensor.nbytes for tensor in shard))
                return known
            path, share = partial_path(out / name), memory // WORKERS
            tensors = write_shard(path, layout, shard, plan.layout, memory=share, hashed=proven, task=written)
            by_name = {tensor.name: tensor for tensor in tensors}
            proof = prove_shard(path, shard, by_name, plan.layout, share, proved) if proven else None
            check_inputs()
            finished = FinishedShard(tuple(tensors), proof)
            journal.add(name, finished)
            return finished

        with single_threaded(), thread_pool(WORKERS) as pool:
            try:
                futures = [pool.submit(make, *one) for one in zip(names, layouts, plan.shards, strict=True)]
                waiting = set(futures)
                while waiting:
                    done, waiting = wait(waiting, POLL_SECONDS, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()  # the first error, without waiting for the shards beside it
                return {name: future.result() for name, future in zip(names, futures, strict=True)}
            except BaseException:
                stopping.set()
                pool.shutdown(cancel_futures=True)
                raise


class _Stopped(Exception):
    """The work is given up: another shard failed, or the user interrupted."""


@dataclass(frozen=True, slots=True)
class _Stoppable:
    """A task that ends its worker at the next block once `stopping` is set: a shard may have minutes to go."""

    task: Task
    stopping: Event

    def advance(self, amount: float = 1) -> None:
        if self.stopping.is_set():
            raise _Stopped
        self.task.advance(amount)
