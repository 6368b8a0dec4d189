"""The names that requests may ask for: each bundle's own, and one for each of its separate adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.graph.bundle import Bundle
from exporter.prompts import chat_template, special_tokens
from exporter.runtime.adapters import adapter_template
from exporter.runtime.text import load_tokenizer
from exporter.serving.requests import Engine
from exporter.serving.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle's engine under a name, with one of its adapters or (None) without.

    template: the chat template, None where there is none. special_tokens: by name, for the template.
    created: the time of the graph's file, in seconds since 1970.
    """

    name: str
    engine: Engine
    adapter: str | None
    bundle: Bundle
    provider: str
    vocabulary: Vocabulary
    template: str | None
    special_tokens: Mapping[str, str]
    created: int

    @property
    def room(self) -> int:
        """Tokens of prompt and answer together, the last one included, which needs no position of its own."""
        return min(self.engine.n_positions, self.engine.stats().capacity) + 1

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's model object, and what this server adds: everything from `max_model_len` on."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "exporter",
            "max_model_len": self.room - 1,
            "chat": self.template is not None,
            "adapter": self.adapter,
            "precision": self.bundle.precision,
            "provider": self.provider,
        }


@dataclass(frozen=True, slots=True)
class Bundled:
    """One bundle's engine, and the models that it computes: the bundle under its own name first."""

    engine: Engine
    models: tuple[Model, ...]


def bundled(name: str, engine: Engine, bundle: Bundle, provider: str) -> Bundled:
    """The bundle under `name`, its adapters under theirs. InputRefused for a missing or broken tokenizer."""
    vocabulary = Vocabulary(load_tokenizer(bundle.directory))
    own, tokens = chat_template(bundle.directory), special_tokens(bundle.directory)
    created = int(bundle.graph.stat().st_mtime)
    found = []
    for adapter in (None, *engine.adapters):
        template = adapter_template(bundle.directory, adapter) or own
        found.append(Model(adapter or name, engine, adapter, bundle, provider, vocabulary, template, tokens, created))
    return Bundled(engine, tuple(found))


def by_name(models: Sequence[Model]) -> dict[str, Model]:
    """UsageError where two have one name."""
    found: dict[str, Model] = {}
    for model in models:
        if model.name in found:
            raise UsageError(
                f"two models are named {model.name!r}: {found[model.name].bundle.directory} and "
                f"{model.bundle.directory}",
                expected="names of their own",
                todo="name a bundle, NAME=DIR, or export an adapter again under another name",
            )
        found[model.name] = model
    return found


def split_name(argument: str | Path) -> tuple[str, Path]:
    """`NAME=DIR`, or DIR under the last part of its path. UsageError for an empty or odd name."""
    name, separator, directory = str(argument).partition("=")
    if isinstance(argument, Path) or not separator or "/" in name:
        path = Path(argument)
        name, directory = path.resolve().name, str(path)
    if not name or not name.isprintable():
        raise UsageError(f"the model name {name!r} for {directory}", expected="NAME=DIR with a printable name")
    return name, Path(directory)
