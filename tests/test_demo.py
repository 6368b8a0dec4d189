"""The demo: the packaged pair, end to end, once. Then every promise about its output."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import exporter
from exporter.demonstration import PAIR
from exporter.errors import InputRefused
from tests.pairs import Pair, loaded, peft_merge

NEW = 64
TIE = 1e-4  # below this margin transformers' own choice is a coin toss
PROMPTS = [
    "The capital of France is",
    "!",
    "Wow! That is great! I",
    "Once upon a time there was a little girl who lived",
    "The",
    "### Instruction:\n\nName three colours!\n\n### Response:\n",
    "In 1969, the first men on the moon were",
    "Q: What is two plus two? A:",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    result = exporter.demo(out=out)
    assert result.verdict == "PASS"
    assert result.exit_code == 0
    return out


def test_the_output_has_the_promised_files(demo: Path) -> None:
    merged = {path.name for path in (demo / "merged").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= merged
    assert {"README.md", "exporter.json", "model.onnx", "genai_config.json"} <= merged
    assert {path.name for path in (demo / "parity").iterdir()} == {
        "verification.json", "junit.xml", "report.html", "summary.md",
    }  # fmt: skip
    assert (demo / "int8/weights.safetensors").is_file()
    leftovers = [path for path in demo.rglob("*") if path.name.endswith(".partial") or path.name == ".exporter.lock"]
    assert leftovers == []


def test_the_directory_holds_the_weights_once(demo: Path) -> None:
    weights = (demo / "merged/model.safetensors").stat().st_size
    others = sum(p.stat().st_size for p in (demo / "merged").iterdir() if p.name != "model.safetensors")
    tokenizer = (demo / "merged/tokenizer.json").stat().st_size
    assert others - tokenizer < 0.02 * weights
    assert not any(path.is_symlink() for path in demo.rglob("*"))


def test_weights_equal_peft_bit_for_bit_and_load_without_a_word(demo: Path) -> None:
    wanted, got = peft_merge(Pair(PAIR / "base", PAIR / "adapter")), loaded(demo / "merged")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    base, merged = load_file(PAIR / "base/model.safetensors"), load_file(demo / "merged/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(len(changed))}
    assert len(changed) >= 8


class Oracle:
    """transformers in float32: greedy tokens, and at each the margin of its choice."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.prompts = [self.tokenizer(text)["input_ids"] for text in PROMPTS]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.expected: list[list[int]] = []
        self.compared: list[int] = []
        for prompt in self.prompts:
            out: Any = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=50256,
                return_dict_in_generate=True,
                output_logits=True,
            )
            best = torch.cat(out.logits).topk(2).values
            close = ((best[:, 0] - best[:, 1]) < TIE).nonzero()[:, 0].tolist()
            self.expected.append(out.sequences[0, len(prompt) :].tolist())
            self.compared.append(close[0] if close else len(self.expected[-1]))

    def check(self, answers: list[list[int]]) -> None:
        for answer, expected, count in zip(answers, self.expected, self.compared, strict=True):
            assert answer[:count] == expected[:count]
        assert sum(self.compared) >= 0.95 * sum(map(len, self.expected))


@pytest.fixture(scope="module")
def oracle(demo: Path) -> Oracle:
    return Oracle(demo / "merged")


def test_the_prompts_hold_the_padding_trap(oracle: Oracle) -> None:
    assert sum(0 in prompt for prompt in oracle.prompts) >= 3
    assert sum(map(len, oracle.expected)) > 4 * NEW


def test_greedy_tokens_of_the_runner(demo: Path, oracle: Oracle) -> None:
    from exporter.runtime.sampling import Sampling

    runner = exporter.load(demo / "merged")
    oracle.check(list(runner.generate(oracle.prompts, NEW, Sampling())))


def test_greedy_tokens_of_optimum_in_one_ragged_batch(demo: Path, oracle: Oracle) -> None:
    runtime = pytest.importorskip(
        "optimum.onnxruntime", reason="optimum's ONNX part is not installed", exc_type=ImportError
    )
    model = runtime.ORTModelForCausalLM.from_pretrained(demo / "merged", use_io_binding=False)
    width = max(map(len, oracle.prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in oracle.prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in oracle.prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=50256)
    oracle.check(out[:, width:].tolist())


@pytest.mark.parametrize("rows", [1, 8])
def test_greedy_tokens_of_genai(demo: Path, oracle: Oracle, rows: int) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(demo / "merged"))
    answers: list[list[int]] = []
    for start in range(0, len(oracle.prompts), rows):
        batch = oracle.prompts[start : start + rows]
        width = max(map(len, batch))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=width + NEW, batch_size=rows, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([row + [50256] * (width - len(row)) for row in batch], np.int32))
        found: list[list[int]] = [[] for _ in batch]
        while not generator.is_done():
            generator.generate_next_token()
            for answer, token in zip(found, generator.get_next_tokens(), strict=True):
                answer.append(int(token))
        answers += found
    oracle.check(answers)


def test_an_instruction_is_answered_through_the_cards_prompt(demo: Path) -> None:
    answer = exporter.generate(demo / "merged", instruction="Name three colours.", max_new_tokens=40)
    words = answer.text.split()
    assert len(words) >= 3
    assert sum(word.strip(".,!?:;").isalpha() for word in words) > 0.6 * len(words)


def test_most_held_out_prompts_stop_by_themselves(demo: Path) -> None:
    from exporter.prompts import ALPACA, render_instruction
    from exporter.runtime.sampling import Sampling

    path = Path(exporter.__file__).parent / "parity/prompts/alpaca.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][::3]
    tokenizer = AutoTokenizer.from_pretrained(demo / "merged")
    texts = [render_instruction(ALPACA, row["instruction"], row["input"]) for row in rows]
    prompts = [ids for ids in tokenizer(texts)["input_ids"] if len(ids) < 256]
    answers = list(exporter.load(demo / "merged").generate(prompts, 256, Sampling()))
    stopped = sum(answer[-1] == 50256 or len(answer) < 256 for answer in answers)
    assert stopped >= 0.8 * len(answers)


def test_running_again_does_nothing(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    again = exporter.demo(out=demo)
    assert again.did_nothing
    assert again.verdict == "PASS"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_deleting_one_output_redoes_only_what_is_missing(demo: Path) -> None:
    (demo / "int8/model.onnx").unlink()
    again = exporter.demo(out=demo)
    assert {stage.name: stage.skipped for stage in again.stages} == {
        "merge": True, "export-native-cpu": True, "export-int8-cpu": False, "verify": True,
    }  # fmt: skip


def test_a_flipped_bit_in_the_merged_weights_does_not_pass(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "merged"
    shutil.copytree(demo / "merged", copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(InputRefused):
        exporter.verify(base=PAIR / "base", adapter=PAIR / "adapter", bundle=copy)


def test_the_pair_names_no_path_and_fits_its_size() -> None:
    config = json.loads((PAIR / "adapter/adapter_config.json").read_text())
    assert not config["base_model_name_or_path"].startswith(("/", "."))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16, ["c_attn"])
    assert sum(path.stat().st_size for path in PAIR.rglob("*")) < 30_000_000
    figures = json.loads((PAIR / "training.json").read_text())
    assert figures["held_out"]["adapter_perplexity"] < 0.95 * figures["held_out"]["base_perplexity"]
    assert figures["held_out"]["stopped_within_256"] >= 0.8
