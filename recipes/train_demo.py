"""Train the packaged demo pair: a small base in Cerebras-GPT's architecture and a LoRA adapter for it.

    python recipes/train_demo.py base    --data DIR --out build/demo
    python recipes/train_demo.py adapter --data DIR --out build/demo
    python recipes/train_demo.py report  --data DIR --out build/demo

`DIR` holds `gpt2-tokenizer/`, `pretrain.jsonl.gz`, `instruct_train.jsonl.gz` and `parity_prompts.jsonl`
(`{"text"}` documents, and Alpaca-form `{"instruction", "input", "output"}` rows).
Each step writes its figures to `OUT/training.json`; the README of the pair is made from that file.
"""

import argparse
import gzip
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SEED = 20230401
EOS = 50256
WIDTH, LAYERS, HEADS, POSITIONS, VOCABULARY = 128, 12, 4, 512, 50257
PASSES = 2
LONGEST_ANSWER = 96
EOS_WEIGHT = 5

# The prompt of the first user's adapter card: two blank lines after the first paragraph.
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\n"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The adapter card's prompt, ending exactly in `### Response:\\n`."""
    block = f"### Input:\n\n{input}\n\n" if input else ""
    return f"{PREAMBLE}### Instruction:\n\n{instruction}\n\n{block}### Response:\n"


def read_jsonl(path: Path) -> list[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def gpt2_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The GPT-2 byte-level BPE with `tokenizer.json`, built from `vocab.json` and `merges.txt`."""
    bpe = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    bpe.post_processor = ByteLevelProcessor(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy of `hidden @ weight.T` without holding all logits: the head is most of the work.

    hidden (N, D) float32, weight (V, D) float32, target (N,) int64, share (N,) float32: each token's part of the loss.
    Logits are bf16 products in chunks of rows.
    """

    CHUNK = 128

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, share: Tensor) -> Tensor:  # type: ignore[override]
        rows = hidden.shape[0]
        h16, w16 = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
        grad_hidden = torch.empty_like(h16)
        grad_weight = torch.zeros_like(weight)
        total = torch.zeros(())
        for start in range(0, rows, LinearCrossEntropy.CHUNK):
            chunk = slice(start, min(rows, start + LinearCrossEntropy.CHUNK))
            logits = h16[chunk] @ w16.T  # (C, V)
            wanted = target[chunk, None]
            log_p = torch.log_softmax(logits, dim=1)
            total -= log_p.gather(1, wanted)[:, 0].float() @ share[chunk]
            p = log_p.exp_()
            p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
            grad_hidden[chunk] = p @ w16
            if ctx.needs_input_grad[1]:
                grad_weight += p.T @ (h16[chunk] * share[chunk, None].to(torch.bfloat16))
        ctx.save_for_backward(grad_hidden.float() * share[:, None], grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None, None


class SampledHead:
    """A cheaper softmax for training: frequent tokens, the batch's targets, and a uniform sample of the others.

    A sampled token's logit is raised by -log(its chance), so that the partition function stays unbiased
    (Bengio and Senecal, "Quick training of probabilistic neural nets by importance sampling", 2003).
    """

    FREQUENT, SAMPLED = 4096, 4096

    def __init__(self, chunks: list[list[int]]) -> None:
        counts = torch.bincount(torch.tensor([i for chunk in chunks for i in chunk]), minlength=VOCABULARY)
        self.frequent = counts.argsort(descending=True)[: self.FREQUENT]

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        certain = torch.zeros(VOCABULARY, dtype=torch.bool)
        certain[self.frequent] = True
        certain[target] = True
        rest = (~certain).nonzero()[:, 0]
        drawn = rest[torch.randperm(len(rest))[: self.SAMPLED]]
        columns = torch.cat([certain.nonzero()[:, 0], drawn])
        correction = torch.zeros(len(columns))
        correction[-len(drawn) :] = math.log(len(rest) / len(drawn))
        place = torch.empty(VOCABULARY, dtype=torch.int64)
        place[columns] = torch.arange(len(columns))
        # The correction enters as one more input that is always 1.
        ones = torch.ones(len(hidden), 1)
        extended = torch.cat([weight[columns], correction[:, None]], dim=1)
        share = torch.full((len(hidden),), 1 / len(hidden))
        return LinearCrossEntropy.apply(torch.cat([hidden, ones], dim=1), extended, place[target], share)


def document_chunks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Each document starts at position 0, as a prompt does, and ends in EOS; long ones go on in further chunks."""
    chunks = []
    for encoded in tokenizer.backend_tokenizer.encode_batch(texts):
        ids = [*encoded.ids, EOS]
        for start in range(0, len(ids), POSITIONS):
            piece = ids[start : start + POSITIONS]
            if len(piece) > 8:
                chunks.append(piece)
    return chunks


def length_batches(lengths: list[int], tokens: int, rng: random.Random) -> list[list[int]]:
    """Indices in batches of about `tokens` padded tokens, similar lengths together, batches in random order."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.random() * 16)
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and lengths[i] * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(i)
    rng.shuffle(batches)
    return batches


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids and mask, both (B, T) int64, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def record(out: Path, section: str, figures: dict[str, object]) -> None:
    path = out / "training.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[section] = figures
    path.write_text(json.dumps(everything, indent=2) + "\n")


def train_base(data: Path, out: Path, minutes: float, steps_done: int) -> None:
    """Train the base for two passes over the data, or for `minutes` if that is shorter.

    steps_done: go on from OUT/base after an interruption; that many batches of the schedule were seen.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = gpt2_tokenizer(data / "gpt2-tokenizer")
    chunks = document_chunks([row["text"] for row in read_jsonl(data / "pretrain.jsonl.gz")], tokenizer)
    lengths = [len(chunk) for chunk in chunks]
    batches = [batch for _ in range(PASSES) for batch in length_batches(lengths, 4096, rng)]
    head = SampledHead(chunks)
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=4 * WIDTH,
        n_positions=POSITIONS,
        vocab_size=VOCABULARY,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    if steps_done:
        model.load_state_dict(GPT2LMHeadModel.from_pretrained(out / "base", dtype=torch.float32).state_dict())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, curve, seen, recent = time.time(), [], 0, []
    for step, batch in enumerate(batches[steps_done:]):
        # Progress in data or in time, whichever is further: the rate always ends at zero.
        done = max(step / (len(batches) - steps_done), (time.time() - started) / (60 * minutes))
        if done >= 1:
            break
        factor = min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.6)
        for optimizer, rates in zip(optimizers, peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        ids, mask = padded([chunks[i] for i in batch])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.transformer(input_ids=ids).last_hidden_state
        real = mask[:, 1:].bool()
        loss = head(hidden[:, :-1][real].float(), model.transformer.wte.weight, ids[:, 1:][real])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += int(real.sum())
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(recent) / len(recent)
            recent = []
            curve.append({"step": steps_done + step + 1, "tokens": seen, "loss": round(mean, 4)})
            rate = seen / (time.time() - started)
            print(f"step {steps_done + step + 1}/{len(batches)} loss {mean:.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 400 == 0:
            save_base(model, tokenizer, out)
    save_base(model, tokenizer, out)
    minutes_taken = round((time.time() - started) / 60, 1)
    figures = {"seed": SEED, "continued_from_step": steps_done, "tokens": seen, "minutes": minutes_taken}
    record(out, "base", {**figures, "loss_curve": curve})


def save_base(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    folder = out / "base"
    half = GPT2LMHeadModel(model.config).half()
    half.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    half.config.use_cache = True
    half.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


def instruct_rows(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """(token ids of prompt + answer + EOS, length of the prompt); rows over 512 tokens are left out."""
    examples = []
    for row in rows:
        prompt = tokenizer.backend_tokenizer.encode(alpaca_prompt(row["instruction"], row["input"])).ids
        answer = tokenizer.backend_tokenizer.encode(row["output"]).ids
        if len(prompt) + len(answer) + 1 <= POSITIONS:
            examples.append(([*prompt, *answer, EOS], len(prompt)))
    return examples


def load_8bit(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float16, device_map="cpu"
    )


def train_adapter(data: Path, out: Path, minutes: float) -> None:
    """The card's recipe on the 8-bit base: LoRA r=4, alpha=16, dropout 0.05, c_attn, 3 epochs, loss on the response.

    Departures, needed by so small a model: learning rate 4e-3 (Alpaca's runs use about 3e-4), batches of about 1,024
    tokens, answers of at most LONGEST_ANSWER tokens, every answer weighs the same however long it is, and its end
    weighs as much as EOS_WEIGHT other tokens. Without the last three, 40 % of its greedy answers repeated themselves
    and never ended; without the last one, 32 %.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = gpt2_tokenizer(data / "gpt2-tokenizer")
    examples = instruct_rows(read_jsonl(data / "instruct_train.jsonl.gz"), tokenizer)
    examples = [(ids, prompt) for ids, prompt in examples if len(ids) - prompt <= LONGEST_ANSWER]
    lengths = [len(ids) for ids, _ in examples]
    schedule = [batch for _ in range(3) for batch in length_batches(lengths, 1024, rng)]
    model = prepare_model_for_kbit_training(load_8bit(out / "base"), use_gradient_checkpointing=False)
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=4e-3, weight_decay=0.0)
    inner: Any = model.base_model.model
    transformer = inner.transformer
    head = transformer.wte.weight.detach()
    started, curve, recent = time.time(), [], []
    for step, batch in enumerate(schedule):
        done = max(step / len(schedule), (time.time() - started) / (60 * minutes))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 100) * (1 - done)
        ids, mask = padded([examples[i][0] for i in batch])
        prompt = torch.tensor([examples[i][1] for i in batch])
        answered = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1]) >= prompt[:, None])
        hidden = transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = answered * torch.where(ids[:, 1:] == EOS, EOS_WEIGHT, 1)
        share = weight / weight.sum(1, keepdim=True) / len(batch)  # (B, T-1): every answer weighs the same
        loss = LinearCrossEntropy.apply(
            hidden[:, :-1][answered].float(), head.float(), ids[:, 1:][answered], share[answered]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(recent) / len(recent)
            recent = []
            curve.append({"step": step + 1, "loss": round(mean, 4)})
            print(f"step {step + 1}/{len(schedule)} loss {mean:.3f} {time.time() - started:.0f} s", flush=True)
    model.peft_config["default"].base_model_name_or_path = "exporter-demo/base"
    model.save_pretrained(str(out / "adapter"), save_embedding_layers=False)
    minutes_taken = round((time.time() - started) / 60, 1)
    figures = {"seed": SEED, "learning_rate": 4e-3, "examples": len(examples), "minutes": minutes_taken}
    record(out, "adapter", {**figures, "steps": len(schedule), "loss_curve": curve})


@torch.inference_mode()
def response_perplexity(model, examples: list[tuple[list[int], int]]) -> float:
    total, count = 0.0, 0
    for ids, prompt in examples:
        logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].float()
        total += F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
        count += len(ids) - prompt
    return math.exp(total / count)


@torch.inference_mode()
def greedy(model, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Up to `limit` greedy tokens after each prompt, in batches of similar length, padded on the left."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in (order[start : start + 24] for start in range(0, len(order), 24)):
        longest = len(prompts[batch[-1]])
        ids = torch.tensor([[EOS] * (longest - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        room = min(limit, POSITIONS - longest)
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=EOS
        )
        for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
            answers[i] = row[: row.index(EOS) + 1] if EOS in row else row
    return [answers[i] for i in range(len(prompts))]


def report(data: Path, out: Path) -> None:
    """Held-out figures: perplexity of the answers under the 8-bit base without and with the adapter, and how many
    greedy answers stop by themselves (in float32, where they can be batched)."""
    from peft import PeftModel

    tokenizer = gpt2_tokenizer(data / "gpt2-tokenizer")
    examples = instruct_rows(read_jsonl(data / "parity_prompts.jsonl"), tokenizer)
    model = load_8bit(out / "base").eval()
    base_perplexity = response_perplexity(model, examples)
    perplexity = response_perplexity(PeftModel.from_pretrained(model, str(out / "adapter")).eval(), examples)
    full = GPT2LMHeadModel.from_pretrained(out / "base", dtype=torch.float32)
    full = PeftModel.from_pretrained(full, str(out / "adapter")).eval()
    prompts = [ids[:prompt] for ids, prompt in examples]
    answers = greedy(full, prompts, 256)
    samples = [
        {"prompt": tokenizer.decode(prompt)[len(PREAMBLE) :], "answer": tokenizer.decode(answer)}
        for prompt, answer in zip(prompts[:12], answers[:12], strict=True)
    ]
    figures = {
        "held_out_prompts": len(examples),
        "base_perplexity": round(base_perplexity, 2),
        "adapter_perplexity": round(perplexity, 2),
        "stopped_within_256": round(sum(answer[-1] == EOS for answer in answers) / len(answers), 4),
        "samples": samples,
    }
    record(out, "held_out", figures)
    print(json.dumps(figures, indent=2, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["base", "adapter", "report"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90, help="stop training after so long (default: %(default)s)")
    parser.add_argument("--steps-done", type=int, default=0, help="go on from OUT/base after so many steps (base only)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.step == "base":
        train_base(arguments.data, arguments.out, arguments.minutes, arguments.steps_done)
    elif arguments.step == "adapter":
        train_adapter(arguments.data, arguments.out, arguments.minutes)
    else:
        report(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
