"""The logits of llama.cpp at every position of every document, for bench_quantization.py.

    python benchmarks/logits_llama.py MODEL.gguf DOCUMENTS.json OUT.npy --threads 2

DOCUMENTS.json: a list of lists of token ids. OUT.npy: float32 (tokens of all documents, V). Runs in the peers'
environment.
"""

import argparse
import json
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports] (in the peers' environment)
import numpy as np
from decode_llama import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("documents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    write_logits(options.model, json.loads(options.documents.read_text()), options.out, options.threads)


def write_logits(path: Path, documents: list[list[int]], out: Path, threads: int) -> None:
    loading = llama_cpp.llama_model_default_params()
    loading.use_extra_bufts = False  # with repacked weights Q8_0 of the demo pair crashed on a processor with AMX
    model, _silence = load_model(str(path), loading)
    longest = max(map(len, documents))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = longest
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    shape = (sum(map(len, documents)), vocabulary)
    logits = np.lib.format.open_memmap(out, "w+", np.float32, shape)
    batch, row = llama_cpp.llama_batch_init(longest, 0, 1), 0
    for ids in documents:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, True
        if code := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode gave {code}")
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), vocabulary))
        logits[row : row + len(ids)] = found
        row += len(ids)
    logits.flush()


if __name__ == "__main__":
    main()
