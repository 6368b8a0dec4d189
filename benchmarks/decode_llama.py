"""bench_decode's worker for llama.cpp through llama-cpp-python's C functions. `model` is a GGUF file."""

import ctypes

import llama_cpp  # pyright: ignore[reportMissingImports] (in the peers' environment)
import numpy as np
from decode_worker import Job, work

BATCH = 512


def load_model(path: str, options: llama_cpp.llama_model_params) -> tuple[llama_cpp.llama_model_p, object]:
    """A GGUF file's model, and what keeps llama.cpp silent, which has to live as long as the model."""
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp cannot open {path}")
    return model, silence


class Llama:
    version = llama_cpp.__version__

    def __init__(self, job: Job) -> None:
        self.model, self.silence = load_model(job.model, llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = job.context, BATCH, BATCH
        options.n_threads = options.n_threads_batch = job.threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        width = llama_cpp.llama_model_n_embd(self.model)
        positions = 4 * width * llama_cpp.llama_model_n_ctx_train(self.model)
        self.weight_bytes = llama_cpp.llama_model_size(self.model) - positions
        self.slot_bytes = 2 * llama_cpp.llama_model_n_layer(self.model) * width * 2  # its cache is float16

    def prefill(self, ids: list[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        for start in range(0, len(ids), BATCH):
            self._compute(ids[start : start + BATCH])
        return self._best()

    def decode(self, token: int) -> int:
        self._compute([token])
        return self._best()

    def _compute(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if code := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode gave {code}")

    def _best(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab,))))


if __name__ == "__main__":
    work(Llama)
