import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import SHARE
from tests.forked import Forks
from tests.pairs import Pair, make_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A tiny GPT-2 base in float16 with a plain LoRA adapter on c_attn."""
    return make_pair(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(SHARE)


@pytest.fixture(autouse=True, scope="session")
def _what_was_imported_set_aside() -> None:
    """Each look for garbage would otherwise go over all that torch and transformers hold: 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
