"""The memory's read bandwidth in bytes a second: sums over a buffer far larger than any cache, one slice a thread.

python benchmarks/bandwidth.py THREADS
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

BYTES, REPEATS = 1 << 30, 10


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    buffer = np.ones(BYTES // 4, np.float32)
    tensor = torch.from_numpy(buffer)
    slices = np.array_split(buffer, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):  # the faster of two ways: neither is always bound by memory
            for read in (lambda: list(pool.map(np.add.reduce, slices)), tensor.sum):
                began = time.perf_counter()
                read()
                best = max(best, BYTES / (time.perf_counter() - began))
    print(best)


if __name__ == "__main__":
    main(int(sys.argv[1]))
