"""Bodies of requests: what is read, refused and ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from litgpt.serve.schemas import Chat, Completion, Message

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


def test_contents_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message(role="developer", content=parts).plain() == {"role": "system", "content": "ab"}  # type: ignore[arg-type]
    assert Message(role="assistant").plain() == {"role": "assistant", "content": ""}


def test_keys_that_templates_read_are_kept() -> None:
    """Qwen3's writes the reasoning of a reply before the result of a tool."""
    keys = {"reasoning_content": "why", "name": "f", "tool_call_id": "a"}
    for role in ("assistant", "tool"):
        assert Message(role=role, content="7", **keys, refusal=None, unknown=1).plain() == {"role": role, "content": "7", **keys}  # type: ignore
    for key in ("thinking", "reasoning"):
        assert Message(role="assistant", **{key: "why"}).plain() == {"role": "assistant", "content": "", key: "why"}  # type: ignore[arg-type]


def test_sampling_holds_what_is_given() -> None:
    assert Chat(**HELLO).sampling() == {}
    assert Chat(**HELLO, top_k=-1, temperature=0, logit_bias={"3": 1}).sampling() == {"temperature": 0, "top_k": 0, "logit_bias": {3: 1}}
    assert Chat(**HELLO, stop="a").stops == ["a"] and Chat(**HELLO).stops == []
    assert Chat(**HELLO, logprobs=True).top == 0 and Chat(**HELLO, top_logprobs=3).top is None


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([], [[]])]
)
def test_forms_of_prompts(prompt: Any, prompts: Any) -> None:
    assert Completion(prompt=prompt).prompts == prompts


def test_unknown_keys_are_ignored_and_unsupported_ones_refused() -> None:
    Chat(**HELLO, user="me", store=False, tools=[], response_format={"type": "text"}, best_of=1)
    Chat(**HELLO, tool_choice="none", min_tokens=0, ignore_eos=False, chat_template_kwargs={})
    refused = {"tools": [{}], "echo": True, "best_of": 2, "response_format": {"type": "json_schema"}, "tool_choice": "required"}
    refused |= {"guided_json": {"type": "object"}, "chat_template_kwargs": {"enable_thinking": False}, "min_tokens": 5}
    for name, value in refused.items():
        with pytest.raises(ValidationError, match=f"{name}.* not supported"):
            Chat(**HELLO, **{name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"presence_penalty": False},
        {"temperature": "1"},
        {"max_tokens": True},
        {"stream_options": {"include_usage": 0}},
        {"logit_bias": {"3": True}},
    ],
)
def test_types_are_strict(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="valid (number|integer|boolean)"):
        Chat(**HELLO, **wrong)
    with pytest.raises(ValidationError):
        Completion(prompt=[[False]])
