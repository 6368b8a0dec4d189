"""`make bench-blocks`: what the block size of int8 and int4 costs in quality, on the packaged pair.

Mean KL(truth || bundle) in nats and the share of equal first tokens, bundles as shipped (accuracy level 4) against
transformers in float32 over the merged weights, every position of the packaged Alpaca prompts' beginnings.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import exporter
from exporter.graph.weights import BLOCKS

PACKAGE = Path(exporter.__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch), options.documents, options.length)


def measure(root: Path, count: int, length: int) -> None:
    merged = root / "merged"
    exporter.merge(base=PACKAGE / "demo/base", adapter=PACKAGE / "demo/adapter", out=merged)
    documents = read_documents(count, length)
    truth = log_probabilities(merged, documents)
    print("| precision | block | bits a weight of the blocks' matrices | mean KL | equal first tokens |")
    print("|---|---|---|---|---|")
    for precision in ("int8", "int4"):
        for block in BLOCKS:
            bundle = exporter.export(merged, precision=[precision], block_size=block, out=root / str(block))[0]
            runner = exporter.load(bundle)
            found = torch.cat([torch.from_numpy(runner.logits(ids)).double().log_softmax(-1) for ids in documents])
            kl = float((truth.exp() * (truth - found)).sum(-1).mean())
            same = float((truth.argmax(-1) == found.argmax(-1)).double().mean())
            bits = bundle.section["bits_per_weight"]["matrices"]
            print(f"| {precision} | {block} | {bits} | {kl:.2e} | {same:.1%} |", flush=True)


def read_documents(count: int, length: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(PACKAGE / "demo/base/tokenizer.json"))
    lines = (PACKAGE / "parity/prompts/alpaca.jsonl").read_text().splitlines()[:count]
    found = [json.loads(line) for line in lines]
    texts = [f"### Instruction:\n\n{one['instruction']}\n\n### Response:\n{one['output']}" for one in found]
    return [encoding.ids[:length] for encoding in tokenizer.encode_batch(texts)]


@torch.inference_mode()
def log_probabilities(directory: Path, documents: list[list[int]]) -> torch.Tensor:
    """float64 (tokens of all documents, V)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return torch.cat([model(torch.tensor([ids])).logits[0].double() for ids in documents]).log_softmax(-1)


if __name__ == "__main__":
    main()
