"""LoRA adapters at run time: a bundle's adapter by name, its factors where the session computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from exporter.errors import InputRefused, UsageError
from exporter.graph.adapters import SUFFIX, TEMPLATE_SUFFIX
from exporter.graph.bundle import Bundle
from exporter.manifest import file_is_unchanged


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """`parameters`: float32 factors by the graph's input names. None and empty: the base itself."""

    name: str | None = None
    parameters: Mapping[str, ort.OrtValue] = field(default_factory=dict)

    def bind(self, binding: ort.IOBinding) -> None:
        """onnxruntime ignores active adapters of RunOptions where inputs are bound, so these are bound too."""
        for name, value in self.parameters.items():
            binding.bind_ortvalue_input(name, value)


NO_ADAPTER = ActiveAdapter()


def adapter_names(bundle: Bundle) -> tuple[str, ...]:
    """The adapters that a bundle's manifest lists."""
    listed = bundle.section.get("adapters") or {}
    if not isinstance(listed, dict):
        raise InputRefused(f"the manifest in {bundle.directory} is malformed at adapters", todo="export again")
    return tuple(sorted(listed))


def read_adapter(bundle: Bundle, name: str | None, session: ort.InferenceSession, device: str) -> ActiveAdapter:
    """The factors of the adapter `name` on `device` (cpu or cuda).

    UsageError for a name that the bundle does not list, InputRefused for a file that is not the exported one.
    """
    if name is None:
        return NO_ADAPTER
    names = adapter_names(bundle)
    if name not in names:
        raise UsageError(
            f"{bundle.directory} has no adapter {name!r}",
            expected="one of " + ", ".join(names) if names else "no --adapter: the bundle was exported without any",
            todo="" if names else "export it with --adapters separate",
        )
    path = checked_adapter_file(bundle, name)
    try:
        file = ort.AdapterFormat.read_adapter(str(path))  # pyright: ignore[reportArgumentType] (takes str only)
        found = file.get_parameters()
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise InputRefused(f"{path} cannot be read: {str(error)[:200]}", todo="export again") from error
    taken = {value.name: value for value in session.get_overridable_initializers()}
    for parameter, value in found.items():
        known, shape = taken.get(parameter), value.shape()
        if known is None or known.type != value.data_type() or not _fits(known.shape, shape):
            raise InputRefused(
                f"{path.name} holds {parameter!r} of shape {list(shape)}",
                expected="an input of the graph" if known is None else f"shape {known.shape}",
                todo="export base and adapters together again",
            )
    # Copies: these values, and arrays made of them, are views of the mapped file, which nothing here keeps open.
    copies = {key: np.array(value.numpy()) for key, value in found.items()}
    return ActiveAdapter(
        name, {key: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for key, array in copies.items()}
    )


def checked_adapter_file(bundle: Bundle, name: str) -> Path:
    """The adapter's file; InputRefused unless it is the one that was exported."""
    section = bundle.section
    file = name + SUFFIX
    entry = section["files"].get(file)
    if Path(file).name != file or not isinstance(entry, dict) or not file_is_unchanged(bundle.directory / file, entry):
        raise InputRefused(
            f"{bundle.directory / file} is not the file that was exported",
            expected="the size and hash that exporter.json lists",
            todo="export again, or restore the file",
        )
    return bundle.directory / file


def adapter_template(directory: Path, name: str | None) -> str | None:
    """The chat template that came with the adapter `name`, if one did."""
    path = directory / f"{name}{TEMPLATE_SUFFIX}"
    return path.read_bytes().decode() if name is not None and path.is_file() else None


def _fits(expected: Sequence[int | str], shape: Sequence[int]) -> bool:
    return len(expected) == len(shape) and all(
        isinstance(size, str) or size == given for size, given in zip(expected, shape, strict=True)
    )
