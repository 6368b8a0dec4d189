"""The routes: OpenAI's API, operations, and the page."""

from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from exporter.serving.chat import create_chat_completion, render_messages
from exporter.serving.completions import create_completion
from exporter.serving.failures import Failure
from exporter.serving.observe import Observe
from exporter.serving.service import Service

PAGE = Path(__file__).with_name("page")
# Nothing from elsewhere, nothing inline, in nobody's frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}


def build_app(service: Service) -> FastAPI:
    """Everything that the server answers. No page of FastAPI's own: those load scripts from a network."""
    app = FastAPI(title="Exporter", redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None)
    guarded = APIRouter(dependencies=[Depends(service.authorize)])

    @guarded.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @guarded.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    @guarded.post("/v1/chat/render", response_model=None)
    async def chat_render(request: Request) -> Response:
        return await render_messages(service, request)

    @guarded.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model.to_dict() for model in service.models.values()]})

    @guarded.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(service.model(name).to_dict())

    @guarded.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        """Whether the process should live on: a worker that ended while nobody asked it to does not come back."""
        well = service.alive or service.draining
        return PlainTextResponse("ok\n" if well else "a worker has ended\n", 200 if well else 503)

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        """Whether a request would be taken."""
        return PlainTextResponse("ready\n" if service.ready else "not ready\n", 200 if service.ready else 503)

    for path, file in PAGE_FILES.items():
        app.add_api_route(path, _page(PAGE / file), response_model=None)

    @app.exception_handler(Failure)
    async def failed(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, Failure)
        request.state.facts.error = failure.code or "invalid_request"
        return failure.response()

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: Exception) -> Response:
        """No such path, or no such method there."""
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.url.path[:200]}"
        seen, code = {
            404: (f"there is no {asked}", "unknown_url"),
            405: (f"{asked} is not allowed", "method_not_allowed"),
        }.get(error.status_code, (str(error.detail), None))
        return await failed(request, Failure(error.status_code, seen, code, headers=error.headers or {}))

    app.include_router(guarded)
    app.add_middleware(Observe, service=service, paths=frozenset(KNOWN_PATHS))
    return app


KNOWN_PATHS = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/render",
    "/v1/models",
    "/metrics",
    "/healthz",
    "/readyz",
    *PAGE_FILES,
}


def _page(file: Path):
    async def page() -> FileResponse:
        return FileResponse(file, headers=PAGE_HEADERS)

    return page
