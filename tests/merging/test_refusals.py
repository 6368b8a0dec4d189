"""Bad input gets one message that names it, exit code 4, and leaves nothing behind."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, LlamaConfig

import exporter
from exporter.errors import InputRefused
from exporter.merging.merge import merge
from tests.pairs import Pair, edit_json, gpt2_config, lora_config, make_pair, rewrite, save_adapter, save_base

ADAPTER = "adapter_model.safetensors"


def assert_refused(pair: Pair, out: Path, match: str) -> None:
    with pytest.raises(InputRefused, match=match) as raised:
        exporter.merge(base=pair.base, adapter=pair.adapter, out=out)
    assert raised.value.exit_code == 4
    assert not out.exists()


def test_missing_directories_and_files(pair: Pair, tmp_path: Path) -> None:
    assert_refused(Pair(tmp_path / "nowhere", pair.adapter), tmp_path / "out", "nowhere")
    (pair.adapter / ADAPTER).unlink()
    assert_refused(pair, tmp_path / "out", "no adapter weights")
    (pair.base / "model.safetensors").unlink()
    assert_refused(pair, tmp_path / "out", "no adapter weights|no weights")


def test_an_adapter_of_another_width(pair: Pair, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", gpt2_config(n_embd=32))
    assert_refused(
        Pair(pair.base, other.adapter), tmp_path / "out", r"32 inputs and 96 outputs(.|\n)*64 inputs and 192 outputs"
    )


def test_an_adapter_of_a_deeper_model(pair: Pair, tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", gpt2_config(n_layer=4))
    assert_refused(Pair(pair.base, other.adapter), tmp_path / "out", r"h\.3\.attn\.c_attn")


def test_an_adapter_of_a_shallower_model(pair: Pair, tmp_path: Path) -> None:
    """Every tensor would find its place, and one layer would silently stay unmerged."""
    other = make_pair(tmp_path / "other", gpt2_config(n_layer=2))
    assert_refused(
        Pair(pair.base, other.adapter), tmp_path / "out", r"no factors for 'transformer\.h\.2\.attn\.c_attn'"
    )


def test_an_adapter_whose_tensors_match_nothing(pair: Pair, tmp_path: Path) -> None:
    rewrite(pair.adapter / ADAPTER, lambda tensors: {n.replace("c_attn", "q_proj"): t for n, t in tensors.items()})
    assert_refused(pair, tmp_path / "out", "none of the 3 modules")


def test_half_a_pair_of_factors(pair: Pair, tmp_path: Path) -> None:
    rewrite(pair.adapter / ADAPTER, lambda tensors: dict(sorted(tensors.items())[1:]))
    assert_refused(pair, tmp_path / "out", "lora_B and no lora_A")


def test_all_zero_b(pair: Pair, tmp_path: Path) -> None:
    rewrite(pair.adapter / ADAPTER, lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()})
    assert_refused(pair, tmp_path / "out", "merging would change nothing")


def test_a_rank_that_the_configuration_denies(pair: Pair, tmp_path: Path) -> None:
    edit_json(pair.adapter / "adapter_config.json", r=8)
    assert_refused(pair, tmp_path / "out", "rank 8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("init_lora_weights", "pissa"),
        ("enable_lora", [True, False, True]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.weight"]),
        ("a_field_of_the_future", {"changes": "weights"}),
    ],
)
def test_fields_that_change_the_weights_otherwise_are_refused_by_name(
    pair: Pair, tmp_path: Path, field: str, value: object
) -> None:
    edit_json(pair.adapter / "adapter_config.json", **{field: value})
    assert_refused(pair, tmp_path / "out", field)


def test_another_kind_of_adapter(pair: Pair, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(pair.base)
    config = IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "ia3"))
    # PEFT begins IA3 with ones: an adapter that was never trained
    assert_refused(Pair(pair.base, tmp_path / "ia3"), tmp_path / "out", "changed no value")
    for kind in ("TELEPATHY", "PREFIX_TUNING", "XLORA"):
        edit_json(pair.adapter / "adapter_config.json", peft_type=kind)
        assert_refused(pair, tmp_path / "out", kind)


def test_a_tensor_that_is_not_a_factor(pair: Pair, tmp_path: Path) -> None:
    rewrite(pair.adapter / ADAPTER, lambda tensors: tensors | {"base_model.model.extra": torch.ones(2)})
    assert_refused(pair, tmp_path / "out", "extra")


def test_an_untied_head_is_merged(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", gpt2_config(tie_word_embeddings=False))
    save_adapter(tmp_path / "adapter", model, lora_config(target_modules=["lm_head"], fan_in_fan_out=False))
    result = exporter.merge(base=tmp_path / "base", adapter=tmp_path / "adapter", out=tmp_path / "out")
    assert [tensor.name for tensor in result.plan.changed] == ["lm_head.weight"]
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_quantized_base(pair: Pair, tmp_path: Path) -> None:
    edit_json(pair.base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert_refused(pair, tmp_path / "out", r"quantized \(bitsandbytes\)")


def test_a_base_that_lacks_a_tensor_or_has_one_too_many(pair: Pair, tmp_path: Path) -> None:
    path = pair.base / "model.safetensors"
    whole = path.read_bytes()
    rewrite(path, lambda tensors: {n: t for n, t in tensors.items() if n != "transformer.h.1.ln_2.bias"})
    assert_refused(pair, tmp_path / "out", r"no tensor for 'transformer\.h\.1\.ln_2\.bias'")
    path.write_bytes(whole)
    rewrite(path, lambda tensors: tensors | {"transformer.h.9.oddity": torch.ones(3)})
    assert_refused(pair, tmp_path / "out", r"h\.9\.oddity")


def test_a_model_with_its_own_code_is_not_run(pair: Pair, tmp_path: Path) -> None:
    (pair.base / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        pair.base / "config.json",
        model_type="evil",
        architectures=["Evil"],
        auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
    )
    assert_refused(pair, tmp_path / "out", "evil|Evil")
    assert not (tmp_path / "ran").exists()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_a_pickle_payload_is_refused_without_running_it(pair: Pair, tmp_path: Path, where: str) -> None:
    directory, name = (pair.base, "pytorch_model.bin") if where == "base" else (pair.adapter, "adapter_model.bin")
    for old in directory.glob("*.safetensors"):
        old.unlink()
    torch.save({"weight": Payload(tmp_path / "ran")}, directory / name)
    assert_refused(pair, tmp_path / "out", "more than tensors")
    (directory / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert_refused(pair, tmp_path / "out", "posix.system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_truncated_safetensors(pair: Pair, tmp_path: Path, keep: int, where: str) -> None:
    path = pair.base / "model.safetensors" if where == "base" else pair.adapter / ADAPTER
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(pair, tmp_path / "out", "malformed")


def test_a_configuration_that_is_not_json(pair: Pair, tmp_path: Path) -> None:
    (pair.adapter / "adapter_config.json").write_text("{")
    assert_refused(pair, tmp_path / "out", "not JSON")
    (pair.base / "config.json").write_text(json.dumps([1, 2]))
    assert_refused(pair, tmp_path / "out", "not JSON|holds a list")


def test_no_tokenizer_anywhere(pair: Pair, tmp_path: Path) -> None:
    for path in pair.base.glob("*token*"):
        path.unlink()
    assert_refused(pair, tmp_path / "out", "no tokenizer")


def test_a_configuration_whose_ids_lie_outside_the_vocabulary(tmp_path: Path) -> None:
    """transformers asserts this while it builds the model: a refusal, not a traceback."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=257,
    )  # fmt: skip
    pair = make_pair(tmp_path, config, lora=lora_config(target_modules=["q_proj"], fan_in_fan_out=False))
    edit_json(pair.base / "config.json", pad_token_id=999)
    assert_refused(pair, tmp_path / "out", "cannot build")


def test_a_zero_adapter_beside_a_trained_one(pair: Pair, tmp_path: Path) -> None:
    zero = shutil.copytree(pair.adapter, tmp_path / "zero")
    rewrite(zero / ADAPTER, lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()})
    with pytest.raises(InputRefused, match="merging would change nothing"):
        merge(base=pair.base, adapter=[pair.adapter, zero], out=tmp_path / "out")
