"""bench_decode's worker for CTranslate2. `model` is a converted directory, `flavour` the compute type."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctranslate2  # pyright: ignore[reportMissingImports] (in the peers' environment)
from decode_worker import Job, work


class CTranslate2:
    version = ctranslate2.__version__

    def __init__(self, job: Job) -> None:
        directory = Path(job.model)
        self.generator = ctranslate2.Generator(
            str(directory), compute_type=job.flavour, inter_threads=1, intra_threads=job.threads
        )
        self.words = json.loads((directory / "vocabulary.json").read_text())
        shape = json.loads((directory / "shape.json").read_text())
        self.weight_bytes = (directory / "model.bin").stat().st_size - 4 * shape["n_positions"] * shape["n_embd"]
        self.slot_bytes = 2 * 4 * shape["n_layer"] * shape["n_embd"]
        self.new_tokens = job.new_tokens
        self.steps: Iterator[Any] = iter(())

    def prefill(self, ids: list[int]) -> int:
        for _ in self.steps:  # of the last prompt
            pass
        words = [self.words[token] for token in ids]
        length = self.new_tokens
        self.steps = iter(self.generator.generate_tokens(words, max_length=length, min_length=length, end_token=[]))
        return next(self.steps).token_id

    def decode(self, token: int) -> int:
        return next(self.steps).token_id  # it appends its own greedy token, which `token` is


if __name__ == "__main__":
    work(CTranslate2)
