"""The server as its clients see it: OpenAI's Python client, LitGPT's, and plain HTTP, with a real process on loopback."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlparse

import openai
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from litgpt.api import LLM
from litgpt.serve.schemas import Chat, Completion, Predict
from tests.helpers.cases import quick
from tests.serve.conftest import KEY, Folders, Server

HELLO: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "why?"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def llm(folders: Folders, name: str = "tiny") -> LLM:
    return LLM.load(folders.adapters.get(name, folders.base), precision="32-true", device="cpu")


def send(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlparse(server.url).netloc, timeout=30)
    data = json.dumps(body).encode() if isinstance(body, dict | list | str) else body
    connection.request(method, path, data, {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, response.read()


def test_models(client: openai.OpenAI, folders: Folders) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", *folders.adapters]
    assert client.models.retrieve("skip").id == "skip" and client.models.retrieve("skip").parent == "tiny"  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
        client.models.retrieve("none")


def test_adapters_come_and_go_while_answers_run(server: Server, client: openai.OpenAI, folders: Folders) -> None:
    expected = llm(folders, "skip").generate(HELLO, max_new_tokens=12, temperature=0.0)
    running = client.chat.completions.create(model="skip", messages=HELLO, stream=True, temperature=0.0, max_tokens=100)
    next(running)
    for name in ("skip", "lora"):
        assert send(server, "POST", "/v1/load_lora_adapter", {"lora_name": f"new {name}", "lora_path": name}) == (
            200,
            f"new {name} is loaded".encode(),
        )
    assert client.chat.completions.create(model="new skip", messages=HELLO, **GREEDY).choices[0].message.content == expected
    half = client.chat.completions.create(model="new lora", messages=HELLO, stream=True, temperature=0.0, max_tokens=60)
    next(half)
    for name in ("skip", "lora"):
        assert send(server, "POST", "/v1/unload_lora_adapter", {"lora_name": f"new {name}"})[0] == 200
    assert list(half)[-1].choices[0].finish_reason == list(running)[-1].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["tiny", *folders.adapters]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("load", {"lora_name": "x", "lora_path": "nowhere"}, 400, b"nowhere does not exist"),
        ("load", {"lora_name": "x", "lora_path": "../.."}, 400, b"below the server's --adapter_dir"),
        ("load", {"lora_name": "x", "lora_path": "/etc"}, 400, b"below the server's --adapter_dir"),
        ("load", {"lora_name": "x", "lora_path": "a" * 900}, 400, b"error"),
        ("load", {"lora_name": "x", "lora_path": "a\0b"}, 400, b"lora_path"),
        ("load", {"lora_name": "skip", "lora_path": "skip"}, 400, b"served already"),
        ("load", {"lora_path": "skip"}, 400, b"lora_name"),
        ("unload", {"lora_name": "x"}, 404, b"there is no model"),
        ("unload", {"lora_name": "tiny"}, 400, b"served as long as the server runs"),
    ],
)
def test_adapters_that_cannot_come_or_go(path: str, body: dict[str, str], status: int, message: bytes, server: Server) -> None:
    found, text = send(server, "POST", f"/v1/{path}_lora_adapter", body)
    assert found == status and message in text


@pytest.mark.parametrize("name", quick(["tiny", "skip", "other", "norm", "tail", "lora"], "tiny", "tail", "lora"))
def test_chat_is_the_models_own_answer(name: str, client: openai.OpenAI, folders: Folders) -> None:
    own = llm(folders, name)
    expected = own.generate(HELLO, max_new_tokens=12, temperature=0.0)
    answer = client.chat.completions.create(model=name, messages=HELLO, **GREEDY)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    assert answer.model == name and answer.object == "chat.completion" and answer.choices[0].finish_reason == "length"
    prompt = own.tokenizer.ids(own.rendered(HELLO, None))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (len(prompt), 12, len(prompt) + 12)
    stream = client.chat.completions.create(model=name, messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == answer.usage and chunks[-1].choices == []
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length" and len(chunks) > 4


def test_requests_of_many_clients_at_once(client: openai.OpenAI, folders: Folders) -> None:
    """More than the batch holds, of all models; the answers are those of one client."""
    names = ["tiny", *folders.adapters] * 4

    def ask(i: int) -> str | None:
        question: Any = [{"role": "user", "content": f"question {i % 6} " * (1 + i % 6)}]
        return client.chat.completions.create(model=names[i], messages=question, **GREEDY).choices[0].message.content

    alone = [ask(i) for i in range(6)]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == alone * 4


def test_completions(client: openai.OpenAI, folders: Folders) -> None:
    own = llm(folders)
    texts = ["Once upon", "a time"]
    expected = [own.tokenizer.decode(list(own.complete(text, 12, temperature=0.0))) for text in texts]
    answer = client.completions.create(model="tiny", prompt=texts, **GREEDY)
    assert [choice.text for choice in answer.choices] == expected
    ids = own.tokenizer.ids(texts[0])
    same = client.completions.create(model="tiny", prompt=ids, logprobs=2, **GREEDY)
    assert same.choices[0].text == expected[0] and same.choices[0].logprobs is not None
    assert len(same.choices[0].logprobs.token_logprobs or []) == 12 and len((same.choices[0].logprobs.top_logprobs or [])[0]) == 2
    assert (
        "".join(chunk.choices[0].text for chunk in client.completions.create(model="tiny", prompt=ids, stream=True, **GREEDY))
        == expected[0]
    )
    assert [choice.text for choice in client.completions.create(model="tiny", prompt=[ids, ids], **GREEDY).choices] == [expected[0]] * 2
    pieces = [chunk.choices[0].logprobs for chunk in client.completions.create(model="tiny", prompt=ids, stream=True, logprobs=0, **GREEDY)]
    drawn = [(piece.tokens, piece.top_logprobs) for piece in pieces if piece]
    assert drawn and all(list(top) == [token] for tokens, tops in drawn for token, top in zip(tokens or [], tops or [], strict=True))
    offsets = [offset for piece in pieces if piece for offset in piece.text_offset or []]
    assert len(pieces) > 2 and offsets == same.choices[0].logprobs.text_offset and offsets == sorted(set(offsets))
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="tiny", prompt=[], **GREEDY)


def test_sampling(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "skip", "messages": HELLO, "max_completion_tokens": 12}

    def ask(**more: Any) -> list[str | None]:
        return [choice.message.content for choice in client.chat.completions.create(**common, **more).choices]

    three = ask(seed=5, n=3, temperature=1.2)
    assert three == ask(seed=5, n=3, temperature=1.2) and len(set(three)) == 3 and ask(seed=6, temperature=1.2) == three[1:2]
    greedy = ask(temperature=0)
    assert ask(temperature=2, extra_body={"top_k": 1}) == ask(temperature=2, top_p=0) == ask(extra_body={"min_p": 1}) == greedy
    stop = next(char for char in greedy[0] or "" if char.isascii())
    assert ask(temperature=0, stop=[stop, "zzz"]) == [(greedy[0] or "").partition(stop)[0]]
    assert ask(temperature=0, frequency_penalty=2, presence_penalty=2) != greedy
    only = ask(temperature=1.5, logit_bias={"70": 100})
    assert len(set(only[0] or "")) == 1


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 12 and all(
        token.logprob == token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens
    )
    parts = ["\ufffd" in token.token for token in tokens]
    assert any(parts) and [token.bytes for token in tokens] == [
        None if p else list(t.token.encode()) for t, p in zip(tokens, parts, strict=True)
    ]
    streamed = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, stream=True, **GREEDY)
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token.logprob for piece in pieces if piece for token in piece.content or []] == pytest.approx(
        [t.logprob for t in tokens], abs=1e-4
    )


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"messages": []}, 400, "messages: "),
        ({"messages": "hello"}, 400, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type: Input should be 'text'"),
        ({"messages": [HELLO[1], {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 400, "messages.1.tool_calls"),
        ({"messages": HELLO, "temperature": -1}, 400, "temperature: "),
        ({"messages": HELLO, "n": 0}, 400, "n: "),
        ({"messages": HELLO, "repetition_penalty": 1e-285}, 400, "repetition_penalty: "),
        ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens: "),
        ({"messages": HELLO, "max_tokens": 1000}, 400, "1000 more are requested, but the model reads at most 256 in all"),
        ({"messages": [{"role": "user", "content": "x " * 300}]}, 400, "the model reads at most 256"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"messages": HELLO, "logit_bias": {"999": 1}}, 400, "logit_bias names a token"),
        ({"messages": HELLO, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"messages": HELLO, "model": "none"}, 404, "there is no model 'none': tiny, "),
        (b"{", 400, "the body is not JSON: Expecting property name enclosed in double quotes at character 1"),
        (b"[1]", 400, "valid dictionary"),
        (b"", 400, "the body is empty: a JSON object is required"),
        ({"messages": HELLO, "stop": ""}, 400, "stop: String should have at least 1 character"),
        ({"messages": HELLO, "stop": [""]}, 400, "stop.0: String should have at least 1 character"),
        ({"messages": HELLO, "stop": ["a"] * 17}, 400, "stop: List should have at most 16 items"),
        ({"messages": HELLO, "stop": ["a", 5]}, 400, "stop.1: Input should be a valid string"),
        ({"messages": HELLO, "seed": 1.5}, 400, "seed"),
    ],
)
def test_errors_are_openais(body: Any, status: int, words: str, server: Server) -> None:
    got, content = send(server, "POST", "/v1/chat/completions", body)
    error = json.loads(content)["error"]
    assert got == status and words in error["message"], error
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert not isinstance(body, bytes) or error["param"] is None  # it is no parameter that is wrong


def test_other_refusals(server: Server, client: openai.OpenAI) -> None:
    for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/predict", "POST"), ("/v1/completions", "POST")):
        status, content = send(server, method, path, b"{}", Authorization="Bearer wrong")
        assert status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key", path
    form = send(server, "POST", "/predict", {"prompt": "Hi"}, **{"Content-Type": "application/x-www-form-urlencoded"})  # curl -d
    assert form[0] == 400 and b"send the header Content-Type: application/json" in form[1]
    assert send(server, "GET", "/v1/models", None, Authorization="", **{"X-API-Key": KEY})[0] == 200
    assert send(server, "GET", "/v1/models", None, Authorization="Basic dTpw", **{"X-API-Key": KEY})[0] == 200  # a proxy's
    assert send(server, "GET", "/v1/models", None, Authorization=f"bearer {KEY}")[0] == 200  # RFC 9110: schemes are case-insensitive
    assert send(server, "GET", "/v1/models", None, Host="evil.example")[0] == 400  # a name that was made to mean this machine
    status, content = send(server, "POST", "/predict", b'{"prompt": "' + b"x" * 5_000_000 + b'"}')
    assert status == 413 and json.loads(content)["error"]["code"] == "body_too_large"
    status, content = send(server, "POST", "/predict", (b"x" * 2**20 for _ in range(5)))  # no length in its header
    assert status == 413 and json.loads(content)["error"]["code"] == "body_too_large"
    for ids in ([5, 320], [[5], [99_999]]):  # the request's own: the server's tokenizer is the model's
        status, content = send(server, "POST", "/v1/completions", {"prompt": ids})
        error = json.loads(content)["error"]
        assert status == 400 and error["param"] == "prompt" and error["message"].endswith("the model has only those below 320"), error
    many = {"prompt": ["x"] * 100_000, "n": 16}
    assert send(server, "POST", "/v1/completions", many)[0] == 400
    assert send(server, "POST", "/predict", b"[" * 100_000)[0] == 400
    assert send(server, "POST", "/predict", b'{"prompt": "\\ud800", "model": "tiny"}')[0] == 400
    assert send(server, "POST", "/predict", b'{"prompt": "x", "top_p": NaN}')[0] == 400
    assert send(server, "POST", "/predict", {"prompt": "x"}, **{"Content-Type": "text/plain"})[0] == 400  # what any page may send
    assert send(server, "GET", "/nothing")[0] == 404 and send(server, "GET", "/predict")[0] == 405
    assert send(server, "GET", "/health") == (200, b"ok") and send(server, "GET", "/docs")[0] == 404
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0).models.list()


def test_predict_is_litgpts(server: Server, folders: Folders) -> None:
    own = llm(folders, "lora")
    expected = own.generate("why?", max_new_tokens=50, temperature=0.0)
    body = {"prompt": "why?", "model": "lora", "temperature": 0}
    status, content = send(server, "POST", "/predict", body)
    assert status == 200 and json.loads(content) == {"output": expected}
    status, content = send(server, "POST", "/predict", {**body, "stream": True, "max_new_tokens": 50})
    lines = [json.loads(line)["output"] for line in content.splitlines()]
    assert "".join(lines) == expected and len(lines) > 5


def test_a_full_queue_and_clients_that_go_away(server: Server, client: openai.OpenAI) -> None:
    """16 run, 8 wait, the next is refused; when the clients hang up their places are free at once."""
    address = urlparse(server.url)
    body = json.dumps({"messages": HELLO, "max_tokens": 200, "logit_bias": {"2": -100}, "n": 12, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    sockets = []
    for _ in range(2):
        connection = socket.create_connection((address.hostname or "", address.port or 0))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        sockets.append(connection)
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
    for connection in sockets:
        connection.close()
    start = time.monotonic()
    while True:
        try:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
            break
        except openai.RateLimitError:
            assert time.monotonic() - start < 3  # the answers would take longer
            time.sleep(0.02)


def test_nothing_of_a_request_is_logged(server: Server, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a secret question"}], max_tokens=2)
    send(server, "POST", "/v1/chat/completions", {"messages": "a secret question"})
    assert server.messages == ""


def test_the_schema_names_every_address(server: Server) -> None:
    paths = json.loads(send(server, "GET", "/openapi.json")[1])["paths"]
    own = {
        f"/v1/{name}" for name in ("chat/completions", "completions", "models", "models/{name}", "load_lora_adapter", "unload_lora_adapter")
    }
    assert set(paths) == {*own, "/predict", "/health"}
    assert all("default" in operation["responses"] for operations in paths.values() for operation in operations.values())


def test_a_wrong_method_names_the_right_one(server: Server) -> None:
    connection = http.client.HTTPConnection(urlparse(server.url).netloc, timeout=30)
    connection.request("TRACE", "/v1/completions")
    response = connection.getresponse()
    assert (response.status, response.headers["Allow"]) == (405, "POST")


def test_the_page_is_whole_and_drives_the_interface(server: Server) -> None:
    """One file that loads nothing, may talk to this server only, and names what the server has."""
    connection = http.client.HTTPConnection(urlparse(server.url).netloc, timeout=30)
    connection.request("GET", "/")
    response = connection.getresponse()
    page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert not re.search(r"https?:|//\w|@import|url\(|\bsrc=|<link(?! rel=\"icon\" href=\"data:,\")|\beval\b|innerHTML|\bon\w+=", page)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "connect-src 'self'" in policy
    paths = json.loads(send(server, "GET", "/openapi.json")[1])["paths"]
    assert {f"/{path}" for path in re.findall(r'fetch\("([^"]+)"', script[0])} == {"/v1/models", "/v1/chat/completions"} <= set(paths)
    numbers = re.search(r"NUMBERS = \[(.*?)\]", script[0])
    assert numbers and set(re.findall(r'"(\w+)"', numbers[1])) <= set(Chat.model_fields)
    ids = set(re.findall(r'\bid="([\w-]+)"', page))
    assert set(re.findall(r'\$\("([\w-]+)"\)', script[0])) <= ids and set(re.findall(r'"(\w+)"', numbers[1])) <= ids
    labelled = re.findall(r"<(?:select|textarea)[^>]*>", page)
    assert all("aria-label" in tag or re.search(rf"<label[^>]*>[^<]*{re.escape(tag)}", page) for tag in labelled)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(["tiny", "user", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.fixed_dictionaries({}, optional=dict.fromkeys({*Chat.model_fields, *Completion.model_fields, *Predict.model_fields}, VALUES))
GOOD: dict[str, Any] = {"messages": HELLO, "prompt": "x", "max_tokens": 2, "model": "skip"}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/predict"]), body=BODIES, good=st.booleans())
def test_any_body_is_answered_or_refused(path: str, body: dict[str, Any], good: bool, server: Server) -> None:
    """With one to all of its keys at random values: never an error of the server's own."""
    data = json.dumps({**GOOD, **dict(list(body.items())[:1])} if good else body).encode("utf-8", "surrogatepass")
    status, content = send(server, "POST", path, data)
    assert status in (200, 400, 404), (status, content, data)
    if status != 200:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
