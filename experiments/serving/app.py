"""The server as an application: texts and chats, and how it says what is wrong."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from experiments.serving import access, addresses, chat, completion
from experiments.serving.answer import Choice, Envelope, joined, usage
from experiments.serving.body import read_json
from experiments.serving.chat_template import ChatTemplate
from experiments.serving.engine import Engine
from experiments.serving.metrics import Metrics, add_metrics
from experiments.serving.refusal import Refusal
from tree_ffn.errors import InputError
from tree_ffn.inference.batching import Made
from tree_ffn.json_output import json_text


def build(
    engine: Engine,
    name: str,
    most_bytes: int,
    on_start: Callable[[], None] = lambda: None,
    api_key: str | None = None,
    template: ChatTemplate | None = None,
):
    """The application.

    Args:
      engine: not yet started; it starts and ends with the application.
      name: of the model, for clients.
      most_bytes: of a request's body.
      on_start: is called when requests are answered.
      api_key: what clients must send; None: whoever reaches the port may ask.
      template: of chats; None: the model has none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_):
        await asyncio.to_thread(engine.start)
        on_start()
        yield
        await asyncio.to_thread(engine.close)

    app = fastapi.FastAPI(
        title="tree_ffn", lifespan=lifespan, openapi_url=None, default_response_class=Json,
        dependencies=[] if api_key is None else [fastapi.Depends(access.asks_for(api_key))],
    )  # fmt: skip
    metrics = Metrics(engine)
    _say_what_is_wrong(app)
    add_metrics(app, metrics)
    addresses.add_models(app, engine, name)
    addresses.add_tokenizer(app, engine.model, most_bytes)

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request):
        body = await read_json(request, most_bytes)
        asked = completion.parse(body, engine.model, name, engine.most)
        return await answer(request, asked, Envelope(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: fastapi.Request):
        body = await read_json(request, most_bytes)
        asked = chat.parse(body, engine.model, template, name, engine.most)
        return await answer(request, asked, chat.ChatEnvelope(name, asked.logprobs))

    async def answer(request: fastapi.Request, asked: completion.Completion, envelope: Envelope):
        answered = _Answered(engine, asked, metrics)
        if asked.stream:
            return StreamingResponse(answered.events(envelope), media_type="text/event-stream")
        pieces = await _unless_gone(request, answered.whole())
        return Json(envelope.whole(pieces, usage(asked, answered.choices)))

    return app


class _Answered:
    """A request on its way through the engine, from the event loop's side."""

    def __init__(self, engine: Engine, asked: completion.Completion, metrics: Metrics):
        self._engine, self._asked, self._metrics = engine, asked, metrics
        self._start = time.perf_counter()
        self.choices = [Choice(asked, i, engine.model.tokenizer) for i in range(len(asked.requests))]
        self._inbox: asyncio.Queue[Made | Refusal] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        engine.submit(asked.requests, self._receive)

    def _receive(self, made: Made | Refusal) -> None:
        """Called on the device's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, made)

    async def pieces(self) -> AsyncIterator[dict]:
        """Pieces of the choices as they come; raises Refusal if the engine fails."""
        by_request = dict(zip(self._asked.requests, self.choices))
        try:
            while not all(one.finished for one in self.choices):
                made = await self._inbox.get()
                if isinstance(made, Refusal):
                    raise made
                choice = by_request[made.request]
                if not choice.finished:
                    piece = choice.push(made)
                    if choice.n_made == 1:
                        self._metrics.first_token.observe(time.perf_counter() - self._start)
                    yield piece
                    if choice.finished:
                        self._engine.cancel([made.request])
        finally:
            self._engine.cancel(self._asked.requests)
            counts = usage(self._asked, self.choices)
            self._metrics.read.inc(counts["prompt_tokens"])
            self._metrics.made.inc(counts["completion_tokens"])

    async def whole(self) -> list[dict]:
        """The choices in their order, each whole."""
        pieces: list[list[dict]] = [[] for _ in self.choices]
        async for piece in self.pieces():
            pieces[piece["index"]].append(piece)
        return [joined(its) for its in pieces]

    async def events(self, envelope: Envelope) -> AsyncIterator[str]:
        """Server-sent events: a piece each, then [DONE]."""
        try:
            for part in envelope.opening(len(self.choices)):
                yield event(part)
            async for piece in self.pieces():
                for part in envelope.parts(piece):
                    yield event(part)
        except Refusal as refusal:  # the head of the answer has been sent
            yield event(refusal.body())
            return
        if self._asked.include_usage:
            yield event(envelope.part([]) | {"usage": usage(self._asked, self.choices)})
        yield "data: [DONE]\n\n"


async def _unless_gone(request: fastapi.Request, answer: Coroutine[Any, Any, Any]):
    """An answer, given up when its client has gone; a streamed one has this from Starlette."""
    working, leaving = asyncio.create_task(answer), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(499, "The client has gone.")  # nobody reads it
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _gone(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Json(JSONResponse):
    """JSON in ASCII: half of a surrogate pair, which UTF-8 cannot hold, is named by its escape."""

    def render(self, content: Any) -> bytes:
        return json_text(content, "answer").encode("ascii")


def event(values: dict) -> str:
    """One server-sent event."""
    return f"data: {json_text(values, 'answer')}\n\n"


def _say_what_is_wrong(app: fastapi.FastAPI) -> None:
    """Every error as JSON in OpenAI's form, and nothing of the inside in it."""

    @app.exception_handler(Refusal)
    async def refused(_, refusal: Refusal):
        return _refused(refusal)

    @app.exception_handler(InputError)
    async def not_allowed(_, error: InputError):
        return _refused(Refusal(400, str(error)))

    @app.exception_handler(HTTPException)
    async def no_such_address(_, error: HTTPException):
        return _refused(Refusal(error.status_code, f"{error.detail}."), error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_, error: Exception):
        return _refused(Refusal(500, "The server failed to answer this request."))


# Their bodies are not read to the end, if they have one: what still comes must not be waited for.
UNREAD = (401, 404, 405, 408, 413)


def _refused(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Json:
    more = {"Retry-After": "1"} if refusal.status == 429 else {}
    if refusal.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    if refusal.status in UNREAD:
        more["Connection"] = "close"
    return Json(refusal.body(), refusal.status, {**(headers or {}), **more})
