"""Every adapter method through `exporter.merge`: the bits of PEFT's own merge in float32, rounded once."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

import exporter
from exporter.errors import InputRefused
from exporter.merging.peft_layer import MERGEABLE
from exporter.merging.stream import block_elements, tensor_blocks
from tests.merging import test_peft_layer
from tests.merging.oracle import (
    TOKENS,
    assert_logits_as_unmerged,
    assert_merged_as_peft,
    logits,
    make_random_pair,
    merge,
    merged_by_peft,
    open_base,
    open_peft,
    save_random_adapter,
    stored,
)
from tests.pairs import Pair, edit_json, rewrite

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Architecture:
    """Names of its modules. square, tall: matrices with a bias, the second of more rows than one block."""

    name: str
    config: type[PretrainedConfig]
    sizes: dict[str, Any]
    dtype: torch.dtype
    layers: str
    square: str
    tall: str
    norm: str
    embedding: str
    head: str = "lm_head"

    def build(self, **changes: Any) -> PretrainedConfig:
        return self.config(**{**self.sizes, **TOKENS, "tie_word_embeddings": False, **changes})

    def fill(self, value: Any) -> Any:
        """`value` with this architecture's names in the place of {square}, {tall}, ..."""
        if isinstance(value, dict):
            return {self.fill(key): self.fill(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.fill(one) for one in value]
        if isinstance(value, str):
            for key in ("layers", "square", "tall", "norm", "embedding", "head"):
                value = value.replace("{" + key + "}", getattr(self, key))
        return value


SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 40,
    "max_position_embeddings": 32,
}
ARCHITECTURES = {
    "gpt2": Architecture(  # Conv1D
        "GPT2LMHeadModel",
        transformers.GPT2Config,
        {"n_embd": 40, "n_layer": 2, "n_head": 2, "n_positions": 32},
        torch.float16,
        "transformer.h",
        "attn.c_proj",
        "mlp.c_proj",
        "ln_2",
        "transformer.wte",
    ),
    "llama": Architecture(  # Linear, with biases where it may have them
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        {**SIZES, "intermediate_size": 200, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        torch.bfloat16,
        "model.layers",
        "self_attn.o_proj",
        "mlp.up_proj",
        "input_layernorm",
        "model.embed_tokens",
    ),
    "opt": Architecture(  # Linear with biases, two prefixes
        "OPTForCausalLM",
        transformers.OPTConfig,
        {**SIZES, "ffn_dim": 200, "word_embed_proj_dim": 40},
        torch.float32,
        "model.decoder.layers",
        "self_attn.out_proj",
        "fc1",
        "final_layer_norm",
        "model.decoder.embed_tokens",
    ),
}
CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SMALL_MEMORY = 10_000  # several blocks of rows
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))


@dataclass(frozen=True)
class Lora:
    """options: of LoraConfig, with {square}, {norm}, ... for the modules. changed: the tensors' names or their ends."""

    changed: tuple[str, ...]
    options: dict[str, Any]


def lora(changed: str, **options: Any) -> Lora:
    return Lora(tuple(changed.split()), options)


WEIGHTS = "{square}.weight {tall}.weight"
EMBEDDED = ["{embedding}", "{tall}"]
LORA = {
    "plain": lora(WEIGHTS),
    "rank one": lora(WEIGHTS, r=1),
    "rank beyond the width": lora(WEIGHTS, r=48),
    "rslora": lora(WEIGHTS, use_rslora=True),
    "patterns": lora(WEIGHTS, rank_pattern={r"1\..*{tall}": 7, "{square}": 2}, alpha_pattern={"{tall}": 3}),
    "rslora with patterns": lora(WEIGHTS, use_rslora=True, rank_pattern={"{tall}": 9}, alpha_pattern={"{tall}": 5}),
    "dora": lora(WEIGHTS, use_dora=True),
    "dora with rslora": lora(WEIGHTS, use_dora=True, use_rslora=True),
    "embedding": lora("{embedding}.weight {tall}.weight", target_modules=EMBEDDED),
    "dora embedding": lora("{embedding}.weight {tall}.weight", target_modules=EMBEDDED, use_dora=True),
    "head": lora("{head}.weight", target_modules=["{head}"]),
    "lora bias": lora(WEIGHTS + " {square}.bias {tall}.bias", lora_bias=True),
    "bias lora_only": lora(WEIGHTS + " {square}.bias {tall}.bias", bias="lora_only"),
    "bias all": lora(WEIGHTS + " bias", bias="all"),
    "bias all with a lora bias": lora(WEIGHTS + " bias", bias="all", lora_bias=True),
    "saved head": lora(WEIGHTS + " {head}.weight", modules_to_save=["lm_head"]),
    "saved norms": lora(WEIGHTS + " {norm}.weight {norm}.bias", modules_to_save=["{norm}"]),
    "saved matrix": lora(WEIGHTS + " {tall}.bias", target_modules=["{square}"], modules_to_save=["{tall}"]),
    "tokens": lora(WEIGHTS + " {embedding}.weight", trainable_token_indices=[5, 1, 256]),
    "tokens of two modules": lora(
        WEIGHTS + " {embedding}.weight {head}.weight", trainable_token_indices={"{embedding}": [0, 7], "{head}": [3]}
    ),
    "one layer": lora("{layers}.1.{square}.weight {layers}.1.{tall}.weight", layers_to_transform=[1]),
    "regular expression": lora(
        "{layers}.1.{square}.weight {layers}.1.{tall}.weight", target_modules=r".*\.1\.({square}|{tall})"
    ),
    "excluded": lora(
        "{square}.weight {layers}.1.{tall}.weight", exclude_modules=r".*\.0\.{tall}"
    ),
    "everything at once": lora(
        WEIGHTS + " bias {norm}.weight {head}.weight {embedding}.weight",
        use_rslora=True,
        rank_pattern={"{tall}": 3},
        bias="all",
        modules_to_save=["{norm}", "{head}"],
        trainable_token_indices=[2],
    ),
}  # fmt: skip


def lora_config(architecture: Architecture, options: dict[str, Any]) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 12, "target_modules": ["{square}", "{tall}"], **options}
    return LoraConfig(**architecture.fill(values))


def lora_pair(directory: Path, architecture: Architecture, **options: Any) -> Pair:
    config = lora_config(architecture, options)
    return make_random_pair(directory, architecture.name, architecture.build(), config, architecture.dtype)


def named(pair: Pair, ends: Any) -> set[str]:
    """The base's tensors with these names or ends of names."""
    return {name for name in stored(pair.base) for end in ends if f".{name}".endswith(f".{end}")}


@each_architecture
@pytest.mark.parametrize(
    ("case", "memory"),
    [*((case, SMALL_MEMORY) for case in LORA), *((case, 10**9) for case in ("plain", "dora", "dora embedding"))],
)
def test_lora(tmp_path: Path, case: str, architecture: Architecture, memory: int) -> None:
    pair = lora_pair(tmp_path, architecture, **LORA[case].options)
    touched = assert_merged_as_peft(pair, tmp_path / "out", memory=memory)
    assert touched == named(pair, architecture.fill(LORA[case].changed))


@each_architecture
def test_small_memory_is_several_blocks(tmp_path: Path, architecture: Architecture) -> None:
    """Else the tests above would prove nothing of blocks."""
    pair = lora_pair(tmp_path, architecture, target_modules=["{tall}"])
    plan = merge(pair, tmp_path / "out").plan
    assert plan.changed
    for tensor in plan.changed:
        assert len(tensor_blocks(tensor, block_elements(SMALL_MEMORY))) > 1
        assert len(tensor_blocks(tensor, block_elements(10**9))) == 1


@each_architecture
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_chosen_type_is_rounded_to_once(tmp_path: Path, architecture: Architecture, dtype: str) -> None:
    pair = lora_pair(tmp_path, architecture, use_dora=True)
    merge(pair, tmp_path / "out", dtype=dtype)
    unrounded = {name: tensor.float() for name, tensor in stored(pair.base).items()}
    wanted, got = merged_by_peft(pair, unrounded), stored(tmp_path / "out")
    assert set(got) == set(wanted)
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name].to(getattr(torch, dtype))), name
        assert tensor.dtype == getattr(torch, dtype)


@each_architecture
@pytest.mark.parametrize("case", ["plain", "dora", "lora bias", "bias all", "tokens", "everything at once"])
def test_the_unmerged_model_computes_the_same(tmp_path: Path, case: str, architecture: Architecture) -> None:
    """PEFT's merge and ours could share an error; the unmerged model in float32 is what users trained."""
    pair = lora_pair(tmp_path, architecture, **LORA[case].options)
    assert_logits_as_unmerged(pair, tmp_path / "out", dtype="float32")


SECOND = {"use_rslora": True, "r": 2, "rank_pattern": {"{tall}": 5}, "alpha_pattern": {"{square}": 7}}


@each_architecture
@pytest.mark.parametrize("memory", [SMALL_MEMORY, 10**9])
def test_several_weighted_adapters_are_summed_and_rounded_once(
    tmp_path: Path, architecture: Architecture, memory: int
) -> None:
    pair = lora_pair(tmp_path, architecture, lora_bias=True)
    save_random_adapter(tmp_path / "second", pair.base, lora_config(architecture, SECOND), seed=2)
    weights = {"first": 0.5, "second": -1.25}
    exporter.merge(
        base=pair.base,
        adapter=[pair.adapter, tmp_path / "second"],
        weight=list(weights.values()),
        out=tmp_path / "out",
        memory=memory,
    )
    model = PeftModel.from_pretrained(open_base(pair.base), str(pair.adapter), "first")
    model.load_adapter(str(tmp_path / "second"), "second")
    wanted, got = stored(pair.base), stored(tmp_path / "out")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(layers) == 4
    for name, layer in layers.items():
        linear: Any = layer
        base = linear.get_base_layer()
        total = base.weight.data
        for adapter, weight in weights.items():
            # The scale and the weight are one number: PEFT's add_weighted_adapter scales factors instead
            factor = linear.scaling[adapter]
            linear.scaling[adapter] = factor * weight
            total = total + linear.get_delta_weight(adapter)
        wanted[f"{name}.weight"] = total.to(architecture.dtype)
        bias = base.bias.data + linear.lora_B["first"].bias.data * (linear.scaling["first"])
        wanted[f"{name}.bias"] = bias.to(architecture.dtype)
    assert {name for name in wanted if not torch.equal(wanted[name], got[name])} == set()
    before = stored(pair.base)
    touched = {name for name in got if not torch.equal(got[name], before[name])}
    assert touched == named(
        pair, architecture.fill(["{square}.weight", "{tall}.weight", "{square}.bias", "{tall}.bias"])
    )


# --- Tied embeddings: the oracle is the unmerged model, for PEFT's own merge leaks into the other half ---


@dataclass(frozen=True)
class Tied:
    """split: whether the output holds two weights. changed: the halves that differ from the base's."""

    config: Callable[[Architecture], PeftConfig]
    split: bool
    changed: tuple[str, ...]


def tied_lora(**options: Any) -> Callable[[Architecture], PeftConfig]:
    return lambda architecture: lora_config(architecture, options)


BOTH = ("{embedding}", "{head}")
TIED = {
    "lora on the head": Tied(tied_lora(target_modules=["{head}"]), True, ("{head}",)),
    "lora on the embedding": Tied(tied_lora(target_modules=["{embedding}"]), True, ("{embedding}",)),
    "lora on both": Tied(tied_lora(target_modules=["{head}", "{embedding}"]), True, BOTH),
    "dora on the head": Tied(tied_lora(target_modules=["{head}", "{tall}"], use_dora=True), True, ("{head}",)),
    "dora on the embedding": Tied(tied_lora(target_modules=["{embedding}"], use_dora=True), True, ("{embedding}",)),
    "loha on the head": Tied(lambda a: LoHaConfig(r=4, target_modules=["lm_head"]), True, ("{head}",)),
    "oft on the embedding": Tied(
        lambda a: OFTConfig(r=0, oft_block_size=8, target_modules=[a.embedding]), True, ("{embedding}",)
    ),
    "saved head": Tied(tied_lora(modules_to_save=["{head}"]), True, ("{head}",)),
    "saved embedding": Tied(tied_lora(modules_to_save=["{embedding}"]), True, ("{embedding}",)),
    "both saved": Tied(tied_lora(modules_to_save=["{embedding}", "{head}"]), True, BOTH),
    "tokens": Tied(tied_lora(trainable_token_indices=[1, 5, 256]), False, BOTH),
    "tokens by name": Tied(tied_lora(trainable_token_indices={"{embedding}": [1, 5]}), False, BOTH),
    "the same tokens of both": Tied(
        tied_lora(trainable_token_indices={"{embedding}": [1, 5], "{head}": [1, 5]}), False, BOTH
    ),
    "other tokens of both": Tied(tied_lora(trainable_token_indices={"{embedding}": [1, 5], "{head}": [3]}), True, BOTH),
    "tokens of the head": Tied(tied_lora(trainable_token_indices={"{head}": [3, 200]}), True, ("{head}",)),
    "only tokens": Tied(lambda a: TrainableTokensConfig(token_indices=[3, 9]), False, BOTH),
    "only tokens of both": Tied(
        lambda a: TrainableTokensConfig(token_indices=[3, 9], target_modules=[a.embedding, a.head]), False, BOTH
    ),
    "only tokens of the head": Tied(
        lambda a: TrainableTokensConfig(token_indices=[3, 9], target_modules=[a.head]), True, ("{head}",)
    ),
}
# PEFT ties only what it knows by name, and gives each half its own copy: GPT-2's embedding stays alone.
PEFT_TIES = {
    "tied lora": Tied(tied_lora(target_modules=["{embedding}"], ensure_weight_tying=True), True, BOTH),
    "tied and saved": Tied(tied_lora(modules_to_save=["{embedding}"], ensure_weight_tying=True), False, BOTH),
}


@each_architecture
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings(tmp_path: Path, case: str, architecture: Architecture) -> None:
    """An adapter on one half unties them, and the other half keeps its bytes."""
    check_tied(tmp_path, TIED[case], architecture)


@pytest.mark.parametrize("architecture", [ARCHITECTURES["llama"], ARCHITECTURES["opt"]], ids=["llama", "opt"])
@pytest.mark.parametrize("case", PEFT_TIES)
def test_adapters_that_peft_ties(tmp_path: Path, case: str, architecture: Architecture) -> None:
    check_tied(tmp_path, PEFT_TIES[case], architecture)


def check_tied(tmp_path: Path, tied: Tied, architecture: Architecture) -> None:
    base = architecture.build(tie_word_embeddings=True)
    pair = make_random_pair(tmp_path, architecture.name, base, tied.config(architecture))
    assert_logits_as_unmerged(pair, tmp_path / "out")
    before, after = stored(pair.base), stored(tmp_path / "out")
    for half in (architecture.embedding, architecture.head):
        name = f"{half}.weight"
        assert torch.equal(before[name], after[name]) == (half not in architecture.fill(tied.changed)), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("tie_word_embeddings", True) is not tied.split
    written = load_file(tmp_path / "out/model.safetensors")
    assert (f"{architecture.head}.weight" in written and f"{architecture.embedding}.weight" in written) is tied.split


# --- Resized vocabularies ---


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def resized(count: int) -> Callable[[PreTrainedModel], object]:
    return lambda model: model.resize_token_embeddings(count, mean_resizing=False)


@each_architecture
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (300, {"modules_to_save": ["{embedding}", "{head}"]}),
        (200, {"modules_to_save": ["{embedding}", "{head}"]}),
        (300, {}),
        (300, {"trainable_token_indices": [1, 257, 299]}),
    ],
    ids=["saved", "saved and smaller", "save_embedding_layers", "tokens"],
)
def test_a_resized_vocabulary(
    tmp_path: Path, architecture: Architecture, count: int, options: dict[str, Any], tie: bool
) -> None:
    base = architecture.build(tie_word_embeddings=tie, **dict.fromkeys(SPECIAL, 0))
    config = lora_config(architecture, options)
    pair = make_random_pair(tmp_path, architecture.name, base, config, architecture.dtype, before=resized(count))
    merge(pair, tmp_path / "out", dtype="float32")
    wanted = open_peft(pair, before=resized(count))
    merged = open_base(tmp_path / "out")
    assert merged.config.vocab_size == count == merged.get_input_embeddings().num_embeddings
    assert (logits(merged, count) - logits(wanted, count)).abs().max() < 1e-4
    if not tie:
        with torch.no_grad():
            bits = wanted.merge_and_unload().state_dict()
        got = merged.state_dict()
        assert set(bits) == set(got)
        assert {name for name in bits if not torch.equal(bits[name], got[name])} == set()
    assert merged.config.tie_word_embeddings is (tie and not options.get("modules_to_save"))


# --- Bare parameters: stacks of experts, and matrices ---


def gpt_oss() -> PretrainedConfig:
    sizes: dict[str, Any] = {
        **SIZES,
        "intermediate_size": 80,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 3,
    }
    return transformers.GptOssConfig(**sizes, num_experts_per_tok=2, **TOKENS)


def llama4() -> PretrainedConfig:
    sizes: dict[str, Any] = {
        **SIZES,
        "intermediate_size": 80,
        "intermediate_size_mlp": 48,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return transformers.Llama4TextConfig(**sizes, num_local_experts=3, moe_layers=[0, 1], **TOKENS)


STACKS: dict[str, tuple[str, Callable[[], PretrainedConfig], str]] = {
    "gpt_oss": ("GptOssForCausalLM", gpt_oss, "mlp.experts"),
    "llama4": ("Llama4ForCausalLM", llama4, "feed_forward.experts"),
}
each_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=list(STACKS))


@each_stack
@pytest.mark.parametrize("memory", [SMALL_MEMORY, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["gate_up_proj"], {}),
        (["down_proj", "gate_up_proj"], {}),
        (["gate_up_proj", "down_proj"], {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]}),
        (["down_proj"], {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}}),
    ],
    ids=["one", "two", "with modules", "patterns"],
)
def test_stacks_of_experts(
    tmp_path: Path,
    stack: tuple[str, Callable[[], PretrainedConfig], str],
    targets: list[str],
    options: dict[str, Any],
    dtype: torch.dtype,
    memory: int,
) -> None:
    """Two parameters of one module are nested wrappers, and both factors of the inner one are named base_layer."""
    name, config, experts = stack
    parameters = [f"{experts}.{target}" for target in targets]
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": [], "target_parameters": parameters, **options})
    pair = make_random_pair(tmp_path, name, config(), lora, dtype)
    touched = assert_merged_as_peft(pair, tmp_path / "out", memory=memory)
    modules = [f"{module}.weight" for module in options.get("target_modules", [])]
    assert touched == named(pair, [*parameters, *modules])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_stack_says_how_it_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_transposed: bool) -> None:
    """A square stack fits both ways, so `is_transposed` of its class decides, as in PEFT."""
    experts = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts
    monkeypatch.setattr(experts, "is_transposed", is_transposed, raising=False)
    config = gpt_oss()
    config.intermediate_size = config.hidden_size
    lora = LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    pair = make_random_pair(tmp_path, "GptOssForCausalLM", config, lora)
    assert_merged_as_peft(pair, tmp_path / "out")
    here = stored(tmp_path / "out")
    monkeypatch.setattr(experts, "is_transposed", not is_transposed, raising=False)
    merge(pair, tmp_path / "other")
    other = stored(tmp_path / "other")
    assert {name for name in here if not torch.equal(here[name], other[name])} == named(pair, ["experts.down_proj"])


@each_architecture
@pytest.mark.parametrize("memory", [SMALL_MEMORY, 10**9])
def test_parameters_of_two_dimensions(tmp_path: Path, architecture: Architecture, memory: int) -> None:
    """PEFT takes them as (out, in), whatever module they belong to: a Conv1D's too."""
    targets = ["{tall}.weight", "{embedding}.weight"]
    pair = lora_pair(tmp_path, architecture, target_modules=[], target_parameters=targets)
    touched = assert_merged_as_peft(pair, tmp_path / "out", memory=memory)
    assert touched == named(pair, architecture.fill(targets))


# --- Convolutions ---


def whisper() -> PretrainedConfig:
    sizes: dict[str, Any] = {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 32}
    layers: dict[str, Any] = {
        f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in LAYERS.items()
    }
    return transformers.WhisperConfig(**sizes, **layers, **TOKENS, decoder_start_token_id=256)


LAYERS: dict[str, Any] = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}
VISION: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def convnext() -> PretrainedConfig:
    return transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16)


CONVOLUTIONS: dict[str, tuple[str, Callable[[], PretrainedConfig], list[str]]] = {
    "Conv1d": ("WhisperForConditionalGeneration", whisper, ["conv1", "conv2", "q_proj"]),
    "Conv2d": (
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**VISION, image_size=16, patch_size=4),
        ["projection", "query"],
    ),
    "strided Conv2d": ("ConvNextForImageClassification", convnext, ["patch_embeddings", "downsampling_layer.1"]),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("memory", [SMALL_MEMORY, 10**9])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(tmp_path: Path, case: str, memory: int, dora: bool) -> None:
    name, config, targets = CONVOLUTIONS[case]
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora)
    pair = make_random_pair(tmp_path, name, config(), lora, torch.float16)
    touched = assert_merged_as_peft(pair, tmp_path / "out", memory=memory)
    assert touched == named(pair, [f"{target}.weight" for target in targets])


# --- The methods that PEFT's own layers merge ---


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("case", test_peft_layer.CASES, ids=str)
def test_every_other_method(tmp_path: Path, case: test_peft_layer.Case) -> None:
    dtype = DTYPES[test_peft_layer.CASES.index(case) % 3]
    memory = 10**9 if case.id else SMALL_MEMORY
    assert_merged_as_peft(small_pair(tmp_path, case, dtype), tmp_path / "out", memory=memory)


def small_pair(directory: Path, case: test_peft_layer.Case, dtype: torch.dtype = torch.float32) -> Pair:
    model = test_peft_layer.ARCHITECTURES[case.architecture]()
    return make_random_pair(directory, type(model).__name__, model.config, test_peft_layer.peft_config(case), dtype)


def test_no_method_is_left_out() -> None:
    assert {case.peft_type for case in test_peft_layer.CASES} == MERGEABLE


@pytest.mark.parametrize("peft_type", ["ADALORA", "IA3", "LOHA", "OFT", "VERA"])
def test_other_methods_with_saved_modules(tmp_path: Path, peft_type: str) -> None:
    case = test_peft_layer.case("saved", peft_type, modules_to_save=["lm_head", "post_attention_layernorm"])
    pair = small_pair(tmp_path, case, torch.float16)
    touched = assert_merged_as_peft(pair, tmp_path / "out")
    assert named(pair, ["lm_head.weight", "post_attention_layernorm.weight"]) < touched


# --- Traps: what a wrong merge would give ---


def test_a_square_conv1d_is_not_a_linear(tmp_path: Path) -> None:
    pair = lora_pair(tmp_path, ARCHITECTURES["gpt2"], target_modules=["{square}"])
    assert_merged_as_peft(pair, tmp_path / "out")
    base, got = stored(pair.base), stored(tmp_path / "out")
    factors = load_file(pair.adapter / WEIGHTS_FILE)
    name = "transformer.h.0.attn.c_proj"
    down, up = (factors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    delta, weight = 3.0 * (up @ down), f"{name}.weight"
    assert torch.equal(got[weight], (base[weight].float() + delta.T).half())
    assert not torch.equal(got[weight], (base[weight].float() + delta).half())


@each_architecture
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_fan_in_fan_out_says_nothing(tmp_path: Path, architecture: Architecture, options: dict[str, Any]) -> None:
    """An 8-bit base makes PEFT write false for a Conv1D, and a user may write true for a Linear."""
    pair = lora_pair(tmp_path, architecture, **options)
    for flag in (False, True):
        edit_json(pair.adapter / CONFIG, fan_in_fan_out=flag)
        assert_merged_as_peft(pair, tmp_path / str(flag))


@each_architecture
@pytest.mark.parametrize(
    ("field", "value"),
    [("use_rslora", True), ("lora_alpha", 13), ("alpha_pattern", {"{tall}": 1}), ("use_rslora", False)],
)
def test_every_number_of_the_configuration_counts(
    tmp_path: Path, architecture: Architecture, field: str, value: Any
) -> None:
    pair = lora_pair(tmp_path, architecture, use_rslora=value is False)
    merge(pair, tmp_path / "before")
    edit_json(pair.adapter / CONFIG, **{field: architecture.fill(value)})
    assert_merged_as_peft(pair, tmp_path / "after")
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    differing = {name for name in after if not torch.equal(before[name], after[name])}
    ends = ["{tall}.weight"] if field == "alpha_pattern" else ["{square}.weight", "{tall}.weight"]
    assert differing == named(pair, architecture.fill(ends))


def test_the_weight_of_an_adapter_counts(tmp_path: Path) -> None:
    pair = lora_pair(tmp_path, ARCHITECTURES["opt"])
    merge(pair, tmp_path / "whole")
    merge(pair, tmp_path / "half", weight=[0.5])
    base, whole, half = (stored(directory) for directory in (pair.base, tmp_path / "whole", tmp_path / "half"))
    for name in named(pair, ["out_proj.weight", "fc1.weight"]):
        assert torch.allclose(2 * (half[name] - base[name]), whole[name] - base[name], atol=1e-6)
        assert not torch.equal(half[name], whole[name])


# --- Refused, by name ---


def assert_refused(out: Path, pair: Pair, match: str, **options: Any) -> None:
    with pytest.raises(InputRefused, match=match) as raised:
        exporter.merge(**{"base": pair.base, "adapter": pair.adapter, "out": out, **options})
    assert raised.value.exit_code == 4
    assert not out.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"a": 1}),
        ("enable_lora", [True, False]),
    ],
)
def test_what_no_merge_can_follow(pair: Pair, tmp_path: Path, field: str, value: Any) -> None:
    edit_json(pair.adapter / CONFIG, **{field: value})
    assert_refused(tmp_path / "out", pair, field)


BOTH_TOKENS = {"trainable_token_indices": {"{embedding}": [1], "{head}": [2]}}


@pytest.mark.parametrize(
    ("options", "lost", "match"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", "modules_to_save lm_head"),
        ({"modules_to_save": ["{norm}"]}, "layers.1.{norm}.weight", "layers.1.{norm}"),
        ({"modules_to_save": ["{norm}"]}, "layers.1.{norm}.bias", "layers.1.{norm}"),
        ({"bias": "all"}, "bias", "bias' and 16 more"),
        ({"bias": "all"}, "layers.1.{norm}.bias", "layers.1.{norm}.bias"),
        ({"bias": "lora_only"}, "layers.1.{tall}.base_layer.bias", "layers.1.{tall}.bias"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta", "trained tokens"),
        (BOTH_TOKENS, "lm_head.token_adapter.trainable_tokens_delta", "trained tokens of 'lm_head'"),
        ({"lora_bias": True}, "layers.1.{tall}.lora_B.bias", "layers.1.{tall} has no bias of lora_B"),
        ({"use_dora": True}, "layers.1.{tall}.lora_magnitude_vector", "layers.1.{tall} has no lora_magnitude_vector"),
        ({}, "layers.1.{tall}.lora_B.weight", "layers.1.{tall} has lora_A and no lora_B"),
    ],
)
def test_a_lost_tensor(tmp_path: Path, options: dict[str, Any], lost: str, match: str) -> None:
    opt = ARCHITECTURES["opt"]
    pair = lora_pair(tmp_path, opt, **options)
    end = opt.fill(lost)
    assert any(name.endswith(end) for name in load_file(pair.adapter / WEIGHTS_FILE))
    rewrite(pair.adapter / WEIGHTS_FILE, lambda given: {n: t for n, t in given.items() if not n.endswith(end)})
    assert_refused(tmp_path / "out", pair, re.escape(opt.fill(match)))


@pytest.mark.parametrize("extra", ["lm_head.oddity", "model.layers.0.self_attn.q_proj.lora_C.weight", "vera_A"])
@pytest.mark.parametrize("case", ["LORA", "LOHA", "TRAINABLE_TOKENS"])
def test_a_tensor_that_nothing_consumes(tmp_path: Path, case: str, extra: str) -> None:
    llama = ARCHITECTURES["llama"]
    config = {
        "LORA": lora_config(llama, {}),
        "LOHA": LoHaConfig(r=2, target_modules=[llama.tall]),
        "TRAINABLE_TOKENS": TrainableTokensConfig(token_indices=[1]),
    }[case]
    pair = make_random_pair(tmp_path, llama.name, llama.build(), config)
    rewrite(pair.adapter / WEIGHTS_FILE, lambda given: given | {f"base_model.model.{extra}": torch.ones(2)})
    assert_refused(tmp_path / "out", pair, re.escape(extra))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"bias": "lora_only"}, "bias"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
    ],
)
def test_a_weight_for_what_is_no_sum(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    pair = lora_pair(tmp_path, ARCHITECTURES["opt"], **options)
    assert_refused(tmp_path / "out", pair, match, weight=[0.5])
    merge(pair, tmp_path / "out", weight=[1.0])


def test_a_weight_for_a_convolution_or_another_method(tmp_path: Path) -> None:
    name, config, targets = CONVOLUTIONS["Conv2d"]
    pair = make_random_pair(tmp_path / "conv", name, config(), LoraConfig(r=2, target_modules=targets))
    assert_refused(tmp_path / "out", pair, "convolution", weight=[2.0])
    pair = small_pair(tmp_path / "loha", test_peft_layer.case("", "LOHA"))
    assert_refused(tmp_path / "out", pair, "LOHA", weight=[2.0])


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, "lm_head.weight.*second time"),
        ({"bias": "lora_only"}, {"bias": "lora_only"}, "bias.*second time"),
        ({"use_dora": True}, {}, "changed 2 times"),
        ({}, {"use_dora": True}, "changed 2 times"),
        ({"trainable_token_indices": [1]}, {"trainable_token_indices": [1]}, "changed 2 times"),
    ],
)
def test_two_adapters_that_do_not_add_up(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], match: str
) -> None:
    opt = ARCHITECTURES["opt"]
    pair = lora_pair(tmp_path, opt, **first)
    save_random_adapter(tmp_path / "second", pair.base, lora_config(opt, second), seed=2)
    assert_refused(tmp_path / "out", pair, match, adapter=[pair.adapter, tmp_path / "second"])


def test_trained_tokens_of_a_tied_pair_and_another_change_of_one_half(tmp_path: Path) -> None:
    opt = ARCHITECTURES["opt"]
    tied, tokens = opt.build(tie_word_embeddings=True), lora_config(opt, {"trainable_token_indices": [1]})
    pair = make_random_pair(tmp_path, opt.name, tied, tokens)
    save_random_adapter(tmp_path / "second", pair.base, lora_config(opt, {"target_modules": ["lm_head"]}))
    assert_refused(tmp_path / "out", pair, "tied to it", adapter=[pair.adapter, tmp_path / "second"])


def test_embeddings_of_two_sizes(tmp_path: Path) -> None:
    llama = ARCHITECTURES["llama"]
    config = lora_config(llama, {"modules_to_save": ["{embedding}", "{head}"]})
    pair = make_random_pair(tmp_path, llama.name, llama.build(), config, before=resized(300))
    rewrite(pair.adapter / WEIGHTS_FILE, lambda given: {n: t for n, t in given.items() if "lm_head" not in n})
    edit_json(pair.adapter / CONFIG, modules_to_save=["embed_tokens"])
    assert_refused(tmp_path / "out", pair, "different numbers of rows")


def test_a_grouped_convolution(tmp_path: Path) -> None:
    """PEFT trains it and has no merge."""
    lora = LoraConfig(r=16, target_modules=["dwconv"])
    pair = make_random_pair(tmp_path, "ConvNextForImageClassification", convnext(), lora)
    assert_refused(tmp_path / "out", pair, "groups > 1")


def test_a_bias_where_the_base_has_none(tmp_path: Path) -> None:
    llama = ARCHITECTURES["llama"]
    pair = make_random_pair(tmp_path, llama.name, llama.build(mlp_bias=False), lora_config(llama, {"lora_bias": True}))
    assert_refused(tmp_path / "out", pair, re.escape(f"{llama.tall} has a bias of lora_B"))
