"""What soak.py asks: requests whose answers are known beforehand, each computed alone, and bodies that are refused."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exporter
from exporter.demonstration import PAIR
from exporter.prompts import chat_template
from exporter.runtime.adapters import adapter_names, adapter_template
from exporter.runtime.generate import generate
from exporter.runtime.load import load
from exporter.runtime.runner import Runner

MAX_BODY = 100_000  # bytes: the server's --max-body
CHOICES = 3
LONGEST_TEXT = 700  # characters, of which the demo's context holds twice as many
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "stop": [" the", "\n\n"]},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3},
)


@dataclass(frozen=True)
class Case:
    """A request and its choices' texts. reasons: OpenAI's finish reasons."""

    path: str
    body: Mapping[str, Any]
    texts: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Bad:
    """A request that has to be refused with `status`. content: bytes, or a document that is sent as JSON."""

    name: str
    content: Any
    status: int
    path: str = COMPLETIONS
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    @property
    def data(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


def make_bundles(work: Path) -> dict[str, Path]:
    """The demo pair merged, in 8 and in 4 bits, and its base with the adapter apart, by the names that are served."""
    merged, apart = work / "merged", work / "apart"
    exporter.merge(base=PAIR / "base", adapter=PAIR / "adapter", out=merged, template="alpaca", proof="none")
    exporter.export(merged, precision=["int8", "int4"])
    exporter.export(base=PAIR / "base", adapter=[f"poet={PAIR / 'adapter'}"], adapters="separate", out=apart)
    return {"demo8": work / "int8", "demo4": work / "int4", "base": apart}


def make_cases(bundles: Mapping[str, Path], prompts: list[Mapping[str, str]], longest: int) -> list[Case]:
    """For each model and sampling, some prompts through either API, with answers of up to `longest` tokens."""
    chance = random.Random(0)
    cases = []
    for model, runner, templated in _models(bundles):
        for sampling in SAMPLINGS:
            for row in chance.sample(prompts, 4):
                length, seed = chance.randint(2, longest), chance.randrange(1 << 30)
                n = CHOICES if sampling["temperature"] and chance.random() < 0.3 else 1
                body = {"model": model, "max_tokens": length, "seed": seed, "n": n, **sampling}
                if templated and chance.random() < 0.5:
                    message = {"role": "user", "content": row["instruction"]}
                    message |= {"input": row["input"]} if row["input"] else {}
                    asked = {"instruction": row["instruction"], "input": row["input"]}
                    cases.append(_case(runner, CHAT, body | {"messages": [message]}, asked))
                else:
                    text = (row["instruction"] * chance.choice((1, 1, 3)))[:LONGEST_TEXT]
                    cases.append(_case(runner, COMPLETIONS, body | {"prompt": text}, {"prompt": text}))
    return cases


def _models(bundles: Mapping[str, Path]) -> Iterator[tuple[str, Runner, bool]]:
    """Each model's name, its Runner, and whether it takes chats."""
    for name, directory in bundles.items():
        runner = load(directory, provider="cpu", threads=1)
        yield name, runner, chat_template(directory) is not None
        for adapter in adapter_names(runner.bundle):
            yield adapter, runner.with_adapter(adapter), adapter_template(directory, adapter) is not None


def _case(runner: Runner, path: str, body: Mapping[str, Any], asked: Mapping[str, str]) -> Case:
    """Choice i is what `exporter generate` gives with the seed + i."""
    options = {name: body[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty") if name in body}
    found = [
        generate(
            runner,
            **asked,
            max_new_tokens=body["max_tokens"],
            seed=body["seed"] + number,
            stop=body.get("stop", ()),
            **options,
        )
        for number in range(body["n"])
    ]
    reasons = tuple("length" if one.reason == "length" else "stop" for one in found)
    return Case(path, body, tuple(one.text for one in found), reasons)


def bad_requests(context: int, vocabulary: int) -> list[Bad]:
    """context: of the demo pair, in tokens. vocabulary: its size."""
    good = {"model": "demo8", "prompt": "Once upon a time", "max_tokens": 4}
    chat = {"model": "demo8", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}

    def with_field(name: str, value: Any) -> dict[str, Any]:
        return good | {name: value}

    return [
        Bad("no JSON", b'{"model": ', 400),
        Bad("no UTF-8", b'{"model": "demo8", "prompt": "\xff\xfe"}', 400),
        Bad("no object", [good], 400),
        Bad("nothing", b"", 400),
        Bad("an unknown field", with_field("colour", "red"), 400),
        Bad("a number as text", with_field("max_tokens", "4"), 400),
        Bad("no temperature", with_field("temperature", 3), 400),
        Bad("no choice", with_field("n", 0), 400),
        Bad("too many choices", with_field("n", 128), 400),
        Bad("not supported", with_field("best_of", 2), 400),
        Bad("an empty prompt", with_field("prompt", ""), 400),
        Bad("an unknown token", with_field("prompt", [1, vocabulary]), 400),
        Bad("a prompt past the context", with_field("prompt", "word " * (context + 1)), 400),
        Bad("max_tokens past the context", with_field("max_tokens", context + 1), 400),
        Bad("an unknown model", with_field("model", "gpt-4"), 404),
        Bad("another content type", good, 415, headers={"Content-Type": "text/plain"}),
        Bad("a huge body", with_field("prompt", "a" * (2 * MAX_BODY)), 413),
        Bad("another method", b"", 405, method="GET"),
        Bad("another path", good, 404, path="/v1/complete"),
        Bad("no message", chat | {"messages": []}, 400, path=CHAT),
        Bad("an unknown role", chat | {"messages": [{"role": "tool", "content": "x"}]}, 400, path=CHAT),
        Bad("a role that the template refuses", chat | {"messages": [{"role": "system", "content": "x"}]}, 400, CHAT),
        Bad("a chat without a template", chat | {"model": "base"}, 400, path=CHAT),
    ]
