"""A Hugging Face token is used and never shown: not in output, errors, logs, saved settings, nor in what is printed of the settings."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.download import download_from_hub
from litgpt.errors import UserError
from tests.helpers.cases import quick
from tests.helpers.places import Place, run

TOKEN = "hf_" + "SeSaMeOpen" * 3
ROOT = Path(__file__).parents[3]


def places_of(secret: str, folder: Path) -> list[str]:
    """The files below a folder in whose name or content the secret stands, also compressed or in UTF-16."""
    forms = [secret.encode(), secret.encode("utf-16-le"), secret[::-1].encode()]
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if secret in str(path) or any(form in content for form in forms):
            found.append(str(path))
    return found


def fine_tune(place: Place, *more: Any) -> list[Any]:
    return ["finetune_lora", place.base(), "--data", "JSON", "--data.json_path", place.data(), "--out_dir", "out", "--max_steps", 1, *more]


@pytest.mark.parametrize("way", quick(["--access_token", "HF_TOKEN", "a config file"], "HF_TOKEN", "a config file"))
def test_a_whole_run(way: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    more: list[Any] = []
    if way == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    elif way == "--access_token":
        more = ["--access_token", TOKEN]
    else:
        more = ["--config", place.write("secret.yaml", f"access_token: {TOKEN}\n")]
    ended = run(fine_tune(place, *more, "--save_interval", 1))
    assert ended.code == 0 and TOKEN not in ended.out + ended.err
    for words in (["generate", place.folder / "out/final", "--max_new_tokens", 1], fine_tune(place, *more, "--resume", "true")):
        again = run(words)
        assert TOKEN not in again.out + again.err
    assert places_of(TOKEN, place.folder) == ([str(place.folder / "secret.yaml")] if way == "a config file" else [])
    assert "access_token" not in yaml.safe_load((place.folder / "out/final/hyperparameters.yaml").read_text())
    assert list((place.folder / "out").rglob("events.out.tfevents*"))  # the logs were looked at too


MISTAKES: dict[str, list[Any]] = {
    "unknown key": ["--lora_rr", 1],
    "unknown key named like it": ["--acces_token", 1],
    "wrong type": ["--lora_r", "x"],
    "a second free word": ["x", "y"],
    "foreign class": ["--data", "os.system"],
    "missing file": ["--config", "nowhere.yaml"],
    "no data": ["--data.json_path", "nowhere.json"],
    "precision": ["--precision", "fp3"],
    "optimizer": ["--optimizer", "Nothing"],
    "blocks": ["--lora_block_indices", "[99]"],
    "token as a list": ["--config", "list.yaml"],
    "token as a mapping": ["--config", "map.yaml"],
    "broken YAML behind it": ["--config", "broken.yaml"],
    "two of them": ["--config", "twice.yaml"],
    "a class in it": ["--config", "class.yaml"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors(name: str, place: Place) -> None:
    place.write("list.yaml", f"access_token: [{TOKEN}]\n")
    place.write("map.yaml", f"access_token: {{{TOKEN}: 1}}\n")
    place.write("broken.yaml", f"access_token: {TOKEN}\n  lora_r: [\n")
    place.write("twice.yaml", f"access_token: {TOKEN}\naccess_token: {TOKEN}\n")
    place.write("class.yaml", f"access_token: {{class_path: os.system, init_args: {{a: {TOKEN}}}}}\n")
    ended = run(fine_tune(place, "--access_token", TOKEN, *MISTAKES[name]))
    assert ended.code in (1, 2) and ended.err.startswith(("Error", "data", "tiny")) and TOKEN not in ended.out + ended.err


OPAQUE = "open/sesame word"  # as a hub of one's own may give out
ALONE: dict[str, list[str]] = {
    "as the command": ["{}"],
    "as a folder": ["generate", "{}"],
    "as a model": ["download", "{}"],
    "behind the values": ["finetune", "base", "{}", "{}"],
    "behind a value": ["download", "org/name", "{}", "{}", "{}", "{}", "{}", "{}", "{}", "{}"],
    "appended": ["download", "org/name", "--access_token+={}"],
    "appended, apart": ["finetune", "base", "--access_token+", "{}"],
    "one dash": ["download", "org/name", "-access_token={}"],
    "no dash": ["download", "org/name", "a", "b", "c", "d", "e", "f", "access_token={}"],
    "another key": ["finetune", "base", "--hf_token", "{}"],
    "misspelt": ["generate", "base", "--acces_token={}"],
    "a class": ["finetune", "base", "--data", "{}"],
    "a number": ["finetune", "base", "--lora_r", "{}"],
    "a file": ["finetune", "base", "--config", "{}"],
}


@pytest.mark.parametrize("way", ALONE)
@pytest.mark.parametrize("secret", [TOKEN, OPAQUE], ids=["of the hub", "opaque"])
def test_a_token_in_the_wrong_place(way: str, secret: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub token is known by its form, another one if it is in HF_TOKEN or behind a key that resembles access_token."""
    if secret == OPAQUE and "token" not in "".join(ALONE[way]):
        monkeypatch.setenv("HF_TOKEN", OPAQUE)
    place.base()
    ended = run([word.format(secret) for word in ALONE[way]])
    assert ended.code in (1, 2) and "Error: " in ended.err and secret not in ended.out + ended.err
    assert not places_of(secret, place.folder)


def test_the_password_of_an_endpoint(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("me:sesame7", "sesame7", "me:open%20sesame7"):
        monkeypatch.setenv("HF_ENDPOINT", f"http://{user}@127.0.0.1:9")
        ended = run(["download", "org/name"])
        assert ended.code == 1 and "http://***@127.0.0.1:9/org/name" in ended.err and "sesame7" not in ended.out + ended.err
        with pytest.raises(UserError) as error:  # from Python, where no stream is guarded
            download_from_hub("org/name")
        assert "sesame7" not in str(error.value)
    assert not places_of("sesame7", place.folder)


def test_what_is_printed_of_the_settings(place: Place) -> None:
    for words in (["--print_config"], ["--print_config=skip_null"], ["--help"]):
        ended = run(fine_tune(place, "--access_token", TOKEN, *words))
        assert ended.code in (0, 2) and TOKEN not in ended.out + ended.err


def test_a_download_that_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub answers at the discard port of this machine."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    for words, environment in ((["--access_token", TOKEN], ""), ([], TOKEN)):
        monkeypatch.setenv("HF_TOKEN", environment)
        ended = run(["download", "org/name", *words])
        assert ended.code == 1 and "Traceback" not in ended.err and TOKEN not in ended.out + ended.err
    assert not places_of(TOKEN, place.folder)


@pytest.mark.slow
def test_not_even_a_bug_shows_it(place: Place) -> None:
    """A traceback quotes lines of code, not their values; nor does the interpreter that dies of a signal."""
    code = "import sys, litgpt.checkpoint as c; c.require_checkpoint = lambda *a: 1 / 0; from litgpt.__main__ import main; sys.exit(main())"
    words = [str(word) for word in fine_tune(place, "--access_token", TOKEN)]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and TOKEN not in done.stdout + done.stderr
