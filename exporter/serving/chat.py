"""POST /v1/chat/completions: messages, through the model's own chat template."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from exporter.errors import InputRefused
from exporter.prompts import render_chat
from exporter.serving.bodies import ChatBody, Message, RenderBody, parse
from exporter.serving.failures import Failure
from exporter.serving.generation import Choice, Piece, Prompt, joined, usage
from exporter.serving.logprobs import chat_logprobs
from exporter.serving.models import Model
from exporter.serving.reading import read_body
from exporter.serving.service import Service
from exporter.serving.streaming import EventStream, begun, collected


async def create_chat_completion(service: Service, request: HttpRequest) -> Response:
    """The whole answer, or a stream of its pieces. Raises Failure, ClientDisconnect."""
    service.admit()
    body = parse(ChatBody, await read_body(request, service.limits))
    model = service.model(body.model)
    prompt = await asyncio.to_thread(render, model, body.messages)
    top = (body.top_logprobs or 0) if body.logprobs else None
    # Without a number, an answer may be as long as the context allows: OpenAI's default.
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    choices = service.submit(model, body, [prompt], request, max_new_tokens=limit, top_logprobs=top)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    if body.streamed:
        pieces = await begun(request, choices)
        head |= {"object": "chat.completion.chunk"}
        return EventStream(request, _chunks(head, pieces, body, model, choices), choices)
    found = await collected(request, choices)
    whole = [_choice(joined(pieces), body, model) for pieces in found]
    return JSONResponse(head | {"object": "chat.completion", "choices": whole, "usage": usage(choices, 1)})


async def render_messages(service: Service, request: HttpRequest) -> Response:
    """What a chat becomes before it is answered: for the page, and for whoever asks why."""
    body = parse(RenderBody, await read_body(request, service.limits))
    model = service.model(body.model)
    prompt = await asyncio.to_thread(render, model, body.messages)
    return JSONResponse(
        {"model": model.name, "prompt": prompt.text, "prompt_tokens": len(prompt.ids), "template": model.template}
    )


def render(model: Model, messages: Sequence[Message]) -> Prompt:
    """The template is the model's own, never invented. Failure (400) without one, or where it refuses the messages."""
    if model.template is None:
        seen = f"the model {model.name!r} has no chat template: use /v1/completions"
        raise Failure(400, seen, "no_chat_template", "messages")
    given = [message.for_template() for message in messages]
    plain = [{key: value for key, value in message.items() if key != "input"} for message in given]
    try:
        text = render_chat(model.template, given, special_tokens=model.special_tokens)
        lost = given != plain and text == render_chat(model.template, plain, special_tokens=model.special_tokens)
    except InputRefused as error:
        raise Failure(400, error.seen, "template_refuses", "messages") from error
    if lost:
        raise Failure(400, "this chat template has no place for an input", "template_refuses", "messages")
    # The template has written the special tokens already.
    return Prompt(model.vocabulary.encode(text, add_special_tokens=False), text)


def _scored(piece: Piece, body: ChatBody, model: Model) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {"content": chat_logprobs(piece.tokens, model.vocabulary, body.top_logprobs or 0), "refusal": None}


def _choice(piece: Piece, body: ChatBody, model: Model) -> dict[str, Any]:
    return {
        "index": piece.index,
        "message": {"role": "assistant", "content": piece.text, "refusal": None},
        "logprobs": _scored(piece, body, model),
        "finish_reason": piece.finish_reason,
    }


async def _chunks(
    head: dict[str, Any],
    pieces: AsyncIterator[Piece],
    body: ChatBody,
    model: Model,
    choices: Sequence[Choice],
) -> AsyncIterator[dict[str, Any]]:
    """The role first, then the text, then an empty delta with the reason: what OpenAI's own stream looks like."""
    tail = {"usage": None} if body.include_usage else {}

    def chunk(index: int, delta: dict[str, str], logprobs: object, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | tail

    for choice in choices:
        yield chunk(choice.index, {"role": "assistant", "content": ""}, None, None)
    async for piece in pieces:
        if piece.text or piece.tokens:
            yield chunk(piece.index, {"content": piece.text}, _scored(piece, body, model), None)
        if piece.finish_reason is not None:
            yield chunk(piece.index, {}, None, piece.finish_reason)
    if body.include_usage:
        yield head | {"choices": [], "usage": usage(choices, 1)}
