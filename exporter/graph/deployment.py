"""Files that run a bundle elsewhere: a Triton model configuration, a KServe InferenceService, a compose file.

They lie in `<bundle>/deployment/` and point at the bundle: nothing of it is copied or linked. docs/deployment.md says
how each is used.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx

from exporter.errors import InputRefused
from exporter.files import disk_errors, write_atomically
from exporter.graph.builder import exporter_version
from exporter.graph.bundle import Bundle
from exporter.graph.graph_check import load_graph

DIRECTORY = "deployment"
GENERIC = frozenset({"merged", "native", "fp32", "fp16", "int8", "int4", "optimum"})
LONGEST_NAME = 50  # Kubernetes takes 63, and KServe appends words of its own
# ONNX element types as the enum DataType of Triton's model_config.proto names them.
TRITON_TYPES: Mapping[int, str] = {
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
}


def write_deployment(bundle: Bundle, kinds: Sequence[str]) -> list[Path]:
    """Write the files of each kind (DEPLOYMENTS); earlier ones of the same kind are replaced. Returns their paths."""
    written = []
    with disk_errors(bundle.directory):
        for kind in dict.fromkeys(kinds):
            path, content = DEPLOYMENTS[kind](bundle)
            target = bundle.directory / DIRECTORY / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content.encode())
            written.append(target)
    return written


def deployment_name(bundle: Bundle) -> str:
    """The model's name everywhere: of the directory, behind its parent's where it is named after a precision only.

    Lower-case letters, digits and hyphens, a letter first: what a Kubernetes service may be named (RFC 1035).
    """
    directory = bundle.directory.resolve()
    own = directory.name.removesuffix("-cuda")
    parts = [directory.parent.name, own] if own in GENERIC else [own]
    words = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    name = words if words[:1].isalpha() else f"model-{words}"
    # A directory may hold a graph for each target.
    return name[:LONGEST_NAME].strip("-") + ("-cuda" if bundle.target == "cuda" else "")


def triton_config(bundle: Bundle) -> tuple[Path, str]:
    """config.pbtxt for Triton's onnxruntime backend: one call computes one step, the caller keeps the cache.

    No batching by Triton (max_batch_size 0): requests' caches differ in length, so `dims` hold the batch too. Inputs
    that a caller may leave out are left out. InputRefused for a type that Triton's clients cannot send.
    """
    graph, name = load_graph(bundle.graph).graph, deployment_name(bundle)
    defaults = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in defaults]
    kind = "KIND_GPU" if bundle.target == "cuda" else "KIND_CPU"
    lines = [
        "# The bundle itself is version 1 of this model: see docs/deployment.md of exporter.",
        f'name: "{name}"',
        'backend: "onnxruntime"',
        "max_batch_size: 0",
        f'default_model_filename: "{bundle.graph.name}"',
        *_tensors("input", inputs, bundle),
        *_tensors("output", graph.output, bundle),
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
    ]
    return Path("triton") / name / "config.pbtxt", "\n".join(lines) + "\n"


def _tensors(field: str, values: Iterable[onnx.ValueInfoProto], bundle: Bundle) -> list[str]:
    """Each tensor's name, type and dims, -1 where a size is not fixed."""
    described = []
    for value in values:
        tensor = value.type.tensor_type
        if tensor.elem_type not in TRITON_TYPES:
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise InputRefused(f"{bundle.graph}: {value.name} is {kind}", expected=" or ".join(TRITON_TYPES.values()))
        dims = ", ".join(str(size.dim_value if size.HasField("dim_value") else -1) for size in tensor.shape.dim)
        described.append(f'  {{ name: "{value.name}" data_type: {TRITON_TYPES[tensor.elem_type]} dims: [ {dims} ] }}')
    return [f"{field} [", ",\n".join(described), "]"]


def inference_service(bundle: Bundle) -> tuple[Path, str]:
    """A KServe InferenceService whose container runs `exporter serve` over what STORAGE_URI brings to /mnt/models."""
    name = deployment_name(bundle)
    gpu = "\n          limits:\n            nvidia.com/gpu: 1" if bundle.target == "cuda" else ""
    text = f"""\
# Set the image and STORAGE_URI before `kubectl apply -f`: see docs/deployment.md of exporter.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    minReplicas: 1
    timeout: 600
    terminationGracePeriodSeconds: 45
    containers:
      - name: kserve-container
        image: exporter:{exporter_version()}
        command: ["exporter"]
        args: ["serve", "{name}=/mnt/models", "--host", "0.0.0.0", "--port", "8080"{_provider(bundle)}]
        env:
          - name: STORAGE_URI
            value: pvc://models/{name}
          - name: EXPORTER_API_KEY
            valueFrom:
              secretKeyRef:
                name: exporter-api-key
                key: api-key
        ports:
          - containerPort: 8080
            protocol: TCP
        readinessProbe:
          httpGet:
            path: /readyz
            port: 8080
        livenessProbe:
          httpGet:
            path: /healthz
            port: 8080
          initialDelaySeconds: 120
        resources:
          requests:
            memory: {_memory_mb(bundle)}M{gpu}
"""
    return Path("kserve") / f"{name}.yaml", text


def compose_file(bundle: Bundle) -> tuple[Path, str]:
    """A compose file whose service runs `exporter serve` over the bundle, mounted read-only."""
    name = deployment_name(bundle)
    gpu = """
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]"""
    text = f"""\
# EXPORTER_API_KEY=... docker compose -f {name}.yaml up: see docs/deployment.md of exporter.
services:
  {name}:
    image: exporter:{exporter_version()}
    command: ["exporter", "serve", "{name}=/models/{name}", "--host", "0.0.0.0", "--port", "8000"{_provider(bundle)}]
    environment:
      - EXPORTER_API_KEY
    ports:
      - "127.0.0.1:8000:8000"
    volumes:
      - type: bind
        source: ../..
        target: /models/{name}
        read_only: true
    healthcheck:
      test: ["CMD", "python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz')"]
      start_period: 120s
    stop_grace_period: 45s
    restart: unless-stopped{gpu if bundle.target == "cuda" else ""}
"""
    return Path("compose") / f"{name}.yaml", text


def _provider(bundle: Bundle) -> str:
    """More words of the command: a directory may hold a graph for each target."""
    return ', "--provider", "CUDAExecutionProvider"' if bundle.target == "cuda" else ""


def _memory_mb(bundle: Bundle) -> int:
    """What a pod asks for, in MB: the weights twice (16-bit ones become float32 on a CPU) and 2 GB beside them."""
    section = bundle.section
    return 2000 + round(2e-6 * sum(section["files"][file]["size"] for file in section["weights"]))


DEPLOYMENTS: Mapping[str, Callable[[Bundle], tuple[Path, str]]] = {
    "triton": triton_config,
    "kserve": inference_service,
    "compose": compose_file,
}
