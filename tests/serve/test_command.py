"""`litgpt serve` as a process: its options, its mistakes, its end."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.cli import parse
from litgpt.errors import UserError
from litgpt.serve.command import Serve, named
from tests.serve.conftest import KEY, Folders, start


def request(url: str, path: str, body: Any) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    return urllib.request.urlopen(urllib.request.Request(url + path, json.dumps(body).encode(), headers), timeout=60)


def ask(url: str, path: str, body: Any) -> Any:
    with request(url, path, body) as response:
        return json.loads(response.read())


def test_sigterm_lets_running_answers_end(folders: Folders, tmp_path: Path) -> None:
    server = start(folders.adapters["skip"], "--max_new_tokens", "7", "--temperature", "0", log=tmp_path / "log")
    default = ask(server.url, "/predict", {"prompt": "why?"})["output"]
    assert default == ask(server.url, "/predict", {"prompt": "why?", "model": "skip", "max_tokens": 7, "temperature": 0})["output"]
    assert default != ask(server.url, "/predict", {"prompt": "why?", "model": "tiny"})["output"]
    body = {"prompt": "why?", "max_tokens": 120, "logit_bias": {"2": -100}, "stream": True, "stream_options": {"include_usage": True}}
    with request(server.url, "/v1/completions", body) as response:
        response.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = response.read().split(b"\n\n")
    assert server.process.wait(20) == 143
    assert rest[-2] == b"data: [DONE]" and json.loads(rest[-3].removeprefix(b"data: "))["usage"]["completion_tokens"] == 120
    assert server.process.stderr is not None and server.process.stderr.read() == ""


def test_adapters_on_the_command_line() -> None:
    arguments = parse("litgpt serve", Serve, ["base", "--adapters", "a=x/y", "b=z", "--port", "1"])
    assert arguments["adapters"] == ["a=x/y", "b=z"] and arguments["port"] == 1
    assert parse("litgpt serve", Serve, ["base", "--adapters", "[a=x]"])["adapters"] == ["a=x"]
    assert named(["a=x=1", "b=~/z"]) == {"a": Path("x=1"), "b": Path.home() / "z"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": ["x"]}, "adapters: 'x' is not understood: write NAME=FOLDER"),
        ({"adapters": ["x=a", "x=b"]}, "the name 'x' is given twice"),
        ({"devices": 2}, "devices is 2: this server computes on one device"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"api_path": "predict"}, "it must begin with /"),
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
        ({"port": 70_000}, "cannot listen on 127.0.0.1, port 70000"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"accelerator": "tpu"}, "tpu"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str, folders: Folders) -> None:
    with pytest.raises(UserError, match=message):
        Serve(folders.base, **{"port": 0, **settings}).main()


def test_a_port_in_use(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(folders.base), "--port", str(taken.getsockname()[1])]) == 1
    assert "in use. Choose another --port" in capsys.readouterr().err


def test_a_strategy_that_one_device_does_not_need(capsys: pytest.CaptureFixture[str]) -> None:
    Serve(Path("base"), generate_strategy="sequential")
    assert "generate_strategy sequential: this server computes on one device" in capsys.readouterr().err
