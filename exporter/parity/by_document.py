"""The same work for every document, on all cores: NumPy lets other threads run while it computes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from exporter.merging.threads import thread_pool
from exporter.parity.documents import Document
from exporter.progress import Progress

T = TypeVar("T")


def by_document(
    documents: Sequence[Document], work: Callable[[Document], T], title: str, progress: Progress
) -> list[T]:
    """`work` of each document, in their order: sums over it do not depend on the number of cores."""
    results = []
    with (
        thread_pool() as pool,
        progress.task(title, len(documents), "documents") as task,
    ):
        for result in pool.map(work, documents):
            results.append(result)
            task.advance()
    return results
