"""PEFT's own merge as the oracle of `exporter.merge`: tiny random bases, adapters that PEFT makes and saves itself."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

import exporter
from exporter.merging.merge import MergedCheckpoint
from tests.pairs import Pair, byte_tokenizer

VOCABULARY = 257
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def save_random_base(directory: Path, architecture: str, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """A base of a transformers class. Biases and norms are random too, so that nothing is trivially zero or one."""
    torch.manual_seed(0)
    model: Any = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def open_base(directory: Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """The class that config.json names. A key that is missing or unexpected is an error."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def save_random_adapter(
    directory: Path,
    base: Path,
    config: PeftConfig,
    *,
    seed: int = 1,
    save_embedding_layers: bool | str = "auto",
    before: Callable[[PreTrainedModel], object] = lambda model: None,
) -> None:
    """Every tensor that PEFT would train is moved away from where it begins. before: what is done to the base first."""
    torch.manual_seed(seed)
    model = open_base(base)
    before(model)
    with warnings.catch_warnings(action="ignore"):
        peft_model: Any = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * 0.1
        peft_model.create_or_update_model_card = lambda directory: None  # a template that no test reads
        peft_model.save_pretrained(str(directory), save_embedding_layers=save_embedding_layers)


def make_random_pair(
    directory: Path,
    architecture: str,
    config: PretrainedConfig,
    adapter: PeftConfig,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Pair:
    pair = Pair(directory / "base", directory / "adapter")
    save_random_base(pair.base, architecture, config, dtype)
    save_random_adapter(pair.adapter, pair.base, adapter, **options)
    return pair


def open_peft(pair: Pair, before: Callable[[PreTrainedModel], object] = lambda model: None) -> Any:
    """The unmerged model in float32, in memory of its own: a product with weights that a mapped file holds at an odd
    address may differ in its last bit.
    """
    with warnings.catch_warnings(action="ignore"):
        base = open_base(pair.base)
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()
        before(base)
        return PeftModel.from_pretrained(base, str(pair.adapter)).eval()


def merged_by_peft(pair: Pair, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's merge in float32 by one thread, rounded once to the type that each tensor has in `base`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            merged = open_peft(pair).merge_and_unload().state_dict()
    finally:
        torch.set_num_threads(threads)
    return {name: merged[name].to(tensor.dtype) for name, tensor in base.items()}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """What transformers loads, in the stored types."""
    return dict(open_base(directory, "auto").state_dict())


def merge(pair: Pair, out: Path, **options: Any) -> MergedCheckpoint:
    return exporter.merge(base=pair.base, adapter=pair.adapter, out=out, **options)


def assert_merged_as_peft(pair: Pair, out: Path, **options: Any) -> set[str]:
    """Merge: the bits of PEFT's merge in every tensor. Returns the names of the tensors that are not the base's."""
    merge(pair, out, **options)
    before, got = stored(pair.base), stored(out)
    wanted = merged_by_peft(pair, before)
    assert set(got) == set(wanted)
    assert {name for name in wanted if got[name].dtype != wanted[name].dtype} == set()
    assert {name for name in wanted if not torch.equal(got[name], wanted[name])} == set()
    touched = {name for name in got if not torch.equal(got[name], before[name])}
    assert touched
    return touched


@torch.no_grad()
def logits(model: Any, vocabulary: int = VOCABULARY, **inputs: torch.Tensor) -> torch.Tensor:
    """Of every token of the vocabulary, in sequences of 27."""
    count = -(-vocabulary // 27)
    ids = torch.arange(count * 27).reshape(count, 27) % vocabulary
    return model(input_ids=ids, **inputs).logits.float()


def assert_logits_as_unmerged(pair: Pair, out: Path, tolerance: float = 1e-4, **options: Any) -> None:
    """Merge: the merged model computes what the unmerged one does, and not what the base does. For float32 bases."""
    merge(pair, out, **options)
    wanted = logits(open_peft(pair))
    assert (logits(open_base(out)) - wanted).abs().max() < tolerance
    assert (logits(open_base(pair.base)) - wanted).abs().max() > 100 * tolerance
