"""What has to be set before torch is imported.

Workers of pytest-xdist share the cores: with threads for all of them in each worker, they wait for one another.
"""

import os

SHARE = max(1, min(2, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
os.environ.setdefault("OMP_NUM_THREADS", str(SHARE))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
