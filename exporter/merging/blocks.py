"""Blocks of bytes on their way to a file: one thread reads or computes, others hash, write, move and sync.

hashlib, xxhash, pread, pwrite and copy_file_range release the interpreter's lock, so threads are enough.
"""

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from exporter.merging.threads import thread_pool

# Large enough that handing a block over costs little, small enough that it is hashed and written from the cache:
# blocks of 16 MB took three times the system time of these.
BLOCK = 1 << 20
SYNC_BYTES = 256 << 20
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class BlockWriter:
    """Writes blocks at their offsets of an open file. At most `blocks` are under way: `take` and `put` wait for more.

    on_written(count): bytes that reached the file. Errors of the threads are raised by the next `take`, `put` or
    `finish`.
    """

    def __init__(self, target: int, blocks: int, on_written: Callable[[int], None]) -> None:
        self.target, self.on_written = target, on_written
        self._free = deque(mmap.mmap(-1, BLOCK) for _ in range(blocks))  # page-aligned
        self._busy: deque[tuple[mmap.mmap | None, list[Future[None]]]] = deque()
        self._blocks = blocks
        # One thread writes: two in one file wait for each other in the kernel, and cost more than they save.
        self._hasher, self._writer, self._syncer = (thread_pool(1) for _ in range(3))
        self._moves: list[Future[None]] = []
        self._unsynced = 0
        self._syncing: Future[None] | None = None

    def take(self) -> mmap.mmap:
        """A buffer of BLOCK bytes, to be given back with `put`."""
        while not self._free:
            self._reap()
        return self._free.popleft()

    def put(
        self,
        block: memoryview,
        offset: int,
        digest: Callable[[], None] | None = None,
        buffer: mmap.mmap | None = None,
    ) -> None:
        """Write `block` at `offset` and call `digest` in the hashing thread, in the order of the calls.

        buffer: what `take` gave, if the block lies in it.
        """
        work = [self._writer.submit(self._write, block, offset)]
        if digest is not None:
            work.append(self._hasher.submit(digest))
        self._wait_for(buffer, work)

    def move(self, source: int, start: int, count: int, offset: int) -> None:
        """Let the kernel copy `count` bytes at `start` of an open file to `offset`.

        They never enter this process, so any number of moves may wait.
        """
        self._moves.append(self._writer.submit(self._move, source, start, count, offset))

    def finish(self) -> None:
        """Wait until every block is hashed and stands in the file, and the file on the disk."""
        while self._busy:
            self._reap()
        for move in self._moves:
            move.result()
        if self._syncing:
            self._syncing.result()
        os.fsync(self.target)

    def close(self) -> None:
        for pool in (self._hasher, self._writer, self._syncer):
            pool.shutdown(cancel_futures=True)

    def _wait_for(self, buffer: mmap.mmap | None, work: list[Future[None]]) -> None:
        self._busy.append((buffer, work))
        while len(self._busy) > self._blocks:
            self._reap()

    def _reap(self) -> None:
        buffer, work = self._busy.popleft()
        if buffer is not None:
            self._free.append(buffer)
        for future in work:
            future.result()

    def _write(self, block: memoryview, offset: int) -> None:
        done = 0
        while done < len(block):
            done += os.pwrite(self.target, block[done:], offset + done)
        self._wrote(len(block))

    def _move(self, source: int, start: int, count: int, offset: int) -> None:
        done = 0
        while done < count:
            try:
                moved = os.copy_file_range(source, self.target, count - done, start + done, offset + done)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
                moved = self._copy(source, start + done, min(BLOCK, count - done), offset + done)
            if moved == 0:
                raise EOFError
            done += moved
            self._wrote(moved)

    def _copy(self, source: int, start: int, count: int, offset: int) -> int:
        """For file systems between which the kernel does not copy."""
        return os.pwrite(self.target, os.pread(source, count, start), offset)

    def _wrote(self, count: int) -> None:
        """Bytes go to the disk while others are computed, so that the last sync has little left to wait for."""
        self.on_written(count)
        self._unsynced += count
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing:
                self._syncing.result()
            self._unsynced = 0
            self._syncing = self._syncer.submit(os.fdatasync, self.target)
