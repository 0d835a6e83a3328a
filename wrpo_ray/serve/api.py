"""The routes of the endpoint as a web application, without Ray."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response

from wrpo_ray.config import ServeConfig
from wrpo_ray.serve.backends import Backend, Recorder, Scorer
from wrpo_ray.serve.errors import ClientError, model_not_found
from wrpo_ray.serve.keys import Keys
from wrpo_ray.serve.request_handling import Endpoint
from wrpo_ray.serve.requests import Chat, Completion

PAGE = Path(__file__).with_name("playground.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create(
    settings: ServeConfig,
    backends: Mapping[str, Backend],
    keys: Keys,
    record: Recorder,
    scorer: Scorer | None = None,
    ingresses: Callable[[], int] = lambda: 1,
) -> FastAPI:
    """Return the application; `backends` has the names that clients use."""
    endpoint = Endpoint(settings, backends, keys, record, scorer, ingresses)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for routes in (_asking(endpoint), _models(endpoint), _health(endpoint), _playground()):
        app.include_router(routes)
    app.exception_handler(ClientError)(_on_client_error)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(ClientDisconnect)(_on_disconnect)
    return app


def _asking(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await endpoint.answer(request, Chat, "chat")

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        return await endpoint.answer(request, Completion, "completions")

    @routes.post("/score")
    async def score(request: Request) -> dict[str, object]:
        return await endpoint.score(request)

    return routes


def _models(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(prefix="/v1/models")
    begun = int(time.time())

    def card(name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": begun, "owned_by": "wrpo"}

    @routes.get("")
    async def models(request: Request) -> dict[str, object]:
        endpoint.owner(request)
        reward = endpoint.settings.reward
        data = [card(name) for name in endpoint.backends]
        return {"object": "list", "data": data, "reward": reward and reward.name}  # playground

    @routes.get("/{name:path}")
    async def model(request: Request, name: str) -> dict[str, object]:
        endpoint.owner(request)
        if name not in endpoint.backends:
            raise model_not_found(name)
        return card(name)

    return routes


def _health(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> Response:
        is_ready = all([await backend.ready() for backend in endpoint.backends.values()])
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    return routes


def _playground() -> APIRouter:
    routes = APIRouter()
    page = PAGE.read_text(encoding="utf-8")

    @routes.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    return routes


async def _on_client_error(_: Request, error: ClientError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _on_http_error(_: Request, error: HTTPException) -> JSONResponse:
    shown = ClientError(error.status_code, str(error.detail))
    return JSONResponse(shown.body, shown.status, error.headers)


async def _on_disconnect(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
