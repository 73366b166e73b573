"""Records of the usual forms as conversations: the keys that are read, and their meaning.

{"instruction", "input" or "context", "output" or "response", "system", "history", "tools"}
{"prompt", "completion", "response" or "answer"}, {"question", "answer"}, {"input", "output"}     each a text, or both lists of messages
{"text", "label"}: a text and its class, which is the answer
{"text"}: running text, or a conversation with the marks of its template; all of it is learned unchanged
{"messages": [{"role", "content", "weight" or "train" ..., "tool_calls", "reasoning_content", ...}], "system", "tools"}
{"conversations": [{"from", "value", ...}], "system", "tools"}
{"prompt", "instruction" or "question", "chosen", "rejected"}, each a text, or all lists of messages; without a list "prompt" the prompt is
    what both lists begin with, or the conversation that "chosen" and "rejected", one message each, continue (LLaMA-Factory)
{"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}, lists of messages (OpenAI)
{"mapping", "current_node", ...}: a conversation of ChatGPT's export, with the last version of each message

The older names of "tools" and "tool_calls", "functions" and "function_call", are read too. A record's own keys may have capitals, and a
number may stand for a text.

An answer may have a "reward" (a number) or be "correct" (true or false).
A record may have a "weight", and so may each turn of the assistant: a factor on the loss of its tokens, 1 by default. A record with one
reply to learn may have "token_weights", a list with a factor for each token of the reply.
"""

import difflib
import math
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from litgpt.errors import UserError
from litgpt.files import parse_json
from litgpt.prompts import REASONING, with_input

Message = dict[str, Any]  # as chat templates read it: "role", "content" and perhaps keys of PASSED

# keys of question and answer; the first pair that a record has counts
PAIRS: tuple[tuple[str, str], ...] = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
PAIRS += (("instruction", "response"), ("prompt", "answer"))
ALONE, CLASS = ("input", "output"), ("text", "label")  # read if no other key holds a question
# key of a conversation -> keys of a turn's role and text
CONVERSATIONS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool"}
PASSED = ("tool_calls", *REASONING, "name", "tool_call_id")  # keys of a message that templates may write
WEIGHTS, FLAGS = ("weight", "train"), ("training", "loss")  # of a turn; the flags are axolotl's and ms-swift's
TEXTS = ("text", "input_text", "output_text")  # types of the parts of a content
KEYS = {*ALONE, *(key for pair in PAIRS for key in pair), *CONVERSATIONS, "system", "history", "context", "tools", "functions", "text"}
KEYS |= {"chosen", "rejected", "weight", "token_weights", "label", "reward", "correct"}  # of a record
TURNS = '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
MOST_WEIGHT = 1_000_000
MOST_NUMBER = 10**20  # below which a number may stand for a text
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
REFERENCE = re.compile('\ue200(?:entity\ue202\\["[^"]*", *"([^"]*)")?[^\ue201]*\ue201')  # ChatGPT's link to a source, or a name with one


@dataclass(slots=True)
class Record:
    """A conversation. `learned[i]` is the weight of message i in the loss: 0 unless it is a reply to learn."""

    messages: list[Message]
    learned: list[float]
    tools: list[Any] | None = None
    pair: bool = False  # one question and its answer: without `mask_prompt` the question is learned as well, with the same weight
    input: str = ""  # of a pair: text after the question, which some prompt styles write in a place of its own
    rejected: "Record | None" = None  # the same prompt with an answer that is worse than this one's
    label: bool | None = None  # whether the answer is a good one, if the record says so
    reward: float | None = None  # of the answer: "reward", or 1 and 0 for "correct" true and false
    token_weights: list[float] | None = None  # of the tokens of the one reply that is learned
    is_text: bool = False  # running text in the one message
    unread: tuple[str, ...] = ()  # keys that mean nothing here

    @property
    def last(self) -> int:
        """The index of the last learned reply; of the last reply if none is learned."""
        return max(range(len(self.messages)), key=lambda i: (self.learned[i] > 0, self.messages[i]["role"] == "assistant", i))

    @property
    def reply(self) -> str:
        """The text of the last reply."""
        return str(self.messages[self.last]["content"])

    @property
    def has_answer(self) -> bool:
        """True if there is something to learn."""
        return any(map(has_text, self.replies))

    @property
    def is_wrong(self) -> bool:
        """True if the record says that its answer is not a good one."""
        return self.label is False or self.reward == 0

    @property
    def replies(self) -> list[Message]:
        """The replies to learn."""
        return [message for message, weight in zip(self.messages, self.learned, strict=True) if weight]

    @property
    def characters(self) -> int:
        """The length of its texts."""
        return sum(len(str(message["content"])) for message in self.messages) + len(self.input)

    @property
    def learned_characters(self) -> int:
        """The length of the replies to learn."""
        return sum(len(str(message["content"])) for message in self.replies)

    @property
    def is_single(self) -> bool:
        """True for one question and its answer, perhaps after a system text, and nothing else."""
        roles = [message["role"] for message in self.messages if message["role"] != "system"]
        rates = (self.rejected, self.label, self.reward, self.token_weights) != (None,) * 4
        return (
            roles == ["user", "assistant"] == [message["role"] for message in self.messages[-2:]]
            and not (rates or self.tools)
            and self.has_answer
        )

    @property
    def parts(self) -> list["Record"]:
        """The conversation up to each reply to learn, which alone is learned of it."""
        ends = [i for i, weight in enumerate(self.learned, 1) if weight]
        weights = [[0.0] * (end - 1) + [self.learned[end - 1]] for end in ends]
        unread = [()] * (len(ends) - 1) + [self.unread]  # of one record
        return [replace(self, messages=self.messages[:e], learned=w, unread=u) for e, w, u in zip(ends, weights, unread, strict=True)]

    @property
    def turns(self) -> list[Message]:
        """The messages of a conversation; a pair's input follows its question."""
        if not self.input:
            return self.messages
        *before, question, answer = self.messages
        return [*before, {**question, "content": with_input(question["content"], self.input)}, answer]

    @property
    def question(self) -> str:
        """The question of a pair."""
        return str(self.messages[-2]["content"])


def has_text(message: Message, unwritten: Collection[str] = ()) -> bool:
    """Return True if a reply has text, reasoning or tool calls, apart from keys that are not written."""
    return any(str(message.get(key) or "").strip() for key in ("content", *REASONING, "tool_calls") if key not in unwritten)


def read_record(entry: Any) -> Record:
    """Return an entry of a data file as a conversation. Raise UserError if it has no known form, or a value of the wrong kind."""
    if not isinstance(entry, dict):
        raise UserError(f"{kind_of(entry)}, an object with keys is needed, such as {TURNS}")
    if not entry.keys() <= KEYS:
        named = {known_key(key): value for key, value in entry.items()}
        if len(named) < len(entry):
            name = next(name for name in named if sum(known_key(key) == name for key in entry) > 1)
            same = " and ".join(repr(key)[:60] for key in entry if known_key(key) == name)
            raise UserError(f"its keys {same} differ in capitals or spaces only: leave one of them out")
        entry = named
    if "preferred_output" in entry and "non_preferred_output" in entry:  # OpenAI's keys, for TRL's
        asked = dict(_typed(entry.get("input"), "'input'", dict))
        renamed = {"prompt": asked.pop("messages", None), "chosen": entry["preferred_output"], "rejected": entry["non_preferred_output"]}
        others = {key: value for key, value in entry.items() if key not in ("input", "preferred_output", "non_preferred_output")}
        entry = others | asked | renamed
    answers = [entry.get(key) for key in ("chosen", "rejected")]
    if None not in answers and answers != ["", ""]:  # two empty cells of a table
        return _read_preference(entry)
    filled = [key for key, value in entry.items() if value not in (None, "")]
    tried = ((filled, PAIRS), (entry, (*PAIRS, ALONE, CLASS)))
    pair = next((pair for keys, pairs in tried for pair in pairs if all(key in keys for key in pair)), None)
    form = next((key for key in CONVERSATIONS if key in filled), None)
    if form is None and pair is None:
        form = next((key for key in CONVERSATIONS if key in entry), None)
    if form is not None:
        used, record = [form], _read_turns(entry, form)
    elif pair is not None:
        if pair == CLASS and isinstance(entry["label"], bool):
            entry = {**entry, "label": str(entry["label"]).lower()}
        used, record = _read_pair(entry, pair)
    elif "text" in entry:
        if unfit := [key for key in ("system", "tools", "functions") if entry.get(key)]:
            raise UserError(f"it has {unfit[0]!r} and 'text', which is learned as it is: write all of it in 'text'")
        message = {"role": "assistant", "content": _check_text(entry["text"], "text")}
        used, record = ["text"], Record([message], [1.0], is_text=True)
    elif isinstance(entry.get("mapping"), dict):
        used, record = list(entry), _read_turns({"messages": _messages_of_chatgpt(entry)}, "messages")
    else:
        raise UserError(_missing_keys(entry))
    if system := _optional_text(entry, "system"):
        if record.messages[0]["role"] != "system":
            record.messages.insert(0, {"role": "system", "content": system})
            record.learned.insert(0, 0.0)
        elif record.messages[0]["content"] != system:
            raise UserError("'system' differs from the system message of its conversation: leave one of them out")
    tools = _objects(entry.get("tools") or [], "'tools'") or _of_functions(_objects(entry.get("functions") or [], "'functions'"))
    record.tools = tools or None
    record.pair &= record.tools is None
    if entry.get("weight") not in (None, ""):  # an empty cell of a table
        weight = _read_weight(entry["weight"], "'weight'")
        record.learned = [weight * each for each in record.learned]
    if entry.get("token_weights") not in (None, ""):
        if sum(map(bool, record.learned)) > 1:
            raise UserError("'token_weights' belong to one reply: give the other turns the weight 0")
        given = _typed(entry["token_weights"], "'token_weights'", list)
        record.token_weights = [_read_weight(value, f"number {n} of 'token_weights'") for n, value in enumerate(given, 1)]
        record.learned = [each * any(record.token_weights or [1]) for each in record.learned]
    read = (*used, "system", "tools", "functions", "weight", "token_weights")
    empty = [key for key in ("chosen", "rejected", *CONVERSATIONS) if entry.get(key) == ""]
    unread = [key for key, value in entry.items() if value is not None and key not in read and key not in empty]
    record.unread += tuple(unread)
    record.label = _flag(entry.get("label")) if "label" not in used else None
    if (correct := _flag(entry.get("correct"))) is not None:
        record.reward = float(correct)
    else:
        with suppress(TypeError, ValueError, OverflowError):
            reward = float(entry.get("reward"))
            record.reward = reward if math.isfinite(reward) else None
    return record


def _flag(value: Any) -> bool | None:
    """Return true or false, which a table writes as text; None for any other value."""
    return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())


def _read_preference(entry: dict[str, Any]) -> Record:
    """Return the chosen conversation, with the other one as its `rejected`."""
    answers = [entry["chosen"], entry["rejected"]]
    places = ["prompt", *sorted({question for question, _ in PAIRS})]
    if all(isinstance(answer, dict) for answer in answers):
        answers, places = [[answer] for answer in answers], [*CONVERSATIONS, *places]
    place = next((key for key in places if entry.get(key) not in (None, "")), "prompt")
    skipped = {key for pair in PAIRS for key in pair} - {"prompt", place}
    shared = {key: value for key, value in entry.items() if key not in ("chosen", "rejected", "label", *CONVERSATIONS, *skipped, place)}
    shared["prompt"] = entry.get(place)
    are_lists = all(isinstance(answer, list) for answer in answers)
    if shared.get("prompt") is None or (are_lists and isinstance(shared["prompt"], str)):
        if not are_lists:
            raise UserError("it has 'chosen' and 'rejected' but no 'prompt': add it, or let both be lists of messages that begin with it")
        same = [one == other for one, other in zip(*answers, strict=False)]
        length = min(same.index(False) if False in same else len(same), *(len(answer) - 1 for answer in answers))
        if length < 1:
            raise UserError("'chosen' and 'rejected' begin with different messages: the prompt must be the same")
        shared["prompt"], answers = answers[0][:length], [answer[length:] for answer in answers]
    kinds = {isinstance(part, list) for part in (shared["prompt"], *answers)}
    if len(kinds) > 1:
        raise UserError("'prompt', 'chosen' and 'rejected' must all be texts, or all lists of messages")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer in ("", [], {}):
            raise UserError(f"{name!r} is empty: an answer is needed")
    chosen, rejected = (read_record({**shared, "completion": answer}) for answer in answers)
    chosen.unread += tuple(key for key in entry if key in skipped)
    chosen.rejected, chosen.label, rejected.label = rejected, True, False
    return chosen


def _messages_of_chatgpt(entry: dict[str, Any]) -> list[Message]:
    """Return the messages that lead to the current node of ChatGPT's tree, up to a picture or a file, which the replies to it need.

    Calls of tools, their results and the model's notes are left out, and what one side says in several messages becomes one. A
    conversation without a reply gets an empty one, so that it is dropped and counted.
    """
    nodes, path = {name: _object(node) for name, node in entry["mapping"].items()}, list[dict[str, Any]]()
    name = str(entry.get("current_node"))
    name = name if name in nodes else next(reversed(nodes), "")
    while (node := nodes.pop(name, None)) is not None:  # each once, whatever the file says
        path.append(_object(node.get("message")))
        name = str(node.get("parent"))
    messages: list[Message] = []
    for message in reversed(path):
        content, role = _object(message.get("content")), _object(message.get("author")).get("role")
        parts = listed if isinstance(listed := content.get("parts"), list) else []
        shown = any("image" in str(_object(part).get("content_type")) for part in parts)
        if role == "user" and (shown or _object(message.get("metadata")).get("attachments")):
            break
        texts = [part if isinstance(part, str) else _object(part).get("text") for part in parts]
        text = REFERENCE.sub(r"\1", "\n".join(text for text in texts if isinstance(text, str))).strip()
        is_said = content.get("content_type") in ("text", "multimodal_text") and message.get("recipient", "all") == "all"
        if not (text and is_said and role in ("user", "assistant", *(() if messages else ("system",)))):
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    if messages and messages[-1]["role"] == "user":  # without a reply
        messages.pop()
    return messages if any(message["role"] == "assistant" for message in messages) else [{"role": "assistant", "content": ""}]


def _object(value: Any) -> dict[str, Any]:
    """Return an object; an empty one for any other value."""
    return value if isinstance(value, dict) else {}


def _read_pair(entry: dict[str, Any], pair: tuple[str, str]) -> tuple[list[str], Record]:
    """Return the keys that were read, and the record of a question and an answer."""
    question, answer = pair
    if isinstance(entry[question], list) and isinstance(entry[answer], list):  # the prompt's own replies are not learned
        before, after = _read_turns(entry, question, False), _read_turns(entry, answer)
        learned = [0.0] * len(before.messages) + after.learned
        return list(pair), Record(before.messages + after.messages, learned, unread=before.unread + after.unread)
    extra, context = "" if pair == ALONE else _optional_text(entry, "input"), _optional_text(entry, "context")
    if extra and context:
        raise UserError("it has both 'input' and 'context': leave one of them out")
    messages: list[Message] = []
    for n, turns in enumerate(_typed(entry.get("history") or [], "'history'", list), 1):
        if not isinstance(turns, (list, tuple)) or len(turns) != 2:
            raise UserError(f"entry {n} of 'history' is {repr(turns)[:60]}, a list of a question and its answer is needed")
        texts = [_check_text(text, f"history, entry {n}") for text in turns]
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    asked, added = entry[question], extra or context
    if asked in (None, "") and added:  # the question is in "input" alone
        asked, added = added, ""
    last = zip(("user", "assistant"), pair, (asked, entry[answer]), strict=True)
    messages += [{"role": role, "content": _check_text(text, key)} for role, key, text in last]
    learned = [float(message["role"] == "assistant") for message in messages]
    return [*pair, "input", "context", "history"], Record(messages, learned, pair=len(messages) == 2, input=added)


def known_key(name: str) -> str:
    """Return the known key that equals `name` up to capitals and surrounding spaces; else `name`."""
    plain = str(name).strip().lower()
    return plain if plain in KEYS else name


def _missing_keys(entry: dict[str, Any]) -> str:
    """Return a message that names the missing keys of the pair that fits best, and the keys that may be meant."""
    keys, answers = list(entry), ("chosen", "rejected")
    pair = answers if any(key in keys for key in answers) else max(PAIRS, key=lambda pair: sum(key in keys for key in pair))
    missing = [key for key in pair if key not in keys]
    if not missing:
        return f"{next(key for key in pair if entry[key] in (None, ''))!r} is empty: an answer is needed"
    shown = ", ".join(repr(key)[:60] for key in keys[:12]) + (", ..." if len(keys) > 12 else "")
    message = f"no key {' and no key '.join(map(repr, missing))}; it has {shown or 'no keys'}"
    if {"role", "content"} <= {*keys} or {"from", "value"} <= {*keys}:
        return f"it is one turn, a record is a whole conversation: {TURNS}"
    if len(missing) == len(keys) == 2:
        return f"{message}: call the question {pair[0]!r} and its answer {pair[1]!r}"
    for key in [*CONVERSATIONS] if len(missing) == 2 else missing:
        near = difflib.get_close_matches(key, [name for name in keys if name not in pair], n=1)
        if near:
            message += f" (is {near[0]!r} meant to be {key!r}?)"
    return message if len(missing) < 2 else f'{message}; a conversation is {{"messages": [...]}}'


def _read_turns(entry: dict[str, Any], key: str, replies: bool = True) -> Record:
    """Return the conversation under a key. `replies`: there must be a reply."""
    if not (turns := _typed(entry[key], repr(key), list)):
        raise UserError(f"{key!r} is an empty list, a list of turns is needed")
    record, unread = Record([], []), dict[str, None]()
    for n, turn in enumerate(turns, 1):
        where = f"turn {n} of {key!r}"
        role_key, text_key = CONVERSATIONS.get(key, CONVERSATIONS["messages"])
        if isinstance(turn, dict) and role_key not in turn:  # the other form under this key
            role_key, text_key = next(
                (keys for keys in CONVERSATIONS.values() if keys[0] in turn and keys[1] in turn), (role_key, text_key)
            )
        calls = isinstance(turn, dict) and (turn.get("tool_calls") or turn.get("function_call"))
        if not isinstance(turn, dict) or role_key not in turn or not (text_key in turn or calls):
            raise UserError(f"{where} needs the keys {role_key!r} and {text_key!r}")
        name = turn[role_key]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise UserError(f"{where}: {role_key!r} is {repr(name)[:60]}, one of {', '.join(ROLES)} is needed")
        try:
            message: Message = {"role": role, "content": _read_content(turn.get(text_key), text_key, bool(calls))}
            message |= {name: _check_text(turn[name], name) for name in REASONING if turn.get(name) is not None}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if name == "function_call":  # LLaMA-Factory's text of one call, or of a list
            message |= {"content": "", "tool_calls": _read_calls(message["content"], where)}
        elif turn.get("function_call"):
            message["tool_calls"] = _read_calls(turn["function_call"], f"{where}: 'function_call'")
        message |= {name: turn[name] for name in PASSED if name not in message and turn.get(name) is not None}
        if "tool_calls" in message:
            message["tool_calls"] = _objects(message["tool_calls"], f"{where}: 'tool_calls'")
        marked = [name for name in WEIGHTS if turn.get(name) is not None] + [name for name in FLAGS if _flag(turn.get(name)) is not None]
        marks = {name: _read_weight(turn[name], f"{where}: {name!r}") for name in marked}
        if role != "assistant":
            unread |= {f"{key}.{name} of {role} turns": None for name, mark in marks.items() if mark}
        record.messages.append(message)
        record.learned.append(math.prod(marks.values()) if role == "assistant" else 0.0)
        known = (role_key, text_key, *PASSED, "function_call", *marked)
        unread |= {f"{key}.{name}": None for name, value in turn.items() if value is not None and name not in known}
    if replies and all(message["role"] != "assistant" for message in record.messages):
        raise UserError(f"{key!r} has no turn of the assistant, so there is nothing to learn")
    record.unread = tuple(unread)
    return record


def _read_weight(value: Any, where: str) -> float:
    """Return a weight: a number, which may be written as text, or true or false."""
    with suppress(TypeError, ValueError, OverflowError):
        weight = float(value if (flag := _flag(value)) is None else flag)
        if 0 <= weight <= MOST_WEIGHT:
            return weight
    raise UserError(
        f"{where} is {repr(value)[:60]}: a number from 0 (not learned) to {MOST_WEIGHT:,} is needed; 1 is the weight of the others"
    )


def _read_content(value: Any, key: str, may_be_missing: bool) -> str:
    """Return the content of a message: a text, or a list of parts that are texts."""
    if value is None and may_be_missing:
        return ""
    if not isinstance(value, list):
        return _check_text(value, key)
    texts = []
    for n, part in enumerate(value, 1):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXTS:
            raise UserError(f"part {n} of {key!r} is of the type {repr(kind)[:60]}: only text can be read")
        texts.append(_check_text(part.get("text") if isinstance(part, dict) else part, f"part {n} of {key}"))
    return "".join(texts)


def _typed(value: Any, where: str, kind: type) -> Any:
    """Return a value of this type, which may be written as JSON text."""
    value = parse_json(value, where, unique=True) if isinstance(value, str) and value.lstrip().startswith(("[", "{")) else value
    if not isinstance(value, kind):
        raise UserError(f"{where} is {kind_of(value)}, {'a list' if kind is list else 'an object'} is needed")
    return value


def _objects(value: Any, where: str) -> list[Any]:
    """Return a list of objects, each of which may be written as JSON text."""
    return [_typed(entry, f"{where}, entry {n}", dict) for n, entry in enumerate(_typed(value, where, list), 1)]


def _of_functions(functions: list[Any]) -> list[Any]:
    """Return functions, or calls of them, in the form of `tools` and `tool_calls`."""
    return [{"type": "function", "function": function} for function in functions]


def _read_calls(value: Any, where: str) -> list[Any]:
    """Return one call, or a list of calls, in the form of `tool_calls`."""
    value = parse_json(value, where, unique=True) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return _of_functions(_objects(value if isinstance(value, list) else [value], where))


def _optional_text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    return "" if value is None else _check_text(value, key)


def _check_text(value: Any, key: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST_NUMBER:
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key!r} is {kind_of(value)}, a text is needed")
    if LONE_SURROGATE.search(value):
        raise UserError(f"{key!r} holds half of a character (a lone surrogate, such as \\ud800): write the whole character")
    return value


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
