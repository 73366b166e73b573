"""The server's endpoints and the formats of its responses: OpenAI's, and LitGPT's /predict."""

import asyncio
import base64
import hashlib
import hmac
import json
import queue
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from litgpt import __version__
from litgpt.args import LAST_SEED
from litgpt.errors import UserError
from litgpt.generate.engine import check
from litgpt.generate.sampling import Sampling
from litgpt.serve.models import Models, Served
from litgpt.serve.scheduler import Job, Piece, Scheduler
from litgpt.serve.schemas import Adapter, AdapterFolder, Chat, Completion, Predict, Settings
from litgpt.text import counted

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
DEFAULT_TOKENS = 512  # default of an OpenAI request
MOST_BODY = 4 * 2**20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class State:
    """The state that all requests share."""

    models: Models
    scheduler: Scheduler
    sampling: dict[str, Any]  # settings of the command line
    max_new_tokens: int  # of /predict
    stream: bool  # of /predict
    api_key: str | None
    max_prompt_tokens: int | None  # None: what the model reads
    timeout: float  # seconds that a request may take
    adapter_dir: Path | None  # adapters below it may be loaded by a request
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a template's sandbox renders one text at a time


class Refusal(HTTPException):
    """A refused request, as an error in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        return JSONResponse(self.body, self.status_code, {"Retry-After": "1"} if self.status_code == 429 else headers)


@dataclass
class Answering:
    """The answers of one request while they are computed."""

    state: State
    settings: Settings
    model: Served
    jobs: list[Job] = field(default_factory=list)
    prompt_tokens: int = 0
    counts: dict[int, int] = field(default_factory=dict)  # tokens of each answer
    queue: asyncio.Queue[tuple[int, Piece]] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def add(self, ids: list[int], max_new_tokens: int | None, n: int = 1, top: int | None = None, is_chat: bool = False) -> None:
        """Prepare n answers to the ids of a prompt."""
        llm, given, most = self.model.llm, self.settings, self.state.max_prompt_tokens
        if len(self.jobs) + n > self.state.scheduler.most:
            raise Refusal(400, f"the request asks for more than {self.state.scheduler.most} answers, the most that this server can hold")
        room = llm.model.max_seq_length - len(ids)
        if most is not None and len(ids) > most:
            raise Refusal(400, f"the prompt has {counted(len(ids), 'token')}, but this server accepts {most}", "context_length_exceeded")
        if room < (max_new_tokens or 1):
            asked = f" and {max_new_tokens} more are requested" if max_new_tokens else ""
            message = f"the prompt has {counted(len(ids), 'token')}{asked}, but the model reads at most {llm.model.max_seq_length} in all"
            raise Refusal(400, message, "context_length_exceeded", "max_tokens" if max_new_tokens and room > 0 else "messages")
        values = llm.sampling | self.state.sampling | given.sampling()
        sampling = Sampling(**{**values, "top_k": values["top_k"] or None})
        if any(token >= llm.config.V for token in sampling.logit_bias):
            raise Refusal(400, f"logit_bias names a token that the model does not have: it has {llm.config.V}", param="logit_bias")
        check(llm.model, ids, 1)
        self.prompt_tokens += len(ids)
        for _ in range(n):
            index = len(self.jobs)
            seed = None if given.seed is None else (given.seed + index) % (LAST_SEED + 1)
            deadline = time.monotonic() + self.state.timeout
            new, send = max_new_tokens or min(DEFAULT_TOKENS, room), partial(self._send, index)
            how: dict[str, Any] = {"seed": seed, "stops": given.stops, "top_logprobs": top, "is_chat": is_chat, "deadline": deadline}
            self.jobs.append(Job(self.model, ids, new, sampling, send, **how))

    def _send(self, index: int, piece: Piece) -> None:
        with suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

    async def start(self, prepare: Callable[[], None]) -> None:
        """Run `prepare`, which adds prompts, outside the event loop; then queue the answers."""
        try:
            async with self.state.preparing:
                await asyncio.to_thread(prepare)
            self.state.scheduler.submit(self.jobs)
        except queue.Full:
            raise Refusal(429, "the server is busy and its queue is full: try again later", "queue_full") from None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield each answer's index and pieces as they come. Raises Refusal where one fails. Leaving early ends the answers."""
        left = len(self.jobs)
        try:
            while left:
                index, piece = await self.queue.get()
                if piece.reason == "error":
                    raise Refusal(500, "the answer failed: see the server's messages")
                if piece.reason == "late":
                    raise Refusal(503, "the server was busy for too long: try again later", "timeout")
                left -= piece.reason is not None
                self.counts[index] = piece.count
                yield index, piece
        finally:
            self.state.scheduler.cancel(self.jobs)

    async def complete(self, request: Request) -> list[Piece]:
        """Return the complete answers. Those of a client that goes away are ended."""
        answers = [Piece() for _ in self.jobs]

        async def collect() -> None:
            async for index, piece in self.pieces():
                answers[index].text += piece.text
                answers[index].reasoning += piece.reasoning
                answers[index].tokens += piece.tokens
                answers[index].reason = piece.reason

        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        task, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refusal(499, "the client has gone")
            await task
        finally:
            task.cancel()
            gone.cancel()
        return answers

    @property
    def usage(self) -> dict[str, int]:
        count = sum(self.counts.values())
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": count, "total_tokens": self.prompt_tokens + count}


# --- The formats of responses ---


def chat_choice(index: int, piece: Piece, key: str, with_logprobs: bool, first: bool = True) -> dict[str, Any]:
    """Return a choice of /v1/chat/completions: its `key` is message, or delta while it is streamed."""

    def entry(token: str, logprob: float) -> dict[str, Any]:
        part = "\ufffd" in token  # of a character: its bytes are not those of U+FFFD
        return {"token": token, "logprob": logprob, "bytes": None if part else list(token.encode("utf-8", "replace"))}

    content: dict[str, Any] = {"content": piece.text} | ({"reasoning_content": piece.reasoning} if piece.reasoning else {})
    if first:
        content = {"role": "assistant", **content} | ({"refusal": None} if key == "message" else {})
    tokens = [{**entry(t["token"], t["logprob"]), "top_logprobs": [entry(*pair) for pair in t["top"]]} for t in piece.tokens]
    logprobs = {"content": tokens, "refusal": None} if with_logprobs else None
    return {"index": index, key: content, "logprobs": logprobs, "finish_reason": piece.reason}


def text_choice(index: int, piece: Piece, key: str, with_logprobs: bool, first: bool = True) -> dict[str, Any]:
    """Return a choice of /v1/completions."""
    logprobs: dict[str, Any] | None = None
    if with_logprobs:
        texts, values, offsets = ([token[name] for token in piece.tokens] for name in ("token", "logprob", "at"))
        top = [dict([*token["top"], (token["token"], token["logprob"])]) for token in piece.tokens]  # the drawn one too, as OpenAI has it
        logprobs = {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
    return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.reason}


async def answered(request: Request, answering: Answering, body: Chat | Completion) -> Response:
    """Return the response to an OpenAI request, streamed if requested."""
    is_chat = isinstance(body, Chat)
    choice, kind = (chat_choice, "chat.completion") if is_chat else (text_choice, "text_completion")
    head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": answering.model.name}
    wanted = body.top is not None
    if not body.stream:
        answers = await answering.complete(request)
        choices = [choice(i, piece, "message", wanted) for i, piece in enumerate(answers)]
        return JSONResponse({**head, "object": kind, "choices": choices, "usage": answering.usage})
    head["object"] = "chat.completion.chunk" if is_chat else kind
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[str]:
        usage = {"usage": None} if with_usage else {}
        try:
            if is_chat:
                for i in range(len(answering.jobs)):
                    yield _event({**head, "choices": [chat_choice(i, Piece(), "delta", False)], **usage})
            async for i, piece in answering.pieces():
                yield _event({**head, "choices": [choice(i, piece, "delta", wanted, first=False)], **usage})
            if with_usage:
                yield _event({**head, "choices": [], "usage": answering.usage})
        except Refusal as error:
            yield _event(error.body)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


# --- The endpoints ---


def make_app(state: State, host: str = "127.0.0.1", api_path: str = "/predict") -> FastAPI:
    """Return the application."""
    responses: dict[int | str, dict[str, Any]] = {"default": {"description": "A refusal, in the format of OpenAI's errors"}}
    app = FastAPI(title="litgpt serve", version=__version__, docs_url=None, redoc_url=None, responses=responses)
    app.state.serve = state
    if host in LOOPBACK:  # a website whose name resolves to this machine must not reach it
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK[:2], "[::1]"], www_redirect=False)
    app.add_middleware(LimitedBody)
    app.add_exception_handler(Refusal, lambda _, error: error.response())
    app.add_exception_handler(UserError, lambda _, error: Refusal(400, str(error)).response())
    app.add_exception_handler(HTTPException, lambda _, error: Refusal(error.status_code, str(error.detail)).response(error.headers))
    app.add_exception_handler(RequestValidationError, lambda _, error: _invalid(error).response())
    protected = APIRouter(dependencies=[Depends(_authorised)])
    protected.add_api_route("/v1/chat/completions", _chat, methods=["POST"], response_model=None)
    protected.add_api_route("/v1/completions", _completion, methods=["POST"], response_model=None)
    protected.add_api_route("/v1/models", _models, methods=["GET"])
    protected.add_api_route("/v1/models/{name:path}", _model, methods=["GET"])
    protected.add_api_route("/v1/load_lora_adapter", _load_adapter, methods=["POST"], response_class=PlainTextResponse)
    protected.add_api_route("/v1/unload_lora_adapter", _unload_adapter, methods=["POST"], response_class=PlainTextResponse)
    protected.add_api_route(api_path, _predict, methods=["POST"], response_model=None)
    app.include_router(protected)
    app.add_api_route("/health", _health, methods=["GET"], response_class=PlainTextResponse)
    app.add_api_route("/", _page, methods=["GET"], response_class=HTMLResponse, include_in_schema=False)
    return app


def _authorised(request: Request) -> None:
    key = _state(request).api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")


def _state(request: Request) -> State:
    state: State = request.app.state.serve
    return state


def _answering(request: Request, body: Settings) -> Answering:
    state = _state(request)
    return Answering(state, body, _find(state, body.model or next(iter(state.models))))


def _find(state: State, name: str) -> Served:
    if name not in state.models:
        raise Refusal(404, f"there is no model {name[:100]!r}: {', '.join(state.models)}", "model_not_found", "model")
    return state.models[name]


async def _chat(request: Request, body: Chat) -> Response:
    answering = _answering(request, body)
    llm, messages = answering.model.llm, [message.plain() for message in body.messages]

    def prepare() -> None:
        if hasattr(llm.prompt_style, "render"):
            text = llm.rendered(messages, None)
        else:  # without turns: the last question on its own
            system = next((m["content"] for m in messages if m["role"] == "system"), None)
            text = llm.rendered(messages[-1]["content"], system)
        answering.add(llm.prompt_ids(text), body.max_completion_tokens or body.max_tokens, body.n or 1, body.top, is_chat=True)

    await answering.start(prepare)
    return await answered(request, answering, body)


async def _completion(request: Request, body: Completion) -> Response:
    answering = _answering(request, body)
    llm = answering.model.llm

    def prepare() -> None:
        for prompt in body.prompts:
            ids = llm.tokenizer.ids(prompt) if isinstance(prompt, str) else prompt
            if ids is prompt and max(ids, default=0) >= llm.config.V:
                raise Refusal(400, f"prompt names the token {max(ids)}, but the model has only those below {llm.config.V}", param="prompt")
            answering.add(ids, body.max_tokens, body.n or 1, body.top)

    await answering.start(prepare)
    return await answered(request, answering, body)


async def _predict(request: Request, body: Predict) -> Response:
    state, answering = _state(request), _answering(request, body)
    llm = answering.model.llm
    new = body.max_new_tokens or body.max_tokens or state.max_new_tokens
    await answering.start(lambda: answering.add(llm.prompt_ids(llm.rendered(body.prompt, None)), new))
    if not (state.stream if body.stream is None else body.stream):
        return JSONResponse({"output": (await answering.complete(request))[0].text})

    async def lines() -> AsyncIterator[str]:
        try:
            async for _, piece in answering.pieces():
                if piece.text:
                    yield json.dumps({"output": piece.text}) + "\n"
        except Refusal as error:
            yield json.dumps(error.body) + "\n"

    return StreamingResponse(lines(), media_type="application/json")


async def _models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_described(model) for model in _state(request).models.values()]}


async def _model(request: Request, name: str) -> dict[str, Any]:
    return _described(_find(_state(request), name))


async def _load_adapter(request: Request, body: AdapterFolder) -> str:
    state = _state(request)
    root = _adapter_dir(state)
    folder = (root / body.lora_path).resolve()
    if not folder.is_relative_to(root):
        raise Refusal(400, "lora_path is a folder below the server's --adapter_dir", param="lora_path")
    async with state.loading:
        try:
            model = await asyncio.to_thread(state.models.open, body.lora_name, folder)
        except (UserError, OSError) as error:
            raise Refusal(400, str(error).replace(f"{root}/", ""), param="lora_path") from None
        state.models[body.lora_name] = model
    return f"{body.lora_name} is loaded"


async def _unload_adapter(request: Request, body: Adapter) -> str:
    state = _state(request)
    _adapter_dir(state)
    _find(state, body.lora_name)
    state.models.drop(body.lora_name)
    return f"{body.lora_name} is unloaded"


def _adapter_dir(state: State) -> Path:
    if state.adapter_dir is None:
        raise Refusal(403, "this server's models are fixed: it was started without --adapter_dir")
    return state.adapter_dir


def _described(model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "litgpt",
        "parent": model.parent,
        "max_model_len": model.llm.model.max_seq_length,
    }


async def _health() -> str:
    return "ok"


async def _page() -> HTMLResponse:
    text = PAGE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script may run
    policy = f"{POLICY}; script-src 'sha256-{digest}'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


def _invalid(error: RequestValidationError) -> Refusal:
    """Return the first mistake in a request's body; values are not repeated.

    A field of several possible types has a mistake for each: the relevant one is not about the type, or lies deepest.
    """
    errors = error.errors()
    of_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    first = max(of_field, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    parts = (str(part) for part in first["loc"][1:])
    place = ".".join(part for part in parts if part.isidentifier() or part.isdecimal())[:100]  # without names of types
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":  # its place is a character, and no field
        message, place = f"the body is not JSON: {first['ctx']['error']} at character {place}", ""
    elif first["loc"] == ("body",) and first["type"] == "missing":
        message = "the body is empty: a JSON object is required"
    elif isinstance(first["input"], bytes):  # whatever is in it
        message = "the body is not declared as JSON: send the header Content-Type: application/json"
    return Refusal(400, f"{place}: {message}" if place else message, param=place or None)


class LimitedBody:
    """ASGI middleware that refuses bodies over `MOST_BODY` bytes, as they arrive."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = Refusal(413, f"the body of a request may have {MOST_BODY:,} bytes", "body_too_large")
        size = 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BODY:
                raise refusal
            return message

        await self.app(scope, limited, send)
