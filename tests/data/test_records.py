"""Keys of records: the meaning that LLaMA-Factory, axolotl, OpenAI and TRL give them, compared with transformers' rendering."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from litgpt import prompts
from litgpt.data import DataModule
from litgpt.data.base import render
from litgpt.data.records import read_record
from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate
from litgpt.tokenizer import Tokenizer
from tests.helpers import tiny
from tests.helpers.tiny import put_bos_first

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
# a template of the usual form with tools, calls, reasoning and results
FULL = (
    "{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif -%}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif -%}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}{% endfor -%}"
    "{{ '<|im_end|>\n' }}{% endfor -%}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"
)


@dataclass
class Given(DataModule):
    entries: list[Any] = field(default_factory=list)

    def records(self) -> tuple[list[Any], list[Any]]:
        return self.entries, self.entries


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


def user(text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def reply(text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


Q, A = user("q"), reply("a")


@pytest.mark.parametrize(
    ("entry", "messages", "learned"),
    [
        ({"instruction": "q", "output": "a"}, [Q, A], "a"),
        ({"instruction": "q", "input": None, "output": "a"}, [Q, A], "a"),
        ({"instruction": "q", "input": "x", "output": "a"}, [user("q\n\nx"), A], "a"),
        ({"prompt": "q", "completion": "a"}, [Q, A], "a"),
        ({"prompt": "q", "response": "a"}, [Q, A], "a"),
        ({"question": "q", "answer": "a"}, [Q, A], "a"),
        ({"instruction": "q", "context": "x", "response": "a"}, [user("q\n\nx"), A], "a"),
        ({"instruction": "q", "output": "a", "system": "s"}, [system("s"), Q, A], "a"),
        ({"instruction": "q", "output": "a", "history": [["b", "c"]], "system": ""}, [user("b"), reply("c"), Q, A], "ca"),
        ({"prompt": [system("s"), user("b"), reply("c"), Q], "completion": [A]}, [system("s"), user("b"), reply("c"), Q, A], "a"),
        ({"messages": [Q, A]}, [Q, A], "a"),
        ({"messages": [{"role": "developer", "content": "s"}, Q, A]}, [system("s"), Q, A], "a"),
        ({"messages": [Q, A], "system": "s"}, [system("s"), Q, A], "a"),
        ({"messages": [Q, reply("c", weight=0), user("b"), reply("d", weight=1)]}, [Q, reply("c"), user("b"), reply("d")], "d"),
        ({"messages": [Q, reply("c", train=False), user("b"), reply("d", train=True)]}, [Q, reply("c"), user("b"), reply("d")], "d"),
        ({"messages": [Q, reply("c"), user("b"), reply("d", weight=0)]}, [Q, reply("c")], "c"),
        ({"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]), A]}, [user("qr"), A], "a"),
        ({"messages": [Q, reply("a", reasoning_content="why")]}, [Q, reply("a", reasoning_content="why")], "<think>why</think>a"),
        (
            {"messages": [Q, reply(None, tool_calls=CALLS), {"role": "tool", "content": "r"}, A], "tools": TOOLS},
            [Q, reply("", tool_calls=CALLS), {"role": "tool", "content": "r"}, A],
            '<call>f{"a": 1}</call>a',
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "r"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": json.dumps(TOOLS),
                "system": "s",
            },
            [system("s"), Q, reply("", tool_calls=CALLS), {"role": "tool", "content": "r"}, A],
            '<call>f{"a": 1}</call>a',
        ),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": "[]"}, [Q, A], "a"),
        # OpenAI's form: arguments are JSON text, which the template would write as a text within JSON
        (
            {"messages": [Q, reply(None, tool_calls=[{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}])]},
            [Q, reply("", tool_calls=CALLS)],
            '<call>f{"a": 1}</call>',
        ),
        # a table's cells: JSON, and nothing
        ({"messages": json.dumps([Q, A]), "weight": ""}, [Q, A], "a"),
        # a system message in the middle
        ({"messages": [Q, reply("c"), system("s"), user("b"), reply("d")]}, [Q, reply("c"), system("s"), user("b"), reply("d")], "cd"),
        # two calls in one text, as LLaMA-Factory has them, and arguments that are JSON text
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {
                        "from": "function_call",
                        "value": '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": "{\\"a\\": 1}"}]',
                    },
                ]
            },
            [Q, reply("", tool_calls=CALLS * 2)],
            '<call>f{"a": 1}</call>' * 2,
        ),
        # OpenAI's older names
        (
            {
                "messages": [
                    Q,
                    {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
                    {"role": "function", "name": "f", "content": "r"},
                    reply("a", function_call=None),
                ],
                "functions": [TOOLS[0]["function"]],
            },
            [Q, reply("", tool_calls=CALLS), {"role": "tool", "name": "f", "content": "r"}, A],
            '<call>f{"a": 1}</call>a',
        ),
        ({"messages": [Q, A], "tools": [json.dumps(TOOLS[0])]}, [Q, A], "a"),
        ({"messages": [Q, reply("c", training=False), user("b"), reply("d", training=True)]}, [Q, reply("c"), user("b"), reply("d")], "d"),
        ({"messages": [Q, reply("c", loss=False), user("b"), reply("d", loss="true")]}, [Q, reply("c"), user("b"), reply("d")], "d"),
        ({"messages": [Q, reply("c", loss=True, weight=0), user("b"), reply("d")]}, [Q, reply("c"), user("b"), reply("d")], "d"),
        ({"messages": [Q, reply("c", train="False"), user("b"), reply("d", train="true")]}, [Q, reply("c"), user("b"), reply("d")], "d"),
        ({"messages": None, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q, A], "a"),
        ({"messages": "", "chosen": "", "rejected": "", "instruction": None, "output": None, "question": "q", "answer": "a"}, [Q, A], "a"),
        ({"input": "q", "output": "a"}, [Q, A], "a"),
        # LLaMA-Factory joins those of "instruction" and "input" that are there
        ({"instruction": "", "input": "q", "output": "a"}, [Q, A], "a"),
        ({"instruction": None, "context": "q", "response": "a"}, [Q, A], "a"),
        # columns of a table that this row does not use
        ({"messages": [{**Q, "weight": None, "tool_calls": None}, A], "conversations": None, "tools": None}, [Q, A], "a"),
    ],
)
def test_keys_are_read_as_transformers_reads_them(
    entry: dict[str, Any], messages: list[Any], learned: str, tokenizer: Tokenizer, tiny_tokenizer_dir: Path
) -> None:
    splits = Given(mask_prompt=True, strict=True, entries=[entry]).splits(tokenizer, ChatTemplate(FULL))
    sample = splits.train[0]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer_dir / "tokenizer.json"))
    tools = TOOLS if entry.get("functions") or entry.get("tools") not in (None, "[]") else None
    expected = reference.apply_chat_template(messages, tools=tools, chat_template=FULL, tokenize=False)
    assert tokenizer.decode(list(sample.input_ids), skip_special_tokens=False) == expected.rstrip()
    marked = tokenizer.decode([i for i, m in zip(sample.input_ids, sample.loss_mask, strict=True) if m], skip_special_tokens=False)
    assert marked.replace("<|im_end|>", "") == learned


@pytest.mark.parametrize(
    "given", [{"reasoning_content": "why"}, {"thinking": "why"}, {"reasoning": "why"}, {"reasoning": "x", "thinking": "why"}]
)
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_under_any_of_its_names(given: dict[str, str], read: str, tokenizer: Tokenizer, tiny_tokenizer_dir: Path) -> None:
    template = FULL.replace("m.reasoning_content", f"m.{read}")
    messages = [Q, reply("a", **given), user("b"), reply("c", **given)]
    sample = Given(strict=True, entries=[{"messages": messages}]).splits(tokenizer, ChatTemplate(template)).train[0]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer_dir / "tokenizer.json"))
    both = {"reasoning_content": "why", "thinking": "why"}  # as transformers itself has it from 5.21 on
    named = [{**message, **both} if message["role"] == "assistant" else message for message in messages]
    expected = reference.apply_chat_template(named, chat_template=template, tokenize=False)
    assert "<think>why</think>a" in expected
    assert tokenizer.decode(list(sample.input_ids), skip_special_tokens=False) == expected.rstrip()
    assert ChatTemplate(template).render(messages) == expected


SMOLLM2 = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nI am a task<|im_end|>\n' }}{% endif %}"
QWEN = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nI am a task<|im_end|>\n' }}{% endif %}"  # fails without messages


@pytest.mark.parametrize("template", [FULL.replace(" %}{{ '<|im_start|>' +", f" %}}{SMOLLM2}{{{{ '<|im_start|>' +"), QWEN + FULL])
def test_a_conversation_that_the_assistant_begins(template: str, tokenizer: Tokenizer, tiny_tokenizer_dir: Path) -> None:
    """Templates that write a system text of their own, as transformers renders them; the text has the words of the reply."""
    messages = [reply("a task"), user("b"), reply("c")]
    turns = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in messages]
    sample = Given(entries=[{"conversations": turns}]).splits(tokenizer, ChatTemplate(template)).train[0]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer_dir / "tokenizer.json"))
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert "system\nI am a task" in expected
    assert tokenizer.decode(list(sample.input_ids), skip_special_tokens=False) == expected.rstrip()
    marked = tokenizer.decode([i for i, m in zip(sample.input_ids, sample.loss_mask, strict=True) if m], skip_special_tokens=False)
    assert marked == "a task<|im_end|>c<|im_end|>"


@pytest.mark.parametrize(("arguments", "text"), [('{"a":1}', '{"a":1}'), ({"a": "ä"}, '{"a": "ä"}')])
def test_arguments_of_calls_for_a_template_that_takes_texts(arguments: Any, text: str, tokenizer: Tokenizer) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    taking = FULL.replace("call.function.arguments | tojson", "('' + call.function.arguments)")
    assert f"<call>f{text}</call>" in ChatTemplate(taking).render([Q, reply("", tool_calls=calls)])


def test_a_template_that_ends_a_conversation_with_eos(tokenizer: Tokenizer, tiny_tokenizer_dir: Path) -> None:
    """Phi-3's: EOS follows the last message only."""
    template = FULL.replace("{%- if add_generation_prompt %}", "{%- if not add_generation_prompt %}{{ eos_token }}{% else %}")
    messages = [Q, reply("a"), user("b"), reply("c")]
    sample = Given(entries=[{"messages": messages}]).splits(tokenizer, ChatTemplate(template, eos_token="<|im_end|>")).train[0]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer_dir / "tokenizer.json"), eos_token="<|im_end|>")
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert tokenizer.decode(list(sample.input_ids), skip_special_tokens=False) == expected
    marked = tokenizer.decode([i for i, m in zip(sample.input_ids, sample.loss_mask, strict=True) if m], skip_special_tokens=False)
    assert marked == "a<|im_end|>c<|im_end|>\n<|im_end|>"


def test_each_reply_learns_the_end_that_the_model_writes(tokenizer: Tokenizer) -> None:
    """gpt-oss's: EOS ends the last reply, and another token the earlier ones, which the model reads and does not write."""
    style = ChatTemplate(tiny.CHANNELS, eos_token="<|im_end|>")
    messages = [Q, reply("a"), user("b"), reply("c"), user("d"), reply("e")]
    splits = Given(entries=[{"messages": messages}]).splits(tokenizer, style)
    for end, sample in zip((2, 4, 6), splits.train, strict=True):
        assert tokenizer.decode(list(sample.input_ids), skip_special_tokens=False) == style.render(messages[:end])
        marked = tokenizer.decode([i for i, m in zip(sample.input_ids, sample.loss_mask, strict=True) if m], skip_special_tokens=False)
        assert marked == f"<|endoftext|>final<|im_start|>{messages[end - 1]['content']}<|im_end|>"


def test_messages_that_a_style_leaves_out_are_named(tokenizer: Tokenizer) -> None:
    pair = {"instruction": "q", "output": "a", "system": "Be very brief."}
    deaf = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.content | upper }}]{% endif %}{% endfor %}"
    turns = [system("S"), Q, reply("b"), {"role": "tool", "content": '{"found": "words"}'}, A]
    for style, entry, kinds in (
        (prompts.PromptStyle.from_name("phi-2"), pair, "system messages (2)"),
        (ChatTemplate(deaf), {"messages": turns}, "system messages (2), tool messages (2)"),
        (prompts.PromptStyle.from_name("llama2"), pair, ""),
        (ChatTemplate(FULL), {"messages": turns}, ""),
    ):
        report = Given(entries=[entry]).splits(tokenizer, style).report
        assert (f"keys not written by the prompt style '{style.name}': {kinds}" in report) if kinds else "not written" not in report
    with pytest.raises(UserError, match="system messages"):
        Given(strict=True, entries=[pair]).splits(tokenizer, prompts.PromptStyle.from_name("phi-2"))


@pytest.mark.parametrize(
    ("keys", "label", "reward"),
    [
        ({"label": "True", "reward": "0.25"}, True, 0.25),
        ({"label": "false", "correct": "TRUE"}, False, 1.0),
        ({"label": "yes", "reward": "nan"}, None, None),
        ({"label": "", "reward": "", "correct": ""}, None, None),
    ],
)
def test_flags_and_numbers_of_a_table_are_texts(keys: dict[str, str], label: bool | None, reward: float | None) -> None:
    record = read_record({"prompt": "q", "completion": "a", **keys})
    assert (record.label, record.reward) == (label, reward)


@pytest.mark.parametrize(("label", "answer"), [("spam", "spam"), (3, "3"), (0.5, "0.5"), (False, "false"), ("True", "True")])
def test_a_text_and_its_class(label: Any, answer: str) -> None:
    """A class is an answer, also if it is true or false: it does not say whether an answer is a good one."""
    record = read_record({"text": "Win a prize!", "Label": label, "id": 7})
    assert [message["content"] for message in record.messages] == ["Win a prize!", answer] and record.learned == [0.0, 1.0]
    assert record.is_single and not record.is_text and record.label is None and record.unread == ("id",)


def test_a_text_and_its_class_are_read_where_nothing_else_is() -> None:
    """A question and its answer come first, and a text beside two answers is no prompt."""
    rest = {"text": "whole", "label": "spam"}
    for keys in (("question", "answer"), ("input", "output")):
        record = read_record({**dict(zip(keys, "qa", strict=True)), **rest})
        assert [message["content"] for message in record.messages] == ["q", "a"] and set(record.unread) == {"text", "label"}
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in "ab"]
    assert "text" in read_record({"text": "whole", "chosen": turns[0], "rejected": turns[1]}).unread
    with pytest.raises(UserError, match="no 'prompt'"):
        read_record({"text": "whole", "chosen": "a", "rejected": "b"})


def test_last_turn_only(tokenizer: Tokenizer) -> None:
    entry = {"messages": [Q, reply("c"), user("b"), A]}
    sample = Given(last_turn_only=True, entries=[entry]).splits(tokenizer, prompts.ChatML()).train[0]
    assert tokenizer.decode([i for i, m in zip(sample.input_ids, sample.loss_mask, strict=True) if m], False) == "a<|im_end|>"


@pytest.mark.parametrize("last_turn_only", [False, True])
def test_replies_that_a_template_rewrites_later_are_learned_one_by_one(tokenizer: Tokenizer, last_turn_only: bool) -> None:
    """As Qwen3's template does, which drops earlier reasoning: each reply is learned behind what the model reads when it answers."""
    thinking = FULL.replace("{{ m.content }}", "{{ m.content if not loop.last or m.role == 'user' else 'E' + m.content }}")
    style = ChatTemplate(thinking)
    entries = [{"messages": [Q, reply("c"), user("b"), A, user("d")], "unknown": 1}, {"messages": [Q, A]}]
    splits = Given(last_turn_only=last_turn_only, entries=entries, val_split_fraction=0).splits(tokenizer, style)
    expected = []
    for turns in [entries[0]["messages"][:2]] * (not last_turn_only) + [entries[0]["messages"][:4], entries[1]["messages"]]:
        prompt = style.render(turns[:-1], add_generation_prompt=True)
        expected.append((prompt, style.render(turns).rstrip().removeprefix(prompt)))
    found = []
    for sample in splits.train:
        first = sample.loss_mask.index(1)
        found.append((tokenizer.decode(list(sample.input_ids[:first]), False), tokenizer.decode(list(sample.input_ids[first:]), False)))
    assert found == expected
    assert ("2 conversations trained reply by reply" in splits.report) is not last_turn_only  # the same are validated
    assert "unknown (2)" in splits.report


def test_texts_are_learned_as_they_are(tiny_tokenizer_dir: Path, write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> None:
    """As TRL reads the key: the tokenizer's own ids, BOS included, and EOS behind them; every token but the first has loss."""
    text = "User: q\n\nAssistant: a "
    for folder in (tiny_tokenizer_dir, put_bos_first(write_tiny_tokenizer(tmp_path / "bos"))):
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        own = Tokenizer(folder)
        for style in (ChatTemplate(FULL), prompts.Alpaca(), prompts.ChatML()):
            for mask_prompt in (False, True):
                entry = {"text": text, "source": "web", "weight": 2}
                splits = Given(entries=[entry], mask_prompt=mask_prompt).splits(own, style)
                sample = splits.train[0]
                assert list(sample.input_ids) == [*theirs(text).input_ids, own.eos_id]
                assert list(sample.loss_mask) == [0, *[1] * (len(sample.input_ids) - 1)] and set(sample.weights or ()) == {0, 2}
                assert "keys not read: source (2)" in splits.report
    assert not read_record({"text": "t", "instruction": "q", "output": "a"}).is_text


def test_other_keys_are_named_with_their_counts(tokenizer: Tokenizer) -> None:
    entries = [
        {"instruction": "q", "output": "a", "id": 1, "url\x1b[2J": ""},
        {"instruction": "q", "output": "a", "id": 2, "source": None},
        {"messages": [user("q", train=True), reply("a", score=3, loss=2.5, tool_calls=CALLS)], "tools": TOOLS},
        {"messages": [Q, reply("", tool_calls=CALLS)]},
    ]
    splits = Given(entries=entries).splits(tokenizer, prompts.ChatML())
    for part in (
        "keys not read: id (4), url\x1b[2J (2), messages.train of user turns (2), messages.score (2), messages.loss (2)",
        "keys not written by the prompt style 'chatml': tool_calls (4), tools (2)",
        "2 dropped: empty answer",  # a call that is not written is no answer
    ):
        assert part in splits.report
    for entry, key in ((entries[0], "id"), (entries[2], "tool_calls")):
        with pytest.raises(UserError, match=f"{key} .*Remove these keys, or leave data.strict out"):
            Given(strict=True, entries=[entry]).splits(tokenizer, prompts.ChatML())
    many = Given(entries=[{"instruction": "q", "output": "a", **{f"k{i}": 1 for i in range(50)}}]).splits(tokenizer, prompts.ChatML())
    assert "k11 (2) and 38 more" in many.report


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": [Q, reply("a", weight=-0.5)]}, "turn 2 of 'messages': 'weight' is -0.5: a number from 0 .* is needed"),
        ({"instruction": "q", "output": "a", "weight": "high"}, "'weight' is 'high': a number"),
        ({"instruction": "q", "output": "a", "weight": float("nan")}, "'weight' is nan: a number"),
        ({"instruction": "q", "output": "a", "weight": [1]}, "'weight' is \\[1\\]: a number"),
        ({"messages": [Q, reply("a", train="no")]}, "'train' is 'no'"),
        ({"messages": [Q, reply("a", tool_calls="f")]}, "turn 2 of 'messages': 'tool_calls' is a text, a list is needed"),
        ({"messages": [Q, reply("a", reasoning_content=[3])]}, "'reasoning_content' is a list"),
        ({"messages": [Q, reply(None)]}, "'content' is null"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}]), A]}, "part 1 of 'content' is of the type 'image_url'"),
        ({"messages": [system("s"), Q, A], "system": "t"}, "'system' differs from the system message"),
        ({"instruction": "q", "output": "a", "tools": "[f()]"}, "'tools', line 1, column 2: not valid JSON"),
        ({"instruction": "q", "output": "a", "tools": {"a": 1}}, "'tools' is an object, a list is needed"),
        ({"instruction": "q", "output": "a", "history": [["b"]]}, "entry 1 of 'history' is \\['b'\\], a list of a question"),
        ({"instruction": "q", "output": "a", "history": [["b", None]]}, "'history, entry 1' is null"),
        ({"instruction": "q", "output": "a", "input": "b", "context": "c"}, "both 'input' and 'context'"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "[1]"}]},
            "entry 1 is a number, an object is needed",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]}, "entry 1 is a text, an object"),
        ({"instruction": "q", "output": "a", "tools": ["f"]}, "'tools', entry 1 is a text, an object is needed"),
        ({"messages": [Q, reply("a", tool_calls=[1])]}, "'tool_calls', entry 1 is a number, an object is needed"),
        ({"prompt": [Q], "completion": [user("b")]}, "'completion' has no turn of the assistant"),
        ({"text": [3]}, "'text' is a list, a text is needed"),
        ({"text": "t", "system": "s"}, "'system' and 'text', which is learned as it is: write all of it in 'text'"),
    ],
)
def test_wrong_values(entry: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"Given, record 1: .*{message}"):
        Given(entries=[entry]).splits(tokenizer, ChatTemplate(FULL))


def test_roles_that_a_style_has_no_form_for(tokenizer: Tokenizer) -> None:
    entry = {"messages": [Q, reply("b"), {"role": "tool", "content": "r"}, A]}
    with pytest.raises(UserError, match="'chatml' has no form for the role 'tool': choose data.prompt_style"):
        Given(entries=[entry]).splits(tokenizer, prompts.ChatML())


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BACKWARDS = "{% for m in messages[::-1] %}{% endfor %}" + FULL + "{% for m in messages %}{% endfor %}"


@pytest.mark.parametrize("style", [FULL, MISTRAL, MACRO, BACKWARDS, "chatml", "llama2", "gemma", "tinyllama"])
def test_spans_of_a_conversation_are_those_of_its_prefixes(style: str, tokenizer: Tokenizer) -> None:
    """The oracle renders the conversation up to each reply, with and without it."""
    chosen: Any = ChatTemplate(style) if "{" in style else prompts.PromptStyle.from_name(style)
    messages = [
        user("q0"),
        reply(" r0 "),
        user("q1"),
        reply("r1"),
        reply("r2"),
        *(m for i in range(9) for m in (user(f"u{i}"), reply(f"v{i}\n"))),
    ]
    text, spans = render(read_record({"messages": messages}), chosen, tokenizer)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    starts = [len(chosen.render(messages[:i], add_generation_prompt=True)) for i in replies]
    ends = [len(chosen.render(messages[: i + 1]).rstrip()) for i in replies]
    assert spans == list(zip(starts, ends, strict=True))
    assert text == chosen.render(messages)[: ends[-1]]


def test_a_change_in_the_middle_of_history_is_noticed(tokenizer: Tokenizer) -> None:
    stripping = FULL.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    messages = [message for i in range(6) for message in (user(f"q{i}"), reply("<think>x</think>a" if i == 3 else f"a{i}"))]
    with pytest.raises(UserError, match="writes message 8 differently"):
        render(read_record({"messages": messages}), ChatTemplate(stripping), tokenizer)


@pytest.mark.parametrize("unwritten", [{}, {"reasoning_content": "why"}])
def test_long_conversations_cost_their_length(tokenizer: Tokenizer, unwritten: dict[str, str]) -> None:
    """Work, not time, is compared: characters that the template writes. A generous bound on time catches what is not counted."""
    written: list[int] = []

    class Counted(ChatTemplate):
        def render_marked(self, *args: Any, **kwargs: Any) -> tuple[str, list[int]]:
            text, starts = super().render_marked(*args, **kwargs)
            written.append(len(text))
            return text, starts

    Counted.__module__ = ChatTemplate.__module__
    style = Counted(FULL.replace("reasoning_content", "absent"))
    record = read_record({"messages": [m for i in range(200) for m in (user(f"t{i}"), reply(f"u{i}") | unwritten)]})
    before = time.process_time()
    text, spans = render(record, style, tokenizer)
    assert time.process_time() - before < 0.5
    assert len(spans) == 200 and sum(written) < 3 * len(text)


def test_prompt_style_that_does_not_fit_the_tokenizer(
    write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def report(style: Any, tokenizer: Tokenizer) -> str:
        return Given(entries=[{"instruction": "q", "output": "a"}]).splits(tokenizer, style).report

    assert "warning: the prompt style 'llama3' needs <|eot_id|>, which is not a token of this tokenizer: 'chat' fits it" in report(
        prompts.Llama3(), tokenizer
    )
    for style in (prompts.ChatML(), prompts.Alpaca(), ChatTemplate(FULL)):
        assert "warning" not in report(style, tokenizer)
    assert "needs <|answer|>" in report(prompts.H2Oai(), tokenizer)
    assert "the prompt style 'chat' needs <|done|>" in report(ChatTemplate(FULL.replace("<|im_end|>", "<|done|>")), tokenizer)
    folder = write_tiny_tokenizer(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "'chatml' fits it" in report(prompts.Gemma(), Tokenizer(folder))


CHOSEN, REJECTED = reply("good"), reply("bad")


@pytest.mark.parametrize(
    ("entry", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, [Q, CHOSEN], [Q, REJECTED]),
        ({"prompt": "q", "chosen": "good", "rejected": "bad", "system": "s"}, [system("s"), Q, CHOSEN], [system("s"), Q, REJECTED]),
        # Intel's and LLaMA-Factory's keys, beside answers of other keys
        (
            {"question": "q", "chosen": "good", "rejected": "bad", "system": "s", "prompt": None},
            [system("s"), Q, CHOSEN],
            [system("s"), Q, REJECTED],
        ),
        ({"instruction": "q", "chosen": "good", "rejected": "bad"}, [Q, CHOSEN], [Q, REJECTED]),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            [Q, CHOSEN],
            [Q, REJECTED],
        ),
        # OpenAI's
        ({"input": {"messages": [Q]}, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]}, [Q, CHOSEN], [Q, REJECTED]),
        ({"prompt": [system("s"), Q], "chosen": [CHOSEN], "rejected": [REJECTED]}, [system("s"), Q, CHOSEN], [system("s"), Q, REJECTED]),
        ({"chosen": [Q, CHOSEN], "rejected": [Q, REJECTED]}, [Q, CHOSEN], [Q, REJECTED]),
        ({"prompt": "q", "messages": [Q, CHOSEN], "chosen": [Q, CHOSEN], "rejected": [Q, REJECTED]}, [Q, CHOSEN], [Q, REJECTED]),
        (
            {"chosen": [Q, A, user("r"), CHOSEN], "rejected": [Q, A, user("r"), A, Q, A]},
            [Q, A, user("r"), CHOSEN],
            [Q, A, user("r"), A, Q, A],
        ),
    ],
)
def test_preferences(entry: dict[str, Any], chosen: list[Any], rejected: list[Any]) -> None:
    record = read_record({**entry, "score_chosen": 3})
    assert record.rejected is not None
    assert (record.messages, record.rejected.messages) == (chosen, rejected)
    assert (record.label, record.rejected.label) == (True, False)
    assert record.learned[-1] == record.rejected.learned[-1] == 1 and not any(record.learned[:-1]) and record.unread == ("score_chosen",)


def test_answers_under_other_keys_do_not_replace_the_preferred_ones(tokenizer: Tokenizer) -> None:
    entry = {"prompt": "q", "chosen": "good", "rejected": "bad", "instruction": "r", "output": "c", "response": "d"}
    record = read_record(entry)
    assert record.rejected is not None and (record.reply, record.rejected.reply) == ("good", "bad")
    assert record.unread == ("instruction", "output", "response")
    assert (
        "keys not read: instruction (2), output (2), response (2), rejected (2)"
        in Given(entries=[entry]).splits(tokenizer, prompts.ChatML()).report
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"input": [Q], "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]}, "'input' is a list, an object is needed"),
        ({"chosen": "good", "rejected": "bad"}, "'chosen' and 'rejected' but no 'prompt'"),
        ({"prompt": "q", "chosen": "good", "rejected": [REJECTED]}, "must all be texts, or all lists"),
        ({"prompt": [Q], "chosen": "good", "rejected": "bad"}, "must all be texts, or all lists"),
        ({"prompt": [Q], "chosen": [], "rejected": [REJECTED]}, "'chosen' is empty"),
        ({"chosen": [Q, CHOSEN], "rejected": [user("r"), REJECTED]}, "begin with different messages"),
        ({"chosen": [CHOSEN], "rejected": [REJECTED]}, "begin with different messages"),
        ({"prompt": [Q], "chosen": [user("r")], "rejected": [REJECTED]}, "no turn of the assistant"),
    ],
)
def test_preferences_that_cannot_be_read(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_record(entry)


def chatgpt(*messages: Any, **keys: Any) -> dict[str, Any]:
    """A conversation of ChatGPT's export: the root without a message, and each message (role, parts, other keys) below the one before."""
    mapping: dict[str, Any] = {"n0": {"id": "n0", "message": None, "parent": None, "children": ["n1"]}}
    for n, (role, parts, *more) in enumerate(messages, 1):
        content = {"content_type": "text", "parts": parts}
        message = {"author": {"role": role, "name": None}, "content": content, "recipient": "all", "metadata": {}}
        mapping[f"n{n}"] = {"id": f"n{n}", "message": message | dict(*more), "parent": f"n{n - 1}", "children": [f"n{n + 1}"]}
    return {"title": "Talk", "create_time": 1.5, "mapping": mapping, "current_node": f"n{len(messages)}", "is_archived": False, **keys}


ASKED, REPLIED = ("user", ["q"]), ("assistant", ["a"])
PICTURE = {"content_type": "multimodal_text", "parts": [{"content_type": "image_asset_pointer", "width": 2}, "What is this?"]}
SPOKEN = {"content_type": "multimodal_text", "parts": [{"content_type": "audio_transcription", "text": "q"}, {"content_type": "audio"}]}


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([("system", [""]), ASKED, REPLIED], [Q, A]),
        (
            [("system", ["s"]), ASKED, REPLIED, ("system", ["later"]), ("user", ["r"]), ("assistant", ["b"])],
            [system("s"), Q, A, user("r"), reply("b")],
        ),
        ([ASKED, ("assistant", ["f()"], {"recipient": "python"}), ("tool", ["3"]), REPLIED], [Q, A]),
        ([ASKED, ("assistant", None, {"content": {"content_type": "thoughts", "thoughts": [{"content": "x"}]}}), REPLIED], [Q, A]),
        ([("user", None, {"content": {"content_type": "user_editable_context", "user_profile": "x"}}), ASKED, REPLIED], [Q, A]),
        ([ASKED, ("assistant", ["Let me see."]), ("tool", ["3"]), ("assistant", ["", "a"])], [Q, reply("Let me see.\n\na")]),
        ([ASKED, REPLIED, ("user", None, {"content": PICTURE}), ("assistant", ["A cat."])], [Q, A]),
        ([ASKED, REPLIED, ("user", ["Sum it up"], {"metadata": {"attachments": [{"name": "a.pdf"}]}}), ("assistant", ["b"])], [Q, A]),
        ([("user", None, {"content": SPOKEN}), REPLIED], [Q, A]),
        ([ASKED, REPLIED, ("user", ["unanswered"])], [Q, A]),
        (
            [ASKED, ("assistant", ['By \ue200entity\ue202["people","Ann Lee",0]\ue201 \ue200cite\ue202turn0search1\ue201'])],
            [Q, reply("By Ann Lee")],
        ),
        ([ASKED], [reply("")]),
        ([("user", None, {"content": PICTURE}), ("assistant", ["A cat."])], [reply("")]),
        ([], [reply("")]),
    ],
)
def test_conversations_of_chatgpt(messages: list[Any], turns: list[dict[str, Any]]) -> None:
    record = read_record(chatgpt(*messages))
    assert record.messages == turns and record.unread == ()
    assert record.learned == [float(turn["role"] == "assistant") for turn in turns] and record.has_answer is (turns != [reply("")])


def test_the_current_branch_of_a_conversation_of_chatgpt() -> None:
    entry = chatgpt(ASKED, ("assistant", ["first"]), REPLIED)
    entry["mapping"]["n3"]["parent"] = "n1"  # a reply that was asked for again
    assert read_record(entry).messages == [Q, A]
    assert read_record({**entry, "current_node": "n2"}).messages == [Q, reply("first")]
    for lost in (None, "gone", [1]):
        assert read_record({**entry, "current_node": lost}).messages == [Q, A]
    entry["mapping"]["n1"]["parent"] = "n3"  # a circle
    assert read_record(entry).messages == [Q, A]


@pytest.mark.parametrize(
    "node", [None, 3, {"message": "x"}, {"message": {"content": [], "author": "x"}}, {"message": {"content": {"parts": [{}, 1]}}}]
)
def test_broken_nodes_of_chatgpt_are_left_out(node: Any) -> None:
    assert read_record(chatgpt(ASKED, REPLIED) | {"mapping": {"x": node}}).messages == [reply("")]
