"""One module merged by PEFT's own layer against PEFT's merge of the whole float32 model: equal to the last bit."""

import copy
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from exporter.errors import InputRefused
from exporter.merging.peft_layer import MERGEABLE, AdapterNames, merge_module, split_names, targeted_modules

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


SIZES: dict[str, Any] = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **SIZES))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, max_position_embeddings=16, **sizes, **SIZES))


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(num_hidden_layers=2, max_position_embeddings=16, **sizes, **SIZES))


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": gpt2, "llama": llama, "opt": opt}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"], "opt": ["q_proj", "fc1"]}
NORMS = {"gpt2": ["ln_1"], "llama": ["input_layernorm"], "opt": ["self_attn_layer_norm"]}

# The smallest useful options of each method. Llama's matrices are (32, 32), (16, 32) and (32, 64).
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "total_step": 10},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OSF": {},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {"u": 8},
    "UNILORA": {"r": 4, "theta_d_length": 40},
    "VBLORA": {"r": 2, "num_vectors": 20, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}

LINEAR_ONLY = (
    "BEFT BOFT C3A DELORA GLORA HRA LOHA LOKR MISS OFT OSF PEANUT PSOFT ROAD SHIRA SUPERTUNING".split()  # noqa: SIM905
)
REFUSED_BY_PEFT = {(peft_type, "gpt2"): "has no layer for Conv1D" for peft_type in LINEAR_ONLY} | {
    ("BEFT", "llama"): "trains biases, and Llama has none"
}


@dataclass(frozen=True)
class Case:
    peft_type: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    id: str = ""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(part for part in (self.peft_type, self.architecture, self.id) if part)


def case(id: str, peft_type: str, architecture: str = "llama", **options: Any) -> Case:
    return Case(peft_type, architecture, options, id)


# As AdaLoRA's allocator leaves it: each module keeps some of its ranks.
PRUNED = case(
    "pruned",
    "ADALORA",
    rank_pattern={
        f"model.layers.{number}.{module}.lora_E": kept
        for number, kept in enumerate(([True, False, True, True], [False, False, True, False]))
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    },
)

CASES = [
    *(Case(t, a) for t in sorted(MERGEABLE) for a in ARCHITECTURES if (t, a) not in REFUSED_BY_PEFT),
    *(Case(t, "opt", {}, "float16", torch.float16) for t in ("IA3", "LN_TUNING", "LOHA", "LOKR", "OFT", "VERA")),
    # Shared or per-module tensors that are made again from a seed or from the base.
    *(case("regenerated", t, a, save_projection=False) for t in ("PVERA", "RANDLORA", "VERA") for a in ARCHITECTURES),
    *(case("regenerated", "TINYLORA", a, save_projection=False) for a in ARCHITECTURES),
    case("saved", "UNILORA", save_indices=True),
    case("regenerated", "SUPERTUNING", save_precomputed_indices=False),
    # Arithmetic or names that a default does not reach.
    PRUNED,
    case("topk", "VBLORA", save_only_topk_weights=True),
    case("tied", "TINYLORA", weight_tying=0.5),
    case("embedding", "TINYLORA", target_modules=["embed_tokens", "q_proj"]),
    case("embedding", "OFT", target_modules=["embed_tokens", "q_proj"]),
    case("all-linear", "LOHA", target_modules="all-linear"),
    case("regex", "LOHA", target_modules=r".*\.1\.self_attn\.[qk]_proj"),
    case("inferred", "IA3", target_modules=None, feedforward_modules=None),
    case("layers", "LOKR", layers_to_transform=[1], decompose_both=True, decompose_factor=4),
    case("sparse", "RANDLORA", sparse=True),
    case("proportional", "WAVEFT", proportional_parameters=True),
    case("proportional", "WAVEFT", "gpt2", proportional_parameters=True),
    case("sampled", "PVERA", sample_at_inference=True),
    case("pattern", "DELORA", rank_pattern={"v_proj": 2}, lambda_pattern={"q_proj": 3}),
    case("pattern", "HIRA", rank_pattern={"layers.0.self_attn.q_proj": 2}),
    case("pattern", "FOURIERFT", n_frequency_pattern={"q_proj": 5}),
    case("para", "DEFT", para=True),
    case("relu", "DEFT", decomposition_method="relu"),
    case("bat", "MISS", init_weights="bat"),
    case("mini", "MISS", init_weights="mini", mini_r=2),
    case("lora", "SUPERTUNING", r=2, lora_alpha=4),
    case("vector", "GLORA", "opt", config_A_B="vector", config_C="vector", config_D_E="constant"),
    case("constrained", "OFT", coft=True, eps=1e-3, block_share=True),
    case("lowrank", "PSOFT", psoft_svd="lowrank"),
    case("deep", "PEANUT", depth=3),
    case("pair", "ROAD", variant="road_2"),
    case("bias", "OFT", "opt", bias="oft_only"),
    case("bias", "VERA", "gpt2", bias="all"),
    case("butterfly", "BOFT", boft_n_butterfly_factor=2),
]


@dataclass(frozen=True)
class Made:
    base: PreTrainedModel
    meta: PreTrainedModel
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    names: AdapterNames
    merged: dict[str, torch.Tensor]

    @property
    def modules(self) -> list[str]:
        return targeted_modules(self.config, self.meta)

    def merge(
        self, module: str, *, without: str | None = None, added: dict[str, torch.Tensor] | None = None, **changes: Any
    ) -> dict[str, torch.Tensor]:
        """merge_module with tensors left out by the end of their names, or added, and config fields changed."""
        names = [*self.names.modules.get(module, []), *self.names.shared]
        if without is not None:
            names = [name for name in names if not name.endswith(without)]
        return merge_module(
            config=self.config | changes,
            name=module,
            layer=copy.deepcopy(self.base.get_submodule(module)),
            model=self.meta,
            tensors={name: self.tensors[name] for name in names} | (added or {}),
        )


def peft_config(case: Case) -> PeftConfig:
    options = {"target_modules": (NORMS if case.peft_type == "LN_TUNING" else TARGETS)[case.architecture]}
    if case.peft_type == "IA3":
        options["feedforward_modules"] = TARGETS[case.architecture][-1:]
    options |= OPTIONS[case.peft_type] | case.options
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[case.peft_type]  # type: ignore[index]
    return config(**options)


def adapted(case: Case, base: PreTrainedModel) -> PeftModel:
    return get_peft_model(base, peft_config(case))  # type: ignore[return-value]


@functools.cache
@mock.patch.object(boft_layer, "_FBD_CUDA", False)  # PEFT as it is where there is no CUDA compiler
def make(case: Case) -> Made:
    """An adapter as PEFT trains and saves it, and what PEFT merges from it into the float32 base."""
    torch.manual_seed(0)
    base: Any = ARCHITECTURES[case.architecture]()
    base.to(case.dtype)
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    model = adapted(case, copy.deepcopy(base))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    base = base.float()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        stored = load_file(Path(directory) / "adapter_model.safetensors")
        torch.manual_seed(1)
        loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), directory)
        merged = loaded.merge_and_unload().state_dict()
    with torch.device("meta"):
        meta = ARCHITECTURES[case.architecture]()
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    return Made(base, meta, config, tensors, split_names(tensors, case.peft_type), merged)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_module_has_the_bits_of_pefts_merge(case: Case) -> None:
    made = make(case)
    values: dict[str, torch.Tensor] = {}
    for module in made.modules:
        torch.manual_seed(2)  # the result must not hang on PyTorch's generator
        values |= {f"{module}.{key}": value for key, value in made.merge(module).items()}
    assert values
    assert differing(values, made.merged) == set()
    # `rest` holds the biases that bias="all" trains in other modules; a tied head shows its embedding's change.
    elsewhere = {*made.names.rest, "lm_head.weight"}
    assert differing(made.base.state_dict(), made.merged) - elsewhere == set(values)


@pytest.mark.parametrize("case", [c for c in CASES if c.id != "float16"], ids=str)
def test_the_model_and_the_generator_are_left_alone(case: Case) -> None:
    made = make(case)
    modules = [(name, type(module)) for name, module in made.meta.named_modules()]
    generator, extension = torch.get_rng_state(), boft_layer._FBD_CUDA
    made.merge(made.modules[0])
    assert [(name, type(module)) for name, module in made.meta.named_modules()] == modules
    assert all(parameter.is_meta and parameter.requires_grad for parameter in made.meta.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert boft_layer._FBD_CUDA is extension


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_targeted_modules_are_those_with_tensors(case: Case) -> None:
    made = make(case)
    if case.peft_type == "UNILORA" and not made.config["save_indices"]:
        assert made.names == ({}, ["base_model.unilora_theta_d"], [])  # one vector is the whole adapter
    else:
        assert set(made.modules) == set(made.names.modules)


@pytest.mark.parametrize("case", [c for c in CASES if c.id != "float16"], ids=str)
def test_a_dropped_tensor_is_refused(case: Case) -> None:
    made = make(case)
    module = made.modules[0]
    dropped = [*made.names.modules.get(module, []), *made.names.shared]
    if case.peft_type == "TINYLORA":  # a group's vector, which some other module may need
        dropped = [name for name in dropped if name not in made.names.shared[1:]]
    for name in dropped:
        if name.endswith("base_layer.weight"):
            continue  # a copy of the base's embedding
        if case.peft_type == "RANDLORA":
            name = name.rpartition(".")[2]  # its projections are saved with every module and once more as shared
        with pytest.raises(InputRefused, match=re.escape(module)):
            made.merge(module, without=name)


@pytest.mark.parametrize("case", [c for c in CASES if not c.id], ids=str)
def test_a_left_over_or_misshapen_tensor_is_refused(case: Case) -> None:
    made = make(case)
    module = made.modules[0]
    first = made.names.modules.get(module, made.names.shared)[0]
    for name in (f"{module}.lora_Q", f"{first}.default", first):
        with pytest.raises(InputRefused, match=re.escape(module)):
            made.merge(module, added={name: torch.ones(3, 7, 2)})


@pytest.mark.parametrize("value", [-1, 32, 2**31 - 1])
def test_an_index_outside_the_weight_is_refused(value: int) -> None:
    for peft_type, key in (("SHIRA", "shira_indices"), ("SUPERTUNING", "supertuning_indices")):
        made = make(Case(peft_type, "llama"))
        module = made.modules[0]
        indices = made.tensors[f"{module}.{key}"].clone()
        indices[..., 0] = 32 * 32 if value == 32 and peft_type == "SUPERTUNING" else value
        with pytest.raises(InputRefused, match=re.escape(module)):
            made.merge(module, added={f"{module}.{key}": indices})


def test_a_projection_that_is_not_the_shared_one_is_refused() -> None:
    made = make(Case("RANDLORA", "llama"))
    name = f"{made.modules[0]}.randlora_B"
    with pytest.raises(InputRefused, match="randlora_B"):
        made.merge(made.modules[0], added={name: made.tensors[name] + 1})


@pytest.mark.parametrize("case", [c for c in CASES if c.peft_type == "TINYLORA"], ids=str)
def test_a_vector_of_no_group_is_refused(case: Case) -> None:
    made = make(case)
    extra = f"base_model.tinylora_v.{len(made.names.shared)}"
    with pytest.raises(InputRefused, match=r"left over.*tinylora_v"):
        made.merge(made.modules[0], added={extra: torch.ones(8)})


def has_orientation(case: Case) -> bool:
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[case.peft_type]  # type: ignore[index]
    return not case.id and any(f.name == "fan_in_fan_out" for f in dataclasses.fields(config))


@pytest.mark.parametrize("case", [c for c in CASES if has_orientation(c)], ids=str)
def test_orientation_is_the_layers_and_not_the_flags(case: Case) -> None:
    made = make(case)
    for module in made.modules[:2]:
        for flag in (False, True):
            values = made.merge(module, fan_in_fan_out=flag)
            assert differing({f"{module}.{key}": value for key, value in values.items()}, made.merged) == set()


@pytest.mark.parametrize(("peft_type", "architecture"), REFUSED_BY_PEFT, ids="-".join)
def test_peft_still_refuses(peft_type: str, architecture: str) -> None:
    model = None
    try:
        model = adapted(Case(peft_type, architecture), ARCHITECTURES[architecture]())
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        model.merge_and_unload()  # type: ignore[operator]
    except (TypeError, ValueError, NotImplementedError):
        return
    assert not trained  # OSF passes over what it cannot adapt


def test_every_mergeable_type_has_options() -> None:
    assert set(OPTIONS) == MERGEABLE


def test_adalora_keeps_the_ranks_of_the_pattern() -> None:
    made = make(PRUNED)
    shapes = [made.tensors[f"model.layers.{number}.mlp.down_proj.lora_E"].shape for number in (0, 1)]
    assert shapes == [(3, 1), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from_the_future": 1}, "from_the_future"),
        ({"peft_type": "LORA"}, "rank_dropout"),  # LoHa fields under the name of another method
        ({"peft_type": ["LOHA"]}, "LOHA"),
        ({"peft_type": "FROD"}, "FROD"),
        ({"target_modules": ["k_proj"]}, "does not target"),
        ({"target_modules": 3}, "TypeError"),
        ({"r": -1}, "positive integer"),
    ],
)
def test_a_config_that_peft_would_pass_over_is_refused(changes: dict[str, Any], message: str) -> None:
    made = make(Case("LOHA", "llama"))
    with pytest.raises(InputRefused, match=message):
        made.merge("model.layers.0.self_attn.q_proj", **changes)


def test_a_config_of_an_older_oft_is_refused() -> None:
    made = make(Case("OFT", "llama"))
    made = dataclasses.replace(made, config={k: v for k, v in made.config.items() if k != "oft_block_size"})
    with pytest.raises(InputRefused, match="OFT has been updated"):
        made.merge("model.layers.0.self_attn.q_proj")


def test_replicated_layers_are_refused() -> None:
    made = make(Case("ADALORA", "llama"))
    with pytest.raises(InputRefused, match="layer_replication"):
        made.merge("model.layers.0.self_attn.q_proj", layer_replication=[[0, 2]])


def test_modules_to_save_do_not_reach_other_modules() -> None:
    made = make(Case("LOHA", "llama"))
    module = "model.layers.0.self_attn.q_proj"
    plain = made.merge(module)["weight"]
    assert torch.equal(made.merge(module, modules_to_save=["lm_head"])["weight"], plain)
    assert module not in targeted_modules(made.config | {"modules_to_save": ["q_proj"]}, made.meta)


def test_a_layer_in_half_precision_is_refused() -> None:
    made = make(Case("LOHA", "llama"))
    module = "model.layers.0.self_attn.q_proj"
    half = copy.deepcopy(made.base.get_submodule(module)).half()
    tensors = {name: made.tensors[name] for name in made.names.modules[module]}
    with pytest.raises(InputRefused, match="float16"):
        merge_module(config=made.config, name=module, layer=half, model=made.meta, tensors=tensors)


def test_names_are_split_by_module() -> None:
    names = ["base_model.vera_A", "h.0.c.vera_lambda_b", "h.0.c.base_layer.bias", "h.1.ln.bias", "head.weight"]
    assert split_names(names, "VERA") == AdapterNames(
        {"h.0.c": ["h.0.c.vera_lambda_b", "h.0.c.base_layer.bias"]},
        ["base_model.vera_A"],
        ["h.1.ln.bias", "head.weight"],
    )
