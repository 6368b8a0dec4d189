"""A small pair with its merged checkpoint and bundles, made once: GPT-2 architecture, a tokenizer of its own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

from exporter.files import sha256_file
from exporter.graph.export import export
from exporter.merging.merge import merge
from exporter.parity.bundle_check import Run
from exporter.parity.bundles import Bundle, open_bundles
from exporter.parity.documents import tokens_sha256
from exporter.parity.gates import load_thresholds
from exporter.parity.inputs import make_documents, open_pair
from exporter.parity.int8_base import Onto
from exporter.parity.oracle import Oracle
from exporter.parity.pairs import common_pairs
from exporter.parity.scoring import LogitStore
from exporter.parity.verify import _score_references
from exporter.progress import SILENT
from exporter.prompts import ALPACA
from exporter.sources.safetensors_file import read_header

PROMPTS = Path(__file__).parents[2] / "exporter" / "parity" / "prompts" / "alpaca.jsonl"
VOCABULARY = 480


@dataclass(frozen=True, slots=True)
class Made:
    base: Path
    adapter: Path
    merged: Path
    int8: Path
    int4: Path
    prompts: Path


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["instruction"] + "\n" + row["output"] for row in rows], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_base(directory: Path, *, layers: int = 3, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_inner=256,
        n_positions=256,
        vocab_size=VOCABULARY,
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.12,
    )
    model = GPT2LMHeadModel(config).half()
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


def write_adapter(directory: Path, model: GPT2LMHeadModel, *, r: int = 4, std: float = 0.03, seed: int = 1) -> None:
    torch.manual_seed(seed)
    lora = LoraConfig(r=r, lora_alpha=16, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    peft = get_peft_model(model.float(), lora)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    peft.save_pretrained(str(directory))


def open_bundle(directory: Path) -> Bundle:
    """The only bundle in a directory."""
    (bundle,) = open_bundles(directory)
    return bundle


def score_pair(made: Made, directory: Path, onto: Onto = "original") -> Run:
    """What `verify` shares between bundles: the references, scored once for all tests that damage a bundle."""
    pair = open_pair(made.base, [(made.adapter, 1.0)])
    documents, _ = make_documents(pair, made.prompts, "commit", ALPACA)
    store = LogitStore(directory, documents, pair.vocabulary)
    reference = _score_references(pair, store, "int8", tokens_sha256(documents), SILENT, onto)
    common = common_pairs(store, reference)
    oracle = Oracle(pair.base, pair.weighted, onto)
    return Run(pair, oracle, documents, store, reference, common, load_thresholds(), "commit", SILENT)


@pytest.fixture(scope="session")
def scored(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return score_pair(made, tmp_path_factory.mktemp("scored"))


def replace_tensors(directory: Path, file: str, values: dict[str, torch.Tensor], *, update: bool = True) -> None:
    """Put other bytes into the place of tensors, and, as an attacker would, their file's hash into the manifest."""
    path = directory / file
    data = bytearray(path.read_bytes())
    for name, info in read_header(path)[0].items():
        if name in values:
            raw = values[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert len(raw) == info.nbytes
            data[info.offset : info.offset + info.nbytes] = raw
    path.write_bytes(data)
    if update:
        update_manifest(directory, file)


def update_manifest(directory: Path, *files: str) -> None:
    """Make the manifest say what the files are now."""
    manifest = json.loads((directory / "exporter.json").read_text())
    for section in manifest["stages"].values():
        for name in files:
            if name in section.get("files", {}):
                section["files"][name]["sha256"] = sha256_file(directory / name)
                section["files"][name]["size"] = (directory / name).stat().st_size
    (directory / "exporter.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("pair")
    model = write_base(root / "base")
    write_adapter(root / "adapter", model)
    merge(base=root / "base", adapter=root / "adapter", out=root / "out" / "merged", template="alpaca")
    bundles = export(root / "out" / "merged", precision=("native", "int8", "int4"))
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(line + "\n" for line in PROMPTS.read_text().splitlines()[:28]))
    native, int8, int4 = (bundle.directory for bundle in bundles)
    return Made(root / "base", root / "adapter", native, int8, int4, prompts)
