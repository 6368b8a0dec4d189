"""bench_decode's worker for optimum's ORTModelForCausalLM. `model` is a directory, `flavour` its graph's file name."""

import json
from importlib.metadata import version
from pathlib import Path

import onnxruntime as ort
import torch
from decode_worker import Job, work
from optimum.onnxruntime import ORTModelForCausalLM


class Optimum:
    version = version("optimum-onnx")

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        options = ort.SessionOptions()
        options.intra_op_num_threads = job.threads
        directory = Path(job.model)
        self.model = ORTModelForCausalLM.from_pretrained(
            directory, file_name=job.flavour, session_options=options, provider="CPUExecutionProvider"
        )
        config = json.loads((directory / "config.json").read_text())
        self.weight_bytes = weight_bytes(config, int8="quantized" in job.flavour)
        self.slot_bytes = 2 * 4 * config["n_layer"] * config["n_embd"]
        self.length, self.past = 0, None

    def prefill(self, ids: list[int]) -> int:
        self.length, self.past = 0, None
        return self._compute(ids)

    def decode(self, token: int) -> int:
        return self._compute([token])

    @torch.inference_mode()
    def _compute(self, ids: list[int]) -> int:
        start, self.length = self.length, self.length + len(ids)
        output = self.model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, self.length, dtype=torch.int64),
            position_ids=torch.arange(start, self.length)[None],
            past_key_values=self.past,
            use_cache=True,
        )
        self.past = output.past_key_values
        return int(output.logits[0, -1].argmax())


def weight_bytes(config: dict[str, int], int8: bool) -> int:
    """Matrices of the blocks and the head."""
    width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    numbers = config["n_layer"] * (4 * width * width + 2 * width * inner) + config["vocab_size"] * width
    return numbers * (1 if int8 else 4)


if __name__ == "__main__":
    work(Optimum)
