import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.forked import Forks
from tests.pairs import Pair, make_pair

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A tiny GPT-2 base in float16 with a plain LoRA adapter on c_attn."""
    return make_pair(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
