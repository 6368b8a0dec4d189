"""POST /v1/completions: prompts as text or tokens, continued."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from exporter.serving.bodies import CompletionBody, parse
from exporter.serving.failures import Failure
from exporter.serving.generation import Choice, Piece, Prompt, joined, usage
from exporter.serving.logprobs import completion_logprobs
from exporter.serving.models import Model
from exporter.serving.reading import read_body
from exporter.serving.service import Service
from exporter.serving.streaming import EventStream, begun, collected

DEFAULT_TOKENS = 16  # OpenAI's


async def create_completion(service: Service, request: HttpRequest) -> Response:
    """The whole answer, or a stream of its pieces. Raises Failure, ClientDisconnect."""
    service.admit()
    body = parse(CompletionBody, await read_body(request, service.limits))
    model = service.model(body.model)
    prompts = await asyncio.to_thread(read_prompts, body, model)
    choices = service.submit(
        model,
        body,
        prompts,
        request,
        max_new_tokens=DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
        top_logprobs=body.logprobs,
        echo=bool(body.echo),
    )
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    head |= {"object": "text_completion"}
    if body.streamed:
        pieces = await begun(request, choices)
        return EventStream(request, _chunks(head, pieces, body, model, choices, len(prompts)), choices)
    found = await collected(request, choices)
    whole = [_choice(joined(pieces), body, model) for pieces in found]
    return JSONResponse(head | {"choices": whole, "usage": usage(choices, len(prompts))})


def read_prompts(body: CompletionBody, model: Model) -> list[Prompt]:
    """Text is encoded as `exporter generate --prompt` encodes it. Failure (400) for a prompt that is empty."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given or not all(given):
        raise Failure(400, "prompt is empty; expected: text or tokens", "invalid_value", "prompt")
    prompts = []
    for one in given:
        if isinstance(one, str):
            prompts.append(Prompt(model.vocabulary.encode(one), one))
        else:
            known = all(token < model.engine.vocab_size for token in one)  # if not, `submit` refuses them
            text = model.vocabulary.tokenizer.decode(one, skip_special_tokens=False) if known else ""
            prompts.append(Prompt(tuple(one), text))
    return prompts


def _choice(piece: Piece, body: CompletionBody, model: Model) -> dict[str, Any]:
    scored = None
    if body.logprobs is not None:
        scored = completion_logprobs(piece.tokens, model.vocabulary, body.logprobs)
    return {"index": piece.index, "text": piece.text, "logprobs": scored, "finish_reason": piece.finish_reason}


async def _chunks(
    head: dict[str, Any],
    pieces: AsyncIterator[Piece],
    body: CompletionBody,
    model: Model,
    choices: Sequence[Choice],
    prompts: int,
) -> AsyncIterator[dict[str, Any]]:
    tail = {"usage": None} if body.include_usage else {}
    async for piece in pieces:
        yield head | {"choices": [_choice(piece, body, model)]} | tail
    if body.include_usage:
        yield head | {"choices": [], "usage": usage(choices, prompts)}
