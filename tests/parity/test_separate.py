"""Verifying a bundle whose adapters stand apart: the right one takes part, another or a changed one is seen."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from transformers import GPT2LMHeadModel

from exporter.errors import InputRefused
from exporter.graph.export import export
from exporter.manifest import describe_file
from exporter.parity.inputs import open_pair
from exporter.parity.separate import find_adapter
from exporter.parity.verify import verify
from tests.parity.conftest import Made, open_bundle, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def root(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the session's adapter and another one, in float and in 8 bits, and one whose adapter is halved."""
    root = tmp_path_factory.mktemp("separate")
    write_adapter(root / "other", GPT2LMHeadModel.from_pretrained(made.base), r=2, seed=5)
    adapters = [f"mine={made.adapter}", root / "other"]
    for precision in ("native", "int8"):
        export(base=made.base, adapter=adapters, adapters="separate", precision=[precision], out=root / precision)
    shutil.copytree(root / "native", root / "halved")
    halve(root / "halved")
    return root


def halve(directory: Path) -> None:
    """Half of B in the adapter's file, and a manifest that is content with it."""
    path: Any = str(directory / "mine.onnx_adapter")
    found = ort.AdapterFormat.read_adapter(path).get_parameters()
    half, one = np.float32(0.5), np.float32(1)
    arrays = {name: value.numpy() * (half if name.endswith("lora_B") else one) for name, value in found.items()}
    file = ort.AdapterFormat()  # its values are views of the arrays
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    file.export_adapter(path)
    manifest = json.loads((directory / "exporter.json").read_text())
    files = manifest["stages"]["export-native-cpu"]["files"]
    files["mine.onnx_adapter"] = describe_file(directory / "mine.onnx_adapter")
    (directory / "exporter.json").write_text(json.dumps(manifest))


def test_the_right_adapter_passes_and_a_scaled_file_fails(made: Made, root: Path) -> None:
    bundles = [root / "native", root / "int8", root / "halved"]
    found = verify(base=made.base, adapter=made.adapter, bundle=bundles, prompts=made.prompts)
    native, int8, halved = found.bundles
    assert (native.verdict, int8.verdict, halved.verdict) == ("PASS", "PASS", "FAIL"), found.summary
    for bundle in (native, int8):
        outcomes = {mutant.name: mutant.outcome for mutant in bundle.mutants}
        assert {name for name, outcome in outcomes.items() if outcome == "survived"} == set()
        assert outcomes["adapter dropped"] == outcomes["scale x 0.9"] == "killed"
    failed = {gate.gate for gate in halved.gates if gate.outcome == "FAIL"}
    assert {"weights.projection", "weights.elements"} <= failed
    assert (root / "native" / "mine.onnx_adapter").is_file()
    assert not list((root / "native").glob("*.safetensors.*")), "verify writes nothing into a bundle"


def test_the_adapter_is_found_by_its_digest(made: Made, root: Path, tmp_path: Path) -> None:
    for name, directory in (("mine", made.adapter), ("other", root / "other")):
        found = find_adapter(open_bundle(root / "native"), open_pair(made.base, [(directory, 1.0)]))
        assert found is not None
        assert found.name == name
    assert find_adapter(open_bundle(made.merged), open_pair(made.base, [(made.adapter, 1.0)])) is None
    copy = shutil.copytree(made.adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 17}))
    for weighted in ([(copy, 1.0)], [(made.adapter, 0.5)], [(made.adapter, 1.0), (root / "other", 1.0)]):
        with pytest.raises(InputRefused, match=r"of the adapters beside [\s\S]*expected: exactly one"):
            find_adapter(open_bundle(root / "native"), open_pair(made.base, weighted))
