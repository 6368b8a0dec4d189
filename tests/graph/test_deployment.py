"""`exporter export --deployment`: what Triton, KServe and compose read, held against their formats and the graph."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pytest
import torch
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from exporter import generate, merge, verify_manifest
from exporter.demonstration import PAIR
from exporter.errors import UsageError
from exporter.graph.bundle import Bundle
from exporter.graph.deployment import deployment_name
from exporter.graph.export import export
from exporter.graph.export import export as export_function
from tests.graph.conftest import END, TinyModel, save_byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
KINDS = ["triton", "kserve", "compose"]
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# triton-inference-server/common, protobuf/model_config.proto: names, numbers, types of what we write.
ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_INT32": 8, "TYPE_INT64": 9, "TYPE_FP16": 10, "TYPE_FP32": 11},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}
MESSAGES = {
    "ModelInput": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (4, "int64*")},
    "ModelOutput": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (3, "int64*")},
    "ModelInstanceGroup": {"count": (2, "int32"), "kind": (4, "Kind")},
    "ModelConfig": {
        "name": (1, "string"),
        "max_batch_size": (4, "int32"),
        "input": (5, "ModelInput*"),
        "output": (6, "ModelOutput*"),
        "instance_group": (7, "ModelInstanceGroup*"),
        "default_model_filename": (8, "string"),
        "backend": (17, "string"),
    },
}
ONNX_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float16)": "TYPE_FP16", "tensor(float)": "TYPE_FP32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("Deployed") / "Model_1"
    directory.mkdir()
    made = tiny_model(directory, torch.float16, n_positions=64)
    save_byte_tokenizer(directory)
    export(directory, target=["cpu", "cuda"], precision=["native", "int8"], deployment=KINDS)
    return made


@pytest.fixture(scope="module")
def bundles(model: TinyModel) -> list[Bundle]:
    from exporter.graph.bundle import bundles_in

    beside = [model.directory.parent / name for name in ("int8", "int8-cuda")]
    return [bundle for place in (model.directory, *beside) for bundle in bundles_in(place)]


def model_config(text: str) -> Any:
    """`text` parsed by protobuf as Triton's ModelConfig; ParseError for a field or a value that it does not have."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": kinds.TYPE_STRING, "int32": kinds.TYPE_INT32, "int64": kinds.TYPE_INT64}
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            described = message.field.add(name=field, number=number, label=label)
            if (plain := kind.rstrip("*")) in scalars:
                described.type = scalars[plain]
            else:
                described.type = kinds.TYPE_ENUM if plain in ENUMS else kinds.TYPE_MESSAGE
                described.type_name = f".inference.{plain}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, made())


def triton(bundle: Bundle) -> Any:
    name = deployment_name(bundle)
    config = model_config((bundle.directory / "deployment/triton" / name / "config.pbtxt").read_text())
    assert config.name == name
    return config


def described(tensors: Any) -> list[tuple[str, str, list[int]]]:
    names = {number: name for name, number in ENUMS["DataType"].items()}
    return [(one.name, names[one.data_type], list(one.dims)) for one in tensors]


def of_the_graph(tensors: Any) -> list[tuple[str, str, list[int]]]:
    return [
        (one.name, ONNX_TYPES[one.type], [size if isinstance(size, int) else -1 for size in one.shape])
        for one in tensors
    ]


def test_tritons_tensors_are_those_that_onnxruntime_sees(bundles: list[Bundle]) -> None:
    assert [(bundle.precision, bundle.target) for bundle in bundles] == [
        ("native", "cpu"), ("native", "cuda"), ("int8", "cpu"), ("int8", "cuda"),
    ]  # fmt: skip
    for bundle in bundles:
        config = triton(bundle)
        session = ort.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
        optional = {one.name for one in session.get_overridable_initializers()}
        needed = [one for one in session.get_inputs() if one.name not in optional]
        assert described(config.input) == of_the_graph(needed)
        assert described(config.output) == of_the_graph(session.get_outputs())
        assert (config.backend, config.max_batch_size) == ("onnxruntime", 0)
        assert config.default_model_filename == bundle.graph.name
        kind = "KIND_GPU" if bundle.target == "cuda" else "KIND_CPU"
        assert [(group.count, group.kind) for group in config.instance_group] == [(1, ENUMS["Kind"][kind])]
        cache = "TYPE_FP16" if bundle.target == "cuda" else "TYPE_FP32"
        kinds = {kind for name, kind, _ in described(config.input) if name.startswith("past_key_values.")}
        assert kinds == {cache}


def test_who_follows_the_configuration_gets_transformers_tokens(model: TinyModel, tmp_path: Path) -> None:
    """A client of Triton's, without Triton: it knows nothing but config.pbtxt, and keeps the cache itself."""
    (bundle,) = export(model.directory, precision=["fp32"], deployment=["triton"], out=tmp_path)
    config = triton(bundle)
    session = ort.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
    numpy_types = {9: np.int64, 11: np.float32}
    prompt, new = [5, 17, 3, 99], 12
    expected, margins = model.greedy(prompt, new)
    assert min(margins) > 1e-4
    assert END not in expected
    caches = [one for one in config.input if one.name.startswith("past_key_values.")]
    # One request; nothing is cached yet, so the size that varies beside the batch is 0.
    sizes = {one.name: [1, *(max(size, 0) for size in one.dims[1:])] for one in caches}
    past = {one.name: np.zeros(sizes[one.name], numpy_types[one.data_type]) for one in caches}
    ids, answer = prompt, []
    for _ in range(new):
        length = len(prompt) + len(answer)
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(ids), length)[None],
            **past,
        }
        assert set(feeds) == {one.name for one in config.input}
        found = dict(zip((one.name for one in config.output), session.run(None, feeds), strict=True))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
        answer.append(int(np.asarray(found["logits"])[0, -1].argmax()))
        ids = answer[-1:]
    assert answer == expected


def test_a_parser_that_knows_the_format_refuses_another_field() -> None:
    with pytest.raises(text_format.ParseError):
        model_config('name: "a" colour: "red"')


def container(bundle: Bundle, kind: str) -> dict[str, Any]:
    """The one container that KServe or compose would start."""
    file = bundle.directory / "deployment" / kind / f"{deployment_name(bundle)}.yaml"
    document = yaml.safe_load(file.read_text())
    if kind == "compose":
        ((name, found),) = document["services"].items()
        source = (file.parent / found["volumes"][0]["source"]).resolve()
        assert source == bundle.directory.resolve()
        return found | {"name": name, "at": found["volumes"][0]["target"], "words": found["command"]}
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (found,) = document["spec"]["predictor"]["containers"]
    assert found["name"] == "kserve-container"
    assert found["resources"]["requests"]["memory"].endswith("M")
    name = document["metadata"]["name"]
    return found | {"name": name, "at": "/mnt/models", "words": [*found["command"], *found["args"]]}


@pytest.mark.parametrize("kind", ["kserve", "compose"])
def test_the_container_serves_the_bundle_and_its_probes_answer(bundles: list[Bundle], kind: str) -> None:
    bundle = next(one for one in bundles if (one.precision, one.target) == ("int8", "cpu"))
    found = container(bundle, kind)
    assert DNS_LABEL.fullmatch(found["name"])
    words = [word.replace(found["at"], str(bundle.directory)) for word in found["words"]]
    assert words[0] == "exporter"
    port = words[words.index("--port") + 1]
    words[words.index("--port") + 1], words[words.index("--host") + 1] = "0", "127.0.0.1"
    command = [sys.executable, "-m", "exporter.cli", *words[1:], "--json", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EXPORTER_API_KEY": "secret"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "}\n")) + "}"
        ready = yaml.safe_load(told)
        assert ready["api_key"]
        url, key = ready["url"], {"Authorization": "Bearer secret"}
        assert [one["id"] for one in httpx.get(f"{url}/v1/models", headers=key).json()["data"]] == [found["name"]]
        for path in probes(found, int(port)):
            assert httpx.get(url + path).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


def probes(found: dict[str, Any], port: int) -> list[str]:
    """The paths that are asked, each at the port that is served."""
    if "healthcheck" in found:
        address = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", " ".join(found["healthcheck"]["test"]))
        assert address is not None
        assert int(address[1]) == port == int(found["ports"][0].split(":")[-1])
        return [address[2]]
    asked = [found[name]["httpGet"] for name in ("readinessProbe", "livenessProbe")]
    assert {one["port"] for one in asked} == {port} == {one["containerPort"] for one in found["ports"]}
    return [one["path"] for one in asked]


def test_a_graph_for_cuda_asks_for_a_gpu(bundles: list[Bundle]) -> None:
    bundle = next(one for one in bundles if (one.precision, one.target) == ("int8", "cuda"))
    assert container(bundle, "kserve")["resources"]["limits"] == {"nvidia.com/gpu": 1}
    devices = container(bundle, "compose")["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    for kind in ("kserve", "compose"):
        assert container(bundle, kind)["words"][-2:] == ["--provider", "CUDAExecutionProvider"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("artifacts/demo/int8", "demo-int8"),
        ("artifacts/Demo_2/int8-cuda", "demo-2-int8-cuda"),
        ("artifacts/demo/merged", "demo-merged"),
        ("6.7B/int4", "model-6-7b-int4"),
        ("somewhere/my model!", "my-model"),
        ("x/" + "long-" * 30, ("long-" * 10)[:-1]),
    ],
)
def test_names_are_what_kubernetes_takes(path: str, name: str) -> None:
    directory = Path("/srv") / path
    found = deployment_name(Bundle(directory, "int8", "cuda" if "cuda" in path else "cpu", directory / "model.onnx"))
    assert found == name
    assert DNS_LABEL.fullmatch(found)


def test_an_unknown_kind_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="deployment helm"):
        export_function(PAIR / "base", precision=["int8"], deployment=["helm"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_with_its_deployment_is_exported_again(model: TinyModel) -> None:
    before = {path: path.read_bytes() for path in (model.directory.parent / "int8/deployment").rglob("*.yaml")}
    export(model.directory, precision=["int8"], deployment=["kserve"])
    assert before == {path: path.read_bytes() for path in before}
    assert verify_manifest(model.directory.parent / "int8").exit_code == 0


DOCUMENT = (ROOT / "docs/deployment.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCUMENT, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where the document's paths hold, after its first command."""
    place = tmp_path_factory.mktemp("documented")
    merge(base=PAIR / "base", adapter=PAIR / "adapter", out=place / "artifacts/demo/merged", template="alpaca")
    command = next(text for kind, text in BLOCKS if kind == "sh" and text.startswith("exporter export"))
    run(place, [sys.executable, "-m", "exporter.cli", *command.split()[1:]])
    return place


def run(place: Path, command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_command_writes_the_documented_files(place: Path) -> None:
    listed = re.findall(r"^        ([\w/.-]+)  ", DOCUMENT, re.M)
    found = [path for path in (place / "artifacts/demo/int8/deployment").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(place / "artifacts/demo/int8/deployment")) for path in found) == sorted(listed)
    for path in re.findall(r"artifacts/demo/int8[\w/.-]*", DOCUMENT):
        assert (place / path).exists(), path


def test_the_documented_python_answers_as_generate_does(place: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    ((_, code),) = [block for block in BLOCKS if block[0] == "python"]
    text = run(place, [sys.executable, "-c", code])
    instruction = re.search(r'"content": "(.+?)"', code)
    assert instruction is not None
    ours = generate(place / "artifacts/demo/int8", instruction=instruction[1], max_new_tokens=40).text
    assert ours
    assert text.startswith(ours)
