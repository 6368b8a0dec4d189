"""bench_decode's worker for transformers, eager and float32. `flavour`: an activation in place of the model's."""

import sys

import torch
import transformers
from decode_worker import Job, work


class Transformers:
    version = transformers.__version__

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        changed = {"activation_function": job.flavour} if job.flavour else {}
        config = transformers.AutoConfig.from_pretrained(job.model, **changed)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.weight_bytes = (
            sum(4 * one.numel() for one in self.model.parameters()) - 4 * config.n_positions * config.n_embd
        )
        self.slot_bytes = 2 * 4 * config.n_layer * config.n_embd
        self.past = None

    def prefill(self, ids: list[int]) -> int:
        self.past = transformers.DynamicCache()
        return self._compute(ids)

    def decode(self, token: int) -> int:
        return self._compute([token])

    @torch.inference_mode()
    def _compute(self, ids: list[int]) -> int:
        output = self.model(torch.tensor([ids]), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(work(Transformers))
