"""What every endpoint works on: the models, the limits, the figures, and whether the server still takes requests."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from exporter.errors import ExporterError
from exporter.serving.bodies import Generation
from exporter.serving.failures import Failure, failure_of, shutting_down
from exporter.serving.generation import Choice, Prompt
from exporter.serving.logs import JsonLog
from exporter.serving.metrics import Facts, Metrics, Watch
from exporter.serving.models import Bundled, Model, by_name
from exporter.serving.requests import Request, Stream


@dataclass(frozen=True, slots=True)
class Limits:
    """body: bytes of a request. choices: texts that one request may ask for, prompts times n.

    Seconds: read for a body, write for a reader that takes nothing, request for the whole answer.
    """

    body: int = 1_000_000
    choices: int = 64
    read: float = 30.0
    write: float = 60.0
    request: float = 600.0


class Service:
    """`in_flight`: requests that have begun and whose last byte is not written yet."""

    def __init__(
        self,
        bundles: Sequence[Bundled],
        log: JsonLog,
        limits: Limits | None = None,
        api_key: str | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.models = by_name([model for one in bundles for model in one.models])
        self.engines = {one.models[0].name: one.engine for one in bundles}
        self.metrics, self.log, self.limits = Metrics(self.engines), log, limits or Limits()
        self._api_key, self._log_prompts = api_key, log_prompts
        self.draining, self.in_flight = False, 0

    def start(self) -> None:
        for engine in self.engines.values():
            engine.start()

    def stop(self) -> None:
        """Ends every stream; harmless when all have ended. Blocks for about one step."""
        for engine in self.engines.values():
            engine.stop()

    @property
    def guarded(self) -> bool:
        return self._api_key is not None

    @property
    def alive(self) -> bool:
        return all(engine.alive for engine in self.engines.values())

    @property
    def ready(self) -> bool:
        return self.alive and not self.draining

    def authorize(self, request: HttpRequest) -> None:
        """Failure (401) without the key. Compared in constant time, as bytes: a header may hold anything."""
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self._api_key.encode()):
            seen = "incorrect API key" if given else "no API key: send it as Authorization: Bearer KEY"
            raise Failure(401, seen, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def admit(self) -> None:
        if self.draining:
            raise shutting_down()

    def model(self, name: str) -> Model:
        if name not in self.models:
            known = ", ".join(self.models)
            raise Failure(404, f"there is no model {name[:100]!r}; there is: {known}", "model_not_found", "model")
        return self.models[name]

    def submit(
        self,
        model: Model,
        body: Generation,
        prompts: Sequence[Prompt],
        request: HttpRequest,
        *,
        max_new_tokens: int | None,
        top_logprobs: int | None = None,
        echo: bool = False,
    ) -> list[Choice]:
        """The engine's streams for n choices of each prompt, all of them or (Failure, or a defect) none."""
        n = body.n or 1
        if len(prompts) * n > self.limits.choices:
            seen = f"{len(prompts)} prompts times n {n}"
            raise Failure(400, f"{seen}; expected: at most {self.limits.choices} texts a request", "invalid_value", "n")
        facts: Facts = request.state.facts
        facts.model, facts.stream, facts.choices = model.name, body.streamed, len(prompts) * n
        facts.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        facts.prompts = [prompt.text for prompt in prompts] if self._log_prompts else None
        limits = [_new_tokens(model, prompt, max_new_tokens) for prompt in prompts]
        first_seed = secrets.randbits(62) if body.seed is None else body.seed % (1 << 63)
        deadline = time.monotonic() + self.limits.request
        choices: list[Choice] = []
        streams: list[Stream] = []
        try:
            for prompt, limit in zip(prompts, limits, strict=True):
                for _ in range(n):
                    stream = model.engine.submit(
                        Request(
                            prompt.ids,
                            limit,
                            # The first choice draws what `exporter generate --seed` draws.
                            sampling=body.sampling(first_seed + len(choices)),
                            adapter=model.adapter,
                            stop_tokens=() if body.ignore_eos else None,
                            top_logprobs=top_logprobs,
                            echo_logprobs=echo and top_logprobs is not None,
                            deadline=deadline,
                            client=body.user or (request.client.host if request.client else ""),
                        )
                    )
                    streams.append(stream)
                    watch = Watch(self.metrics, facts, model.name)
                    choices.append(
                        Choice(len(choices), stream, prompt, model.vocabulary, watch, stops=body.stops, echo=echo)
                    )
        except BaseException as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, ExporterError):
                raise failure_of(error) from error
            raise
        return choices

    async def idle(self, timeout: float) -> bool:
        """Whether every request under way has been answered within `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.in_flight


def _new_tokens(model: Model, prompt: Prompt, asked: int | None) -> int:
    """How many tokens may follow the prompt; Failure (400) for a prompt without a token or too long, or too many."""
    length, room = len(prompt.ids), model.room - len(prompt.ids)
    if length == 0:
        raise Failure(400, "the prompt has no token", "invalid_value", "prompt")
    if max(prompt.ids) >= model.engine.vocab_size:
        seen = f"token {max(prompt.ids)}; expected: ids from 0 to {model.engine.vocab_size - 1}"
        raise Failure(400, seen, "invalid_value", "prompt")
    longest = model.room - 1
    if room < 1:
        seen = f"the prompt has {length} tokens, and the longest context of {model.name} is {longest}"
        raise Failure(400, seen, "context_length_exceeded", "prompt")
    if asked is not None and asked > room:
        seen = f"{length} tokens in the prompt and {asked} asked for, and the longest context of {model.name} is "
        raise Failure(400, f"{seen}{longest}: at most {room} may follow", "context_length_exceeded", "max_tokens")
    return room if asked is None else asked
