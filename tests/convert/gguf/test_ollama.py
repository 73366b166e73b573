"""Ollama's Modelfile: its template makes the texts that the prompt style makes, by an interpreter of the templates written here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from litgpt.convert.gguf.export import convert_to_gguf
from litgpt.convert.gguf.ollama import form_of
from litgpt.prompts import STYLES, ChatTemplate, resolve_prompt_style
from litgpt.tokenizer import Tokenizer
from tests.helpers import tiny

WITHOUT = {"r1-base", "deepseek-v2", "llama2", "codellama", "mistral", "mistral-v3", "olmo"}  # texts that depend on more than their place
QUESTION, REPLY, MORE = ({"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("user", "How?")))
SYSTEM = {"role": "system", "content": "Be kind."}


def executed(template: str, values: dict[str, str]) -> str:
    """What Go's text/template makes of the few actions that are used: {{ .X }}, {{ "text" }} and {{ if .X }} ... {{ end }}."""
    template = re.sub(r"\{\{ if \.(\w+) \}\}(.*?)\{\{ end \}\}", lambda m: m[2] if values[m[1]] else "", template, flags=re.DOTALL)
    return re.sub(r'\{\{ (?:\.(\w+)|"([^"]*)") \}\}', lambda m: values[m[1]] if m[1] else m[2], template)


def ollama(template: str, turns: Sequence[dict[str, Any]], system: str) -> str:
    """The prompt of a conversation: the template for each question with its reply; for the last question up to where the reply starts."""
    texts, group = [], {"System": system, "Prompt": "", "Response": ""}
    for turn in turns:
        group[{"system": "System", "user": "Prompt", "assistant": "Response"}[turn["role"]]] = turn["content"]
        if turn["role"] == "assistant":
            texts.append(executed(template, group))
            group = dict.fromkeys(group, "")
    return "".join(texts) + executed(template.partition("{{ .Response }}")[0], group)


@pytest.mark.parametrize("name", sorted(STYLES))
def test_templates_make_the_styles_texts(name: str, tiny_tokenizer_dir: Path) -> None:
    style = STYLES[name]()
    form = form_of(style, Tokenizer(tiny_tokenizer_dir))
    assert (form is None) == (name in WITHOUT)
    if form is None:
        return
    if not hasattr(style, "render"):
        assert ollama(form.template(), [QUESTION], "") == style.apply("Why?")
        return
    cases: list[list[dict[str, Any]]] = [[QUESTION], [QUESTION, REPLY, MORE]]
    if ".System" in form.template():
        cases += [[SYSTEM, QUESTION], [SYSTEM, QUESTION, REPLY, MORE]]
    for turns in cases:
        assert ollama(form.template(), turns, form.system) == style.render(turns, add_generation_prompt=True)


def test_braces_and_templates_that_have_no_form(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    loop = "{% for m in messages %}{{ '[{{' + m.role + '}}]' + m.content + '\n' }}{% endfor %}[{{ '{{' }}assistant{{ '}}' }}]"
    style = ChatTemplate(loop)
    form = form_of(style, tokenizer)
    assert form and ollama(form.template(), [QUESTION, REPLY, MORE], "") == style.render(
        [QUESTION, REPLY, MORE], add_generation_prompt=True
    )
    for broken in (
        "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",  # numbered turns
        "{{ messages[-1].content }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ):
        assert form_of(ChatTemplate(broken), tokenizer) is None


def test_modelfile(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    (base / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05}'
    )
    file = tmp_path / "Modelfile"
    convert_to_gguf(base, tmp_path / "Shop.gguf", dtype="q8_0")
    template = form_of(resolve_prompt_style(None, base), Tokenizer(base))
    assert template and file.read_text() == (
        f'FROM ./Shop.gguf\nTEMPLATE """{template.template()}"""\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.7\nPARAMETER top_k 20\nPARAMETER top_p 0.9\nPARAMETER min_p 0.05\nPARAMETER num_ctx 256\n"
    )
    assert f"ollama create shop -f {file}" in capsys.readouterr().out
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "do_sample": false, "temperature": 0.7}')
    convert_to_gguf(base, tmp_path / "Shop.gguf", overwrite=True)
    assert "PARAMETER temperature 0\n" in file.read_text()  # ours is replaced, another's is not
    convert_to_gguf(base, tmp_path / "other.gguf")
    assert "FROM ./Shop.gguf" in file.read_text() and f"-f {tmp_path / 'other.Modelfile'}" in capsys.readouterr().out
    assert (tmp_path / "other.Modelfile").read_text().startswith("FROM ./other.gguf\n")
    for name in ("Modelfile", "own.Modelfile"):  # written by hand, for a file that comes later
        (tmp_path / name).write_text("FROM ./own.gguf\nSYSTEM mine\n")
        convert_to_gguf(base, tmp_path / "own.gguf")
        (tmp_path / "own.gguf").unlink()
        assert (tmp_path / name).read_text() == "FROM ./own.gguf\nSYSTEM mine\n"
    assert "No Modelfile for Ollama is written: Modelfile and own.Modelfile exist already" in capsys.readouterr().out
