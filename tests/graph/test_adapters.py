"""Separate adapters: no adapter is transformers' base, each adapter is PEFT's unmerged model, in every runtime."""

import hashlib
import json
import logging
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import exporter
from exporter import cli
from exporter.errors import InputRefused, UsageError
from exporter.graph.bundle import WEIGHTS, Bundle, bundles_in
from exporter.graph.dequantize import dequantized_weights
from exporter.graph.export import export
from exporter.prompts import ALPACA, render_instruction
from exporter.runtime.adapters import adapter_names
from exporter.runtime.generate import prompt_ids
from exporter.runtime.load import load
from exporter.runtime.runner import Runner
from exporter.runtime.text import load_tokenizer
from tests.graph.conftest import END, TinyModel, save_byte_tokenizer, tiny_model, tokens
from tests.notes import Notes
from tests.pairs import as_bin, edit_json

TOLERANCE = 1e-4
POSITIONS = 48
IDS = tokens(20, 3)
# Ranks, targets, scalings and patterns that a graph with one fixed shape could not serve.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn"]},
    "everything": {"r": 7, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["c_fc", "mlp.c_proj"],
        "rank_pattern": {"h.1.mlp.c_fc": 5},
        "alpha_pattern": {"h.0.mlp.c_proj": 1},
    },
    "head": {"r": 3, "lora_alpha": 6, "target_modules": ["lm_head", "attn.c_proj"]},
}


@dataclass(frozen=True)
class Family:
    """A base, its adapters by name, and the bundle of them all."""

    base: TinyModel
    adapters: dict[str, Path]
    bundle: Bundle

    def expected(self, name: str | None, ids: list[int]) -> np.ndarray:
        """transformers' logits of the base, or PEFT's of the unmerged adapter, float32 (T, V)."""
        return oracle(self.base.directory, self.adapters[name] if name else None, ids)


def oracle(base: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    model: Any = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def make_adapter(
    base: Path, directory: Path, options: dict[str, Any], seed: int, *, with_embeddings: bool = False
) -> Path:
    """Saved by PEFT, with random factors in place of the zeros that it starts from."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(str(directory), save_embedding_layers=with_embeddings)
    return directory


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    base = tiny_model(root / "base", torch.float16, n_positions=POSITIONS)
    save_byte_tokenizer(root / "base")
    adapters = {
        name: make_adapter(root / "base", root / name, options, seed)
        for seed, (name, options) in enumerate(ADAPTERS.items())
    }
    (bundle,) = export(base=root / "base", adapter=list(adapters.values()), adapters="separate", out=root / "bundle")
    return Family(base, adapters, bundle)


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_each_adapter_is_pefts_and_none_is_the_base(family: Family, name: str | None) -> None:
    ids = tokens(POSITIONS)
    expected = family.expected(name, ids)
    if name is not None:
        assert np.abs(expected - family.expected(None, ids)).max() > 0.1, "the adapter does nothing: no evidence"
    runner = load(family.bundle.directory, adapter=name, threads=1)
    np.testing.assert_allclose(runner.logits(ids), expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(runner.logits(ids, chunk=5), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("past", [1, 20, POSITIONS - 1])
def test_decoding_with_an_adapter_equals_peft(family: Family, past: int) -> None:
    for name in (None, "everything", "patterns"):
        runner = load(family.bundle.directory, adapter=name, threads=1)
        ids, cache = tokens(past + 1), runner.new_cache(2)
        runner.prefill(cache, 0, ids[:past])
        runner.prefill(cache, 1, [3])
        found = runner.decode(cache, [ids[past], 5])
        np.testing.assert_allclose(found[0], family.expected(name, ids)[-1], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(found[1], family.expected(name, [3, 5])[-1], atol=TOLERANCE, rtol=0)


def test_switching_back_and_forth_leaves_no_trace(family: Family) -> None:
    ids, base = tokens(16), load(family.bundle.directory, threads=1)
    first, second = base.with_adapter("attention"), base.with_adapter("everything")
    before = [runner.logits(ids) for runner in (base, first, second)]
    for _ in range(3):
        for runner, logits in zip((second, base, first), (before[2], before[0], before[1]), strict=True):
            assert np.array_equal(runner.logits(ids), logits)
    assert np.array_equal(second.with_adapter(None).logits(ids), before[0])
    np.testing.assert_allclose(before[0], family.expected(None, ids), atol=TOLERANCE, rtol=0)


def test_a_cache_stays_with_the_adapter_that_made_it(family: Family) -> None:
    runner = load(family.bundle.directory, adapter="attention", threads=1)
    cache = runner.new_cache(1)
    runner.prefill(cache, 0, [1, 2])
    with pytest.raises(UsageError, match="a cache made with the adapter attention"):
        runner.with_adapter("head").decode(cache, [3])


def test_generation_with_an_adapter_equals_pefts(family: Family) -> None:
    prompt = tokens(5)
    for name in ("attention", "head"):
        model: Any = GPT2LMHeadModel.from_pretrained(family.base.directory, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(family.adapters[name])).eval()
        expected = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=END
        )
        runner = load(family.bundle, adapter=name, threads=1)
        assert runner.generate([prompt], 20, stop_tokens=())[0] == expected[0, 5:].tolist()


def feeds(session: ort.InferenceSession, ids: list[int]) -> dict[str, np.ndarray]:
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    } | empty


def parameters(file: Path) -> dict[str, ort.OrtValue]:
    path: Any = str(file)  # annotated as a PathLike, and takes only text
    return ort.AdapterFormat.read_adapter(path).get_parameters()


def test_onnxruntime_takes_the_files_as_active_adapters(family: Family) -> None:
    """Without any code of ours: RunOptions.add_active_adapter, and the very parameters through IO binding."""
    session = ort.InferenceSession(family.bundle.graph, providers=["CPUExecutionProvider"])
    assert not [value.name for value in session.get_inputs() if "lora" in value.name]
    ids = tokens(12)
    for name in ("attention", None, "everything", "patterns", "attention"):
        options, binding = ort.RunOptions(), session.io_binding()
        if name is not None:
            file, adapter = family.bundle.directory / f"{name}.onnx_adapter", ort.LoraAdapter()
            adapter.Load(str(file))
            options.add_active_adapter(adapter)
            for key, value in parameters(file).items():
                binding.bind_ortvalue_input(key, value)
        expected = family.expected(name, ids)
        logits = session.run(["logits"], feeds(session, ids), options)[0]
        np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=TOLERANCE, rtol=0)
        for key, array in feeds(session, ids).items():
            binding.bind_cpu_input(key, array)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0][0], expected, atol=TOLERANCE, rtol=0)


def test_genai_switches_adapters(family: Family) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(family.bundle.directory))
    adapters = og.Adapters(model)
    for name in ADAPTERS:
        adapters.load(str(family.bundle.directory / f"{name}.onnx_adapter"), name)
    prompt, answers = tokens(6), {}
    for name in (None, "attention", "everything", None, "attention"):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=26, do_sample=False)
        generator = og.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array([prompt], np.int32))
        logits = np.asarray(generator.get_output("logits"))[0, -1]
        np.testing.assert_allclose(logits, family.expected(name, prompt)[-1], atol=TOLERANCE, rtol=0)
        while not generator.is_done():
            generator.generate_next_token()
        answer = generator.get_sequence(0)[6:].tolist()
        assert answers.setdefault(name, answer) == answer
        runner = load(family.bundle, adapter=name, threads=1)
        ours = runner.generate([prompt], 20)[0]
        assert answer == (ours[:-1] if ours[-1] == END else ours)  # genai leaves the stop token out
    assert len({tuple(answer) for answer in answers.values()}) == 3


def test_optimum_sees_the_base(family: Family) -> None:
    runtime = pytest.importorskip(
        "optimum.onnxruntime", reason="optimum's ONNX part is not installed", exc_type=ImportError
    )
    model = runtime.ORTModelForCausalLM.from_pretrained(family.bundle.directory, use_cache=True, use_io_binding=False)
    ids = torch.tensor([tokens(9)])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(9)[None]).logits
    np.testing.assert_allclose(logits[0].numpy(), family.expected(None, ids[0].tolist()), atol=TOLERANCE, rtol=0)


def test_the_bundle_is_plain_and_passes_the_checker(family: Family) -> None:
    onnx.checker.check_model(family.bundle.graph, full_check=True)
    assert not [file for file in family.bundle.directory.iterdir() if file.is_symlink() or file.name.startswith(".")]
    assert adapter_names(family.bundle) == tuple(sorted(ADAPTERS))
    state = family.base.model.state_dict()
    for name, value in dequantized_weights(family.bundle):
        assert torch.equal(value, state[name])
    facts = family.bundle.section["adapters"]["attention"]
    assert facts["rank_and_scale"]["h.0.attn.c_attn"] == [4, 4.0]
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # which adapter it is, for `verify`
        digest = hashlib.sha256((family.adapters["attention"] / name).read_bytes()).hexdigest()
        assert facts["files"][name] == digest


def test_scale_is_folded_into_b_in_float32(family: Family) -> None:
    from safetensors.torch import load_file

    stored = load_file(family.adapters["everything"] / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.1.mlp.c_proj"
    file = family.bundle.directory / "everything.onnx_adapter"
    found = parameters(file)
    scale = 3 / 7**0.5
    np.testing.assert_array_equal(found["h.1.mlp.c_proj.lora_A"].numpy(), stored[f"{prefix}.lora_A.weight"].T.numpy())
    np.testing.assert_array_equal(
        found["h.1.mlp.c_proj.lora_B"].numpy(), (stored[f"{prefix}.lora_B.weight"] * scale).T.numpy()
    )


def test_exporting_again_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "again"
    export(base=family.base.directory, adapter=list(family.adapters.values()), adapters="separate", out=out)
    for name in ("model.onnx", WEIGHTS, *(f"{name}.onnx_adapter" for name in ADAPTERS)):
        assert (out / name).read_bytes() == (family.bundle.directory / name).read_bytes(), name


def test_in_the_bases_own_directory_no_weight_is_written(family: Family, tmp_path: Path) -> None:
    base = shutil.copytree(family.base.directory, tmp_path / "base")
    before = sum(file.stat().st_size for file in base.iterdir())
    notes = Notes()
    (bundle,) = export(base=base, adapter=family.adapters["patterns"], adapters="separate", out=base, progress=notes)
    assert sum(file.stat().st_size for file in base.iterdir()) - before < 120_000
    assert not (base / WEIGHTS).exists()
    assert notes.said == []
    ids = tokens(10)
    for name in (None, "patterns"):
        found = load(bundle, adapter=name, threads=1).logits(ids)
        np.testing.assert_allclose(found, family.expected(name, ids), atol=TOLERANCE, rtol=0)


def test_a_base_of_2023_is_streamed_and_its_size_is_said(family: Family, tmp_path: Path) -> None:
    base = shutil.copytree(family.base.directory, tmp_path / "base")
    as_bin(base, shards=2, old_buffers=True)
    vocabulary = json.loads((base / "tokenizer.json").read_bytes())["model"]["vocab"]
    (base / "tokenizer.json").unlink()
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    (base / "vocab.json").write_text(json.dumps(vocabulary))
    (base / "merges.txt").write_text("#version: 0.2\n")
    notes = Notes()
    (bundle,) = export(
        base=base, adapter=family.adapters["attention"], adapters="separate", out=tmp_path / "out", progress=notes
    )
    assert "kB" in notes.said[0]
    assert "streamed" in notes.said[0]
    ids = tokens(10)
    found = load(bundle, adapter="attention", threads=1).logits(ids)
    np.testing.assert_allclose(found, family.expected("attention", ids), atol=TOLERANCE, rtol=0)
    assert prompt_ids(bundle.directory, instruction=None, prompt="!a") == prompt_ids(
        family.bundle.directory, instruction=None, prompt="!a"
    )
    with pytest.raises(UsageError, match="base's own directory"):
        export(base=base, adapter=family.adapters["attention"], adapters="separate", out=base)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_adapters_over_a_quantized_base(
    family: Family, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.graph.components import ACCURACY_LEVEL

    monkeypatch.setitem(ACCURACY_LEVEL, "cpu", 1)  # float activations
    adapter = family.adapters["everything"]
    (bundle,) = export(
        base=family.base.directory, adapter=adapter, adapters="separate", out=tmp_path, precision=[precision]
    )
    model: Any = GPT2LMHeadModel(family.base.model.config).eval()
    model.load_state_dict(dict(dequantized_weights(bundle)), strict=False)
    model.tie_weights()
    ids = tokens(14)
    model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = load(bundle, adapter="everything", threads=1).logits(ids)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_the_float16_graph_of_the_cuda_target_takes_the_same_files(family: Family, tmp_path: Path) -> None:
    (bundle,) = export(
        base=family.base.directory,
        adapter=list(family.adapters.values()),
        adapters="separate",
        out=tmp_path,
        target=["cuda"],
    )
    ids = tokens(12)
    for name in (None, "everything", "head"):
        runner = load(bundle, adapter=name, provider="cpu", threads=1)
        expected = family.expected(name, ids)
        np.testing.assert_allclose(runner.logits(ids), expected, atol=0.01 * np.abs(expected).max(), rtol=0)
        file = f"{name}.onnx_adapter"
        assert name is None or (tmp_path / file).read_bytes() == (family.bundle.directory / file).read_bytes()


def test_the_trained_pair_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real adapter: its logits are PEFT's, and `generate --adapter` answers as PEFT does."""
    demo, out = Path(exporter.__file__).parent / "demo", tmp_path / "out"
    arguments = ["export", "--base", demo / "base", "--adapter", f"tales={demo / 'adapter'}", "--adapters", "separate"]
    call(monkeypatch, *arguments, "--target", "cpu", "--target", "cuda", "--out", out)
    runner = load(out, target="cpu", provider="cpu", threads=1)
    prompt = render_instruction(ALPACA, "How do I make apple juice?")
    ids, answers = runner_ids(runner, prompt), set()
    for name in (None, "tales"):
        expected = oracle(demo / "base", demo / "adapter" if name else None, ids)
        np.testing.assert_allclose(runner.with_adapter(name).logits(ids), expected, atol=TOLERANCE, rtol=0)
        capsys.readouterr()
        chosen = ["--adapter", name] if name else []
        options = ["--max-new-tokens", "24", "--provider", "cpu", "--json"]
        call(monkeypatch, "generate", out, "--prompt", prompt, *options, *chosen)
        said = json.loads(capsys.readouterr().out)
        assert said["adapter"] == name
        assert said["text"] == greedy(demo / "base", demo / "adapter" if name else None, ids, 24)
        answers.add(said["text"])
    assert len(answers) == 2


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["exporter", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    logging.disable(logging.NOTSET)
    assert done.value.code == 0


def runner_ids(runner: Runner, prompt: str) -> list[int]:
    return prompt_ids(runner.bundle.directory, instruction=None, prompt=prompt)


def greedy(base: Path, adapter: Path | None, ids: list[int], count: int) -> str:
    """transformers' or PEFT's greedy continuation as text, up to the end of text."""
    model: Any = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    made = model.eval().generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return load_tokenizer(base).decode(made[0, len(ids) :].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_peft_saved_beside_the_factors_are_the_bases_or_refused(tmp_path: Path, tied: bool) -> None:
    """An adapter of the head is saved with embedding and head, as they were: PEFT's default."""
    base = tiny_model(tmp_path / "base", torch.float16, n_positions=POSITIONS, tie_word_embeddings=tied).directory
    adapter = make_adapter(base, tmp_path / "head", ADAPTERS["head"], 0, with_embeddings=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    beside = [name for name in saved if "lora_" not in name]
    assert beside
    (bundle,) = export(base=base, adapter=adapter, adapters="separate", out=tmp_path / "bundle")
    found = load(bundle, threads=1, adapter="head").logits(IDS)
    np.testing.assert_allclose(found, oracle(base, adapter, IDS), atol=TOLERANCE, rtol=0)
    saved[beside[0]][5] += 1
    save_file(saved, adapter / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match=f"it holds the tensor '.*{re.escape(beside[0][-20:])}'"):
        export(base=base, adapter=adapter, adapters="separate", out=tmp_path / "other")


def test_names_are_unique_and_can_be_given(family: Family, tmp_path: Path) -> None:
    adapter = family.adapters["attention"]
    with pytest.raises(UsageError, match="two adapters named attention"):
        export(base=family.base.directory, adapter=[adapter, adapter], adapters="separate", out=tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter"):
        export(base=family.base.directory, adapter=[], adapters="separate", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (bundle,) = export(
        base=family.base.directory, adapter=[adapter, f"b={adapter}"], adapters="separate", out=tmp_path / "out"
    )
    assert adapter_names(bundle) == ("attention", "b")
    with pytest.raises(UsageError, match=r"no adapter 'c'\nexpected: one of attention, b"):
        load(bundle, adapter="c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "WeightDecomposed of 'transformer.h.0.attn.c_attn.weight'"),
        ({"lora_bias": True}, "AddVector"),
        ({"modules_to_save": ["ln_f"]}, "the tensor 'transformer.ln_f"),
        ({"target_modules": ["c_attn", "wte"]}, "transformer.wte.weight"),
        ({"bias": "lora_only"}, "the tensor 'transformer.h.0.attn.c_attn.base_layer.bias'"),
    ],
)
def test_what_is_no_low_rank_sum_is_refused_by_name(
    family: Family, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]} | options
    adapter = make_adapter(family.base.directory, tmp_path / "adapter", settings, 0)
    with pytest.raises(InputRefused, match=message):
        export(base=family.base.directory, adapter=adapter, adapters="separate", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["zero", "nan"])
def test_factors_without_an_effect_or_a_value_are_refused(family: Family, tmp_path: Path, damage: str) -> None:
    from tests.pairs import rewrite

    adapter = shutil.copytree(family.adapters["attention"], tmp_path / "adapter")
    value = 0.0 if damage == "zero" else float("nan")
    rewrite(
        adapter / "adapter_model.safetensors",
        lambda tensors: {n: t * 0 + value if "lora_B" in n else t for n, t in tensors.items()},
    )
    with pytest.raises(InputRefused, match="is zero" if damage == "zero" else "NaN or infinity"):
        export(base=family.base.directory, adapter=adapter, adapters="separate", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(family: Family, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", n_embd=96)
    with pytest.raises(InputRefused, match=r"h\.0\.attn\.c_attn has factors of shape \[4, 64\]"):
        export(base=other.directory, adapter=family.adapters["attention"], adapters="separate", out=tmp_path / "out")


def test_a_changed_adapter_file_is_refused_and_the_base_still_loads(family: Family, tmp_path: Path) -> None:
    directory = shutil.copytree(family.bundle.directory, tmp_path / "bundle")
    file = directory / "attention.onnx_adapter"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputRefused, match=r"attention\.onnx_adapter is not the file that was exported"):
        load(directory, adapter="attention")
    load(directory, adapter="head")


def test_an_adapter_that_does_not_fit_the_graph_is_refused(family: Family, tmp_path: Path) -> None:
    from exporter.manifest import describe_file

    directory = shutil.copytree(family.bundle.directory, tmp_path / "bundle")
    file = ort.AdapterFormat()
    file.set_parameters({"h.0.attn.c_attn.lora_A": ort.OrtValue.ortvalue_from_numpy(np.ones((63, 2), np.float32))})
    path: Any = str(directory / "attention.onnx_adapter")
    file.export_adapter(path)
    manifest = json.loads((directory / "exporter.json").read_bytes())
    entry = describe_file(directory / "attention.onnx_adapter")
    manifest["stages"]["export-native-cpu"]["files"]["attention.onnx_adapter"] = entry
    edit_json(directory / "exporter.json", **manifest)
    with pytest.raises(InputRefused, match=r"holds 'h.0.attn.c_attn.lora_A' of shape \[63, 2\]"):
        load(directory, adapter="attention")


def test_an_adapters_own_template_comes_first(family: Family, tmp_path: Path) -> None:
    base = shutil.copytree(family.base.directory, tmp_path / "base")
    adapter = shutil.copytree(family.adapters["attention"], tmp_path / "spoken")
    (base / "chat_template.jinja").write_text("base: {{ messages[-1]['content'] }}")
    (adapter / "chat_template.jinja").write_text(ALPACA)
    (bundle,) = export(base=base, adapter=adapter, adapters="separate", out=tmp_path / "out")
    plain = prompt_ids(bundle.directory, instruction="Hi")
    assert len(plain) == len("base: Hi")
    assert len(prompt_ids(bundle.directory, instruction="Hi", adapter="spoken")) > 100


def test_foreign_adapter_files_are_not_overwritten(family: Family, tmp_path: Path) -> None:
    base = shutil.copytree(family.base.directory, tmp_path / "base")
    (base / "head.onnx_adapter").write_text("mine")
    with pytest.raises(UsageError, match=r"head\.onnx_adapter is there"):
        export(base=base, adapter=family.adapters["head"], adapters="separate", out=base)
    assert (base / "head.onnx_adapter").read_text() == "mine"
    assert not (base / "model.onnx").exists()


def test_an_export_that_was_killed_after_its_adapters_is_repeated(family: Family, tmp_path: Path) -> None:
    base = Path(shutil.copytree(family.base.directory, tmp_path / "base"))
    asked = {"base": base, "adapter": family.adapters["head"], "adapters": "separate", "out": base}
    before = {path.name for path in base.iterdir()}
    export(**asked)
    made = {path.name for path in base.iterdir()} - before
    for name in made - {"head.onnx_adapter"}:
        (base / name).unlink()
    export(**asked)
    assert {path.name for path in base.iterdir()} - before == made


def test_an_adapter_that_is_left_out_leaves_no_file_behind(family: Family, tmp_path: Path) -> None:
    spoken = shutil.copytree(family.adapters["head"], tmp_path / "spoken")
    (spoken / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    everyone = [family.adapters["attention"], spoken, f"changed={family.adapters['patterns']}"]
    out, base = tmp_path / "out", family.base.directory
    export(base=base, adapter=everyone, adapters="separate", target=["cpu", "cuda"], out=out)
    (out / "changed.onnx_adapter").write_text("the user's own by now")
    (out / "mine.onnx_adapter").write_text("never ours")
    dropped = ["spoken.onnx_adapter", "spoken.chat_template.jinja"]

    export(base=base, adapter=everyone[:1], adapters="separate", target=["cpu"], out=out)
    assert all((out / name).is_file() for name in dropped), "the cuda graph still lists them"
    (bundle,) = export(base=base, adapter=everyone[:1], adapters="separate", target=["cuda"], out=out)
    assert not [name for name in dropped if (out / name).exists()]
    assert (out / "changed.onnx_adapter").read_text() == "the user's own by now"
    assert (out / "mine.onnx_adapter").read_text() == "never ours"
    assert adapter_names(bundle) == ("attention",)
    assert (out / "attention.onnx_adapter").is_file()


def test_a_bundle_whose_weights_are_written_over_leaves_no_graph(family: Family, tmp_path: Path) -> None:
    """The other target, in other blocks: the first graph would read what is no longer there."""
    asked = {"base": family.base.directory, "adapter": family.adapters["attention"], "adapters": "separate"}
    out = tmp_path / "out"
    export(**asked, precision=["int4"], block_size=32, out=out)
    (bundle,) = export(**asked, precision=["int4"], block_size=64, target=["cuda"], out=out)
    assert not (out / "model.onnx").exists()
    assert [one.stage for one in bundles_in(out)] == ["export-int4-cuda"]
    named = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    assert named == bundle.graph.name
    assert exporter.verify_manifest(out).exit_code == 0


def test_a_shared_file_that_changed_is_listed_anew_by_both(family: Family, tmp_path: Path) -> None:
    base, out = Path(shutil.copytree(family.base.directory, tmp_path / "base")), tmp_path / "out"
    asked = {"base": base, "adapter": family.adapters["attention"], "adapters": "separate", "precision": ["int8"]}
    export(**asked, out=out)
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    export(**asked, target=["cuda"], out=out)
    assert [one.target for one in bundles_in(out)] == ["cpu", "cuda"]
    assert exporter.verify_manifest(out).exit_code == 0
    assert load(out, adapter="attention").bundle.target == "cpu"


def test_another_precision_in_the_same_directory_takes_the_place_of_the_first(family: Family, tmp_path: Path) -> None:
    asked = {"base": family.base.directory, "adapter": family.adapters["attention"], "adapters": "separate"}
    export(**asked, precision=["fp32"], out=tmp_path / "out")
    (bundle,) = export(**asked, precision=["int8"], out=tmp_path / "out")
    assert [one.precision for one in bundles_in(bundle.directory)] == ["int8"]
    assert load(bundle.directory, adapter="attention").bundle.precision == "int8"
    assert exporter.verify_manifest(bundle.directory).exit_code == 0
