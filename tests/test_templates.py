"""Chat templates against transformers, and templates that are refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from litgpt import prompts
from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate

CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  What is 1 + 1?  "},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?\n"},
    {"role": "assistant", "content": "4"},
]
TEMPLATES = {
    "namespace and trimming": (
        "{%- set ns = namespace(n=0) %}\n{{- bos_token }}\n{%- for m in messages %}\n    {%- set ns.n = ns.n + 1 %}\n"
        "    {{- '[' ~ ns.n ~ '] ' + m['role'] + ': ' + m.content | trim + eos_token }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '[assistant]' }}\n{%- endif %}\n"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem is defined }}{{ m.content }}|{% endfor %}"
    ),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n  <u>{{ m.content }}</u>\n  {% endif %}\n{% endfor %}\nend\n",
    "macro and filters": (
        "{% macro say(m) -%}{{ m.role | upper }}={{ m.content | replace('2', 'two') }};{%- endmacro %}"
        "{% for m in messages | selectattr('role', 'ne', 'system') if m.content %}{{ say(m) }}{% else %}none{% endfor %}"
        "{{ range(3) | list }}{{ messages[1:][0].content.strip().split(' ')[-1] }}{{ 'x' * 3 }}{{ 2 ** 5 }}{{ missing }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools": "{% if tools is not none %}tools{% else %}plain{% endif %}{{ documents is none }}",
}


def render_with_transformers(template: str, messages: list[dict[str, str]], generation: bool, **tokens: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=generation, **tokens)
    return rendered[0]


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_template_equals_transformers(name: str, generation: bool) -> None:
    ours = ChatTemplate(TEMPLATES[name], "<s>", "</s>").render(CONVERSATION, generation)
    assert ours == render_with_transformers(TEMPLATES[name], CONVERSATION, generation, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def smollm2_template(smollm2_gguf: Path) -> str:
    from gguf import GGUFReader

    return GGUFReader(smollm2_gguf).fields["tokenizer.chat_template"].contents()


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
def test_smollm2_template_equals_transformers(turns: int, smollm2_template: str) -> None:
    template = smollm2_template
    for messages in (CONVERSATION[:turns], CONVERSATION[1 : turns + 1]):
        ours = ChatTemplate(template).render(messages, True)
        assert ours == render_with_transformers(template, messages, True)
        assert ours == prompts.SmolLM2().render(messages, True)


def test_a_clock_that_stands_still() -> None:
    style = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}")
    first = style.render([])
    time.sleep(0.01)
    assert style.render([]) == first
    assert first.startswith(time.strftime("%Y-"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append.__globals__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "is unsafe"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 200,000 steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}", "more than 200,000 steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'x' * 10 ** 12 }}", "characters"),
        ("{{ 9 ** 9 ** 9 }}", "huge power"),
        (
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "more than 10,000,000 characters",
        ),
        ("{% for i in range(9999) %}{{ 'x' * 5000 }}{% endfor %}", "more than 10,000,000 characters"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive loops"),
        ("{% for m in messages %}\n{{ m.content }", "line 2"),
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{{ messages[0].nothing.there }}", "has no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_template_is_refused(template: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        ChatTemplate(template, source="folder/chat_template.jinja").render(CONVERSATION)
    assert message in str(error.value)
    assert "folder/chat_template.jinja" in str(error.value)
    assert time.perf_counter() - start < 20  # a bound on the unbounded, not a benchmark


def test_no_template_changes_the_conversation() -> None:
    """jinja2's `indent` appends a line end to its input, which a list keeps."""
    messages, tools = [{"role": "user", "content": "a"}], [{"type": "function"}]
    for name in ("messages", "tools", "[messages]|first"):
        with pytest.raises(UserError, match="indent"):
            ChatTemplate(f"{{{{ {name}|indent }}}}").render(messages, tools=tools)
    assert messages == [{"role": "user", "content": "a"}] and tools == [{"type": "function"}]


def test_huge_template_is_refused() -> None:
    with pytest.raises(UserError, match="100,000"):
        ChatTemplate("x" * 100_001)
