"""Log-probabilities in the two forms of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from exporter.serving.generation import Placed
from exporter.serving.vocabulary import Vocabulary


def completion_logprobs(tokens: Sequence[Placed], vocabulary: Vocabulary, top: int) -> dict[str, list[Any]]:
    """Four lists, an entry a token; `top_logprobs` holds the `top` best and the token itself. Offsets: characters."""
    best: list[dict[str, float] | None] = []
    for token in tokens:
        step = token.step
        named = {visible(vocabulary, other): logprob for other, logprob in step.top[:top]}
        if step.id is not None and step.logprob is not None:
            named |= {visible(vocabulary, step.id): step.logprob}
        best.append(named or None)
    return {
        "tokens": [visible(vocabulary, token.step.id) for token in tokens],
        "token_logprobs": [token.step.logprob for token in tokens],
        "top_logprobs": best,
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[Placed], vocabulary: Vocabulary, top: int) -> list[dict[str, Any]]:
    return [
        _described(vocabulary, token.step.id, token.step.logprob)
        | {"top_logprobs": [_described(vocabulary, other, logprob) for other, logprob in token.step.top[:top]]}
        for token in tokens
    ]


def _described(vocabulary: Vocabulary, id: int | None, logprob: float | None) -> dict[str, Any]:
    raw = b"" if id is None else vocabulary.token_bytes(id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def visible(vocabulary: Vocabulary, id: int | None) -> str:
    r"""A token as the older API writes it: its text, or `bytes:\xe2\x80` where it is a part of a character."""
    raw = b"" if id is None else vocabulary.token_bytes(id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
