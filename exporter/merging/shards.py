"""All shards of a merge: written, proven and noted in the journal, each while the next one is written."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from exporter.files import partial_path
from exporter.merging.card import shard_names
from exporter.merging.journal import FinishedShard, Journal
from exporter.merging.layout import ShardLayout
from exporter.merging.plan import MergePlan, OutputTensor
from exporter.merging.proof import prove_shard
from exporter.merging.stream import write_shard
from exporter.progress import SILENT, Progress


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
    """Write what the journal does not have yet, under partial names. memory: bytes, half each for writing and proving.

    check_inputs raises if the files that were read are not those of the plan; a shard is noted only after it.
    """
    finished: dict[str, FinishedShard] = {}
    proving = progress.task("proving", plan.nbytes, "B") if proven else SILENT.task("proving", 0)
    with progress.task("merging", plan.nbytes, "B") as written, proving as proved, ThreadPoolExecutor(1) as prover:
        last: Future[None] | None = None
        for name, layout, shard in zip(shard_names(len(plan.shards)), layouts, plan.shards, strict=True):
            known = journal.finished(name)
            if known is not None:
                finished[name] = known
                for task in (written, proved):
                    task.advance(sum(tensor.nbytes for tensor in shard))
                continue
            tensors = write_shard(
                partial_path(out / name), layout, shard, plan.layout, memory=memory // 2, hashed=proven, task=written
            )
            if last is not None:
                last.result()

            def finish(name: str = name, shard: tuple[OutputTensor, ...] = shard, tensors=tuple(tensors)) -> None:
                path = partial_path(out / name)
                by_name = {tensor.name: tensor for tensor in tensors}
                proof = prove_shard(path, shard, by_name, plan.layout, memory // 2, proved) if proven else None
                check_inputs()
                finished[name] = FinishedShard(tensors, proof)
                journal.add(name, finished[name])

            last = prover.submit(finish)
        if last is not None:
            last.result()
    return {name: finished[name] for name in shard_names(len(plan.shards))}
