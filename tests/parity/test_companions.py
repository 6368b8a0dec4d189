"""The files beside the weights: what they decide for a bundle's users is compared with base and adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.errors import InputRefused
from exporter.graph.export import export
from exporter.parity.companions import check_companions, find_template
from exporter.parity.inputs import Pair, check_config, open_pair
from exporter.parity.separate import find_adapter
from exporter.prompts import ALPACA
from tests.parity.conftest import Made, open_bundle


@pytest.fixture(scope="module")
def pair(made: Made) -> Pair:
    return open_pair(made.base, [(made.adapter, 1.0)])


@pytest.fixture
def foreign(made: Made, tmp_path: Path) -> Path:
    """The merged bundle as somebody else's: no manifest lists what it holds."""
    directory = Path(shutil.copytree(made.merged, tmp_path / "foreign"))
    (directory / "exporter.json").unlink()
    return directory


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_merge_and_export_wrote_needs_no_word(made: Made, pair: Pair) -> None:
    bundles = [open_bundle(one) for one in (made.merged, made.int8)]
    assert find_template(bundles, [None, None], pair) == (ALPACA, [])
    assert [check_companions(one, pair) for one in bundles] == [[], []]


def test_answers_that_end_elsewhere_are_refused(foreign: Path, pair: Pair) -> None:
    edit(foreign / "generation_config.json", lambda content: content.update(eos_token_id=13))
    with pytest.raises(InputRefused, match=r"end at the tokens \[13\]"):
        check_companions(open_bundle(foreign), pair)
    (end,) = {json.loads((pair.base.directory / "config.json").read_text())["eos_token_id"]}
    edit(foreign / "generation_config.json", lambda content: content.update(eos_token_id=[end, 13]))
    edit(foreign / "genai_config.json", lambda content: content["model"].update(eos_token_id=[end, 13]))
    more, sampling = check_companions(open_bundle(foreign), pair)
    assert "[13] too" in more
    assert "generation_config.json" in sampling


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("eos_token_id", lambda model: model.update(eos_token_id=13)),
        ("context_length", lambda model: model.update(context_length=7)),
        ("decoder.filename", lambda model: model["decoder"].update(filename="other.onnx")),
    ],
)
def test_a_genai_config_of_something_else_is_refused(
    key: str, change: Callable[[dict], object], foreign: Path, pair: Pair
) -> None:
    edit(foreign / "genai_config.json", lambda content: change(content["model"]))
    with pytest.raises(InputRefused, match=key):
        check_companions(open_bundle(foreign), pair)


def test_another_special_token_is_refused(foreign: Path, pair: Pair) -> None:
    (foreign / "special_tokens_map.json").unlink(missing_ok=True)
    edit(foreign / "tokenizer_config.json", lambda content: content.update(eos_token="!"))
    with pytest.raises(InputRefused, match="eos_token '!'"):
        check_companions(open_bundle(foreign), pair)


def test_another_template_is_said(foreign: Path, made: Made, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made.adapter, tmp_path / "adapter"))
    (adapter / "chat_template.jinja").write_text("the adapter's {{ messages[0]['content'] }}")
    pair = open_pair(made.base, [(adapter, 1.0)])
    bundle = open_bundle(foreign)
    template, (note,) = find_template([bundle], [None], pair)
    assert template == ALPACA
    assert f"the chat template of {foreign} is not the one of the adapter or base" in note
    (foreign / "chat_template.jinja").unlink()
    template, (note,) = find_template([bundle], [None], pair)
    assert template is not None
    assert template.startswith("the adapter's")
    assert "has no chat template" in note


def test_bundles_of_different_templates_are_verified_apart(foreign: Path, made: Made, pair: Pair) -> None:
    (foreign / "chat_template.jinja").write_text("another {{ messages[0]['content'] }}")
    with pytest.raises(InputRefused, match="different chat templates"):
        find_template([open_bundle(made.merged), open_bundle(foreign)], [None, None], pair)


def test_a_separate_adapter_brings_its_template(made: Made, tmp_path: Path) -> None:
    base, adapter = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (made.base, made.adapter))
    (base / "chat_template.jinja").write_text("the base's {{ messages[0]['content'] }}")
    (adapter / "chat_template.jinja").write_text("the adapter's {{ messages[0]['content'] }}")
    (made_bundle,) = export(base=base, adapter=[adapter], adapters="separate", out=tmp_path / "out")
    pair, bundle = open_pair(base, [(adapter, 1.0)]), open_bundle(made_bundle.directory)
    template, notes = find_template([bundle], [find_adapter(bundle, pair)], pair)
    assert template is not None
    assert template.startswith("the adapter's")
    assert notes == []


def test_a_second_set_of_weights_is_refused(foreign: Path, made: Made) -> None:
    """transformers would load it in place of what the graph reads."""
    shutil.copy(made.base / "model.safetensors", foreign / "pytorch_model.bin")
    open_bundle(foreign)  # transformers takes safetensors first
    (foreign / "model.safetensors").rename(foreign / "weights.safetensors")
    edit_graph(foreign / "model.onnx", "model.safetensors", "weights.safetensors")
    with pytest.raises(InputRefused, match=r"pytorch_model\.bin"):
        open_bundle(foreign)


def edit_graph(path: Path, before: str, after: str) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.value == before:
                entry.value = after
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "extra", [{"unsloth_version": "2026.1"}, {"temperature": 0.5}, {"id2label": {"0": "a"}}, {"max_length": 9}]
)
def test_what_says_nothing_of_the_function_may_differ(extra: dict, foreign: Path, pair: Pair) -> None:
    edit(foreign / "config.json", lambda content: content.update(extra))
    check_config(open_bundle(foreign), pair)


def test_a_tokenizer_with_a_missing_id_counts_up_to_its_last(made: Made, tmp_path: Path) -> None:
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    size = open_pair(base, [(made.adapter, 1.0)]).vocabulary

    def drop(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        gone = max(vocabulary, key=lambda token: vocabulary[token] if vocabulary[token] < size - 1 else -1)
        del vocabulary[gone]
        pairs = (
            (merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in content["model"]["merges"]
        )
        content["model"]["merges"] = [merge for merge, parts in pairs if "".join(parts) != gone]

    edit(base / "tokenizer.json", drop)
    assert open_pair(base, [(made.adapter, 1.0)]).vocabulary == size
