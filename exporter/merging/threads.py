"""A stage's own threads, and how many torch takes beside them."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

ROOM = 32 << 20  # address space: a stack of 8 MB for each of a few threads, and what they allocate to begin


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for torch while a stage has threads of its own; sums do not depend on the number of processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def thread_pool(threads: int | None = None) -> ThreadPoolExecutor:
    """So many threads, by default one for each core that is ours; MemoryError where there is no room to begin one.

    Python waits for ever for a thread that found no memory to begin with: github.com/python/cpython/issues/140746.
    """
    try:
        mmap.mmap(-1, ROOM).close()
    except OSError as error:
        raise MemoryError("cannot allocate memory for threads") from error
    return ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
