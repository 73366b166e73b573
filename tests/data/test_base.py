"""Loss masks checked by decoding what they cover; cutting, dropping, splitting and the report."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from litgpt import prompts
from litgpt.data import JSON, Alpaca, DataModule, Deita, LitData, OpenWebText, TextFiles, TinyLlama, TinyStories
from litgpt.data.base import Rendered, encode_divided, loss_weights, render
from litgpt.data.records import read_record
from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.tokenizer import Tokenizer
from tests.helpers.tiny import put_bos_first


@dataclass
class Given(DataModule):
    """Records that a test hands over."""

    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] | None = None

    def records(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        return self.train, self.val


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def bos_tokenizer(write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> Tokenizer:
    """The same tokenizer, of a checkpoint that asks for BOS (<|endoftext|>, 0)."""
    return Tokenizer(put_bos_first(write_tiny_tokenizer(tmp_path / "bos")))


def pair(question: str, answer: str, extra: str = "") -> dict[str, str]:
    return {"instruction": question, "input": extra, "output": answer}


def one_sample(
    record: dict[str, Any], tokenizer: Tokenizer, style: PromptStyle, mask_prompt: bool = True, length: int | None = None
) -> Any:
    data = Given(mask_prompt=mask_prompt, train=[record], val=[record])
    return data.splits(tokenizer, style, length).train[0]


def full_text(sample: Any, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(sample.input_ids), skip_special_tokens=False)


def learned(sample: Any, tokenizer: Tokenizer) -> list[str]:
    """The texts of the runs of tokens that carry loss."""
    runs: list[list[int]] = []
    previous = 0
    for token, loss in zip(sample.input_ids, sample.loss_mask, strict=True):
        if loss and not previous:
            runs.append([])
        if loss:
            runs[-1].append(token)
        previous = loss
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def own_template(tokenizer: Tokenizer) -> ChatTemplate:
    style = ChatTemplate.from_tokenizer(tokenizer)
    assert style is not None
    return style


def test_alpaca_learns_answer_and_eos(tokenizer: Tokenizer) -> None:
    sample = one_sample(pair("Add.", "It is 4.\n", extra="2 + 2"), tokenizer, prompts.Alpaca())
    assert learned(sample, tokenizer) == ["It is 4.\n<|im_end|>"]
    assert full_text(sample, tokenizer) == prompts.Alpaca().apply("Add.", input="2 + 2") + "It is 4.\n<|im_end|>"
    assert isinstance(sample.input_ids, array)
    assert sample.input_ids.typecode == "i"


def test_without_mask_everything_but_the_first_token_is_learned(tokenizer: Tokenizer, bos_tokenizer: Tokenizer) -> None:
    for each in (tokenizer, bos_tokenizer):
        sample = one_sample(pair("Hi", "Hello"), each, prompts.Alpaca(), mask_prompt=False)
        assert sample.loss_mask == bytes([0] + [1] * (sample.n_inputs))


@pytest.mark.parametrize("style", [prompts.ChatML(), prompts.SmolLM2(), "template"])
def test_chat_learns_answer_and_end_of_turn(style: Any, tokenizer: Tokenizer) -> None:
    style = own_template(tokenizer) if style == "template" else style
    sample = one_sample(pair("Hi", "Hello\nyou", extra="there"), tokenizer, style)
    assert learned(sample, tokenizer) == ["Hello\nyou<|im_end|>"]
    assert full_text(sample, tokenizer) == style.apply("Hi", input="there") + "Hello\nyou<|im_end|>"  # no newline behind it


def test_style_whose_marker_is_no_token_ends_with_eos(tokenizer: Tokenizer) -> None:
    sample = one_sample(pair("Hi", "Hello"), tokenizer, prompts.Llama2())
    assert learned(sample, tokenizer) == [" Hello<|im_end|>"]
    assert "[INST] Hi" not in learned(sample, tokenizer)[0]
    sample = one_sample(pair("Hi", "Hello"), tokenizer, prompts.OLMo())  # its own marker is a token here
    assert learned(sample, tokenizer) == ["Hello<|endoftext|>"]


def test_template_without_marker_ends_with_eos(tokenizer: Tokenizer) -> None:
    style = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sample = one_sample(pair("Hi", "Hello"), tokenizer, style)
    assert full_text(sample, tokenizer) == "user: Hi\nassistant: Hello<|im_end|>"
    assert learned(sample, tokenizer) == ["Hello<|im_end|>"]


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, friend"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you\n\nsoon"},
]


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("style", ["chatml", "template"])
def test_conversation_learns_the_assistants_turns_only(style: str, mask_prompt: bool, tokenizer: Tokenizer) -> None:
    chosen = own_template(tokenizer) if style == "template" else PromptStyle.from_name(style)
    sample = one_sample({"messages": CHAT}, tokenizer, chosen, mask_prompt)
    assert learned(sample, tokenizer) == ["Hello, friend<|im_end|>", "See you\n\nsoon<|im_end|>"]
    assert full_text(sample, tokenizer) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, friend<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you\n\nsoon<|im_end|>"
    )


def test_llama2_conversation(tokenizer: Tokenizer) -> None:
    sample = one_sample({"messages": CHAT}, tokenizer, prompts.Llama2())
    assert learned(sample, tokenizer) == [" Hello, friend</s>", " See you\n\nsoon</s><|im_end|>"]  # </s> is no token here


def test_what_follows_the_last_reply_is_left_out(tokenizer: Tokenizer) -> None:
    sample = one_sample({"messages": CHAT[:4]}, tokenizer, prompts.ChatML())
    assert full_text(sample, tokenizer).endswith("Hello, friend<|im_end|>")


def test_training_prompt_is_the_generation_prompt(tokenizer: Tokenizer, bos_tokenizer: Tokenizer) -> None:
    """What comes before the first learned token is exactly what generation feeds to the model."""
    for each in (tokenizer, bos_tokenizer):
        for style in (prompts.Alpaca(), prompts.ChatML(), prompts.Llama3(), own_template(each)):
            sample = one_sample(pair("Hi", "Hello"), each, style)
            first = sample.loss_mask.index(1)
            assert list(sample.input_ids[:first]) == each.ids(style.apply("Hi"), bos=style.bos)


def test_bos_once(bos_tokenizer: Tokenizer) -> None:
    sample = one_sample(pair("Hi", "Hello"), bos_tokenizer, prompts.Alpaca())
    assert list(sample.input_ids[:2]) == [0, *bos_tokenizer.ids("B", bos=False)]
    sample = one_sample(pair("Hi", "Hello"), bos_tokenizer, prompts.OLMo())  # its text starts with <|endoftext|>, the BOS here
    assert sample.input_ids[0] == 0
    assert sample.input_ids[1] != 0


def test_eos_is_not_doubled(tokenizer: Tokenizer) -> None:
    sample = one_sample(pair("Hi", "Hello<|im_end|>"), tokenizer, prompts.Alpaca())
    assert list(sample.input_ids).count(2) == 1


def test_conversation_of_one_turn_fits_any_style(tokenizer: Tokenizer) -> None:
    sample = one_sample({"messages": CHAT[1:3]}, tokenizer, prompts.Alpaca())
    assert full_text(sample, tokenizer) == prompts.Alpaca().apply("Hi") + "Hello, friend<|im_end|>"
    sample = one_sample({"messages": CHAT[:3]}, tokenizer, prompts.Alpaca())
    assert full_text(sample, tokenizer).startswith("Be kind.\n\n### Instruction:\nHi")
    with pytest.raises(UserError, match='record 1: .*"chatml"'):
        one_sample({"messages": CHAT}, tokenizer, prompts.Alpaca())


def test_template_that_opens_replies_with_more_than_it_writes_is_refused(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
    )
    with pytest.raises(UserError, match="record 1: .* opens replies with '<think>.*', but writes message 3 without it.*chatml"):
        one_sample({"messages": CHAT}, tokenizer, ChatTemplate(template))


def test_token_across_the_boundary_is_learned() -> None:
    #        ab     cd     ef      (trimmed blank)  \n
    offsets = [(0, 2), (2, 4), (4, 6), (6, 6), (6, 7)]
    assert loss_weights(offsets, [(3, 6)], [2]) == array("f", [0, 2, 2, 2, 0])
    assert loss_weights(offsets, [(0, 2), (4, 5)], [1, 3]) == array("f", [1, 0, 0, 0, 0])


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_prompt_has_the_tokens_that_are_read_when_it_is_answered(mask_prompt: bool, tokenizer: Tokenizer) -> None:
    """Qwen3-Thinking's template opens replies with a line break, which the tokenizer joins with one that follows."""
    question, answer = tokenizer.ids("respons"), tokenizer.ids("e that is good")
    whole = tokenizer.ids("response that is good")
    assert whole != question + answer
    sample = one_sample(pair("respons", "e that is good"), tokenizer, prompts.Default(), mask_prompt=mask_prompt)
    assert sample.input_ids.tolist() == [*question, *answer, tokenizer.eos_id]
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '<|im_start|>' }}"
        "{% else %}{{ 'respons' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'respons' }}{% endif %}"
    )
    turns = [message for n in "12" for message in ({"role": "user", "content": n}, {"role": "assistant", "content": "e that is good"})]
    sample = one_sample({"messages": turns}, tokenizer, template)
    parts = [
        tokenizer.ids("1<|im_start|>respons"),
        answer,
        tokenizer.ids("<|im_end|>2<|im_start|>respons"),
        answer,
        tokenizer.ids("<|im_end|>"),
    ]
    assert sample.input_ids.tolist() == [token for part in parts for token in part]
    assert learned(sample, tokenizer) == ["e that is good<|im_end|>"] * 2


def test_a_token_is_whole_where_its_parts_are_another_text(tmp_path: Path) -> None:
    """SentencePiece writes a blank before a part's first word."""
    vocabulary = [("<unk>", 0.0), ("\u2581", -5.0), ("a", -4.0), ("b", -4.0), ("\u2581a", -2.0), ("\u2581b", -2.0), ("</s>", -9.0)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert encode_divided("b a", [(2, 3)], Tokenizer(tmp_path)) == ([5, 4], [(0, 1), (1, 3)])
    assert encode_divided("b a", [(1, 3)], Tokenizer(tmp_path)) == ([5, 4], [(0, 1), (1, 3)])


def test_characters_of_several_tokens(tokenizer: Tokenizer) -> None:
    sample = one_sample(pair("Grüße", "日本 🎉 ñ"), tokenizer, prompts.Alpaca())
    assert learned(sample, tokenizer) == ["日本 🎉 ñ<|im_end|>"]


def test_render_spans_are_characters(tokenizer: Tokenizer) -> None:
    text, spans = render(read_record({"messages": CHAT}), prompts.ChatML(), tokenizer)
    assert [text[start:end] for start, end in spans] == ["Hello, friend<|im_end|>", "See you\n\nsoon<|im_end|>"]


def test_report_counts_what_was_cut_and_dropped(tokenizer: Tokenizer) -> None:
    style = prompts.Default()
    lengths = [len(tokenizer.ids(text)) for text in ("qqqq", "zzzz")]
    assert lengths == [4, 4]
    train = [pair("qqqq", "zzzz"), pair("qqqq", "zzzz" * 5), pair("qqqq" * 9, "zzzz"), pair("qqqq", " "), pair("qqqq", "")]
    data = Given(mask_prompt=True, train=train, val=[pair("qqqq", "zzzz")])
    splits = data.splits(tokenizer, style, 16)
    assert splits.report == (
        "2 train and 1 validation samples, 11 tokens on average (longest 16), 1 cut to 16, "
        "2 dropped: empty answer, 1 dropped: no answer token left"
    )
    assert [len(sample.input_ids) for sample in splits.train] == [9, 16]
    assert list(splits.train[1].input_ids) == tokenizer.ids("qqqq" + "zzzz" * 3)
    assert splits.examples == [read_record(pair("qqqq", "zzzz"))]


def test_split_is_seeded_and_complete(tokenizer: Tokenizer) -> None:
    records = [pair(f"question {i}", f"answer {i}") for i in range(50)]

    def ids(seed: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        splits = Given(seed=seed, val_split_fraction=0.2, train=records).splits(tokenizer, prompts.Default())
        return [tuple(sample.input_ids) for sample in splits.train], [tuple(sample.input_ids) for sample in splits.val]

    train, val = ids(1)
    assert (len(train), len(val)) == (40, 10)
    assert len(set(train) | set(val)) == 50
    assert ids(1) == (train, val)
    assert ids(2) != (train, val)


def test_examples_belong_to_the_validation_samples(tokenizer: Tokenizer) -> None:
    records = [pair(f"question {i}", "" if i % 3 else f"answer {i}") for i in range(30)]
    splits = Given(val_split_fraction=0.5, train=records).splits(tokenizer, prompts.Default())
    texts = [full_text(sample, tokenizer) for sample in splits.val]
    assert texts == [f"{record.question}{record.reply}<|im_end|>" for record in splits.examples]


def test_without_a_validation_share_training_samples_are_validated(tokenizer: Tokenizer) -> None:
    splits = Given(val_split_fraction=0, train=[pair("a", f"b{i}") for i in range(130)]).splits(tokenizer, prompts.Default())
    assert len(splits.train) == 130 and len(splits.val) == 26 and "of them validated again" in splits.report
    trained = [bytes(sample.input_ids) for sample in splits.train]
    assert all(bytes(sample.input_ids) in trained for sample in splits.val)
    assert len(Given(val_split_fraction=0, train=[pair("a", f"b{i}") for i in range(30)]).splits(tokenizer, prompts.Default()).val) == 30
    assert len(Given(val_split_fraction=0, train=[pair("a", "b")]).splits(tokenizer, prompts.Default()).val) == 1
    every_other = [pair("a", f"b{i}" if i % 2 else "") for i in range(60)]
    half = Given(val_split_fraction=0, train=every_other).splits(tokenizer, prompts.Default())
    assert len(half.train) == len(half.val) == 30 and "30 dropped: empty answer" in half.report


@pytest.mark.parametrize(
    ("settings", "length", "message"),
    [
        ({"train": []}, None, "Given holds no records"),
        (
            {"train": [pair("a", "b")]},
            None,
            "holds one record: at least two are needed, one of them for validation, or data.val_split_fraction 0",
        ),
        ({"train": [pair("a", "b")] * 9, "val_split_fraction": 1.5}, None, "data.val_split_fraction is 1.5"),
        ({"train": [pair("a", "b")] * 9, "val_split_fraction": -0.1}, None, "data.val_split_fraction is -0.1"),
        ({"train": [pair("a", "b")], "val": []}, None, "the validation set is empty"),
        ({"train": [pair("a", "")] * 9}, None, "answers are empty"),
        ({"train": [pair("a" * 99, "b")] * 9, "mask_prompt": True}, 16, "fill max_seq_length (16)"),
        ({"train": [pair("a", "b")], "val": [pair("a", " ")]}, None, "none of the 1 validation records is left"),
        ({"train": [pair("a", "b")] * 9}, 1, "max_seq_length is 1"),
    ],
)
def test_nothing_to_train_on(settings: dict[str, Any], length: int | None, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as error:
        Given(**settings).splits(tokenizer, prompts.Default(), length)
    assert message in str(error.value)


def weighed(sample: Any, tokenizer: Tokenizer) -> list[tuple[float, str]]:
    """The stretches of equal weight above 0, as text."""
    assert [weight > 0 for weight in sample.weights] == list(map(bool, sample.loss_mask))
    stretches = groupby(zip(sample.weights, sample.input_ids, strict=True), lambda pair: pair[0])
    texts = [(weight, tokenizer.decode([token for _, token in group], skip_special_tokens=False)) for weight, group in stretches]
    return [(weight, text) for weight, text in texts if weight]


def test_weights_of_records_and_turns(tokenizer: Tokenizer, bos_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0.5}]
    turns += [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you", "weight": 3}]
    chatml = prompts.ChatML()
    assert weighed(one_sample({"messages": turns}, tokenizer, chatml), tokenizer) == [(0.5, "Hello<|im_end|>"), (3, "See you<|im_end|>")]
    doubled = one_sample({"messages": turns, "weight": 2}, tokenizer, chatml)
    assert weighed(doubled, tokenizer) == [(1, "Hello<|im_end|>"), (6, "See you<|im_end|>")]
    assert doubled.weight == sum(doubled.weights) and doubled.n_targets == sum(doubled.loss_mask)
    question = {**pair("Hi", "Hello"), "weight": "0.25"}  # as a table has it
    for each in (tokenizer, bos_tokenizer):
        assert weighed(one_sample(question, each, prompts.Alpaca()), each)[-1][0] == 0.25
        whole = one_sample(question, each, prompts.Alpaca(), mask_prompt=False)
        assert whole.weights[0] == 0 and set(whole.weights[1:]) == {0.25}
        assert len(one_sample(question, each, prompts.Alpaca(), mask_prompt=False, length=9).weights) == 9


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_token_weights(tokenizer: Tokenizer, mask_prompt: bool) -> None:
    answer = tokenizer.ids("Hello")
    numbers = [float(n) for n in range(1, len(answer) + 1)]
    for given, last in ((numbers, 1), ([*numbers, 9], 9)):
        sample = one_sample({**pair("Hi", "Hello"), "token_weights": given}, tokenizer, prompts.ChatML(), mask_prompt)
        (start,) = (i for i in range(len(sample.input_ids)) if sample.input_ids[i : i + len(answer)].tolist() == answer)
        assert sample.weights.tolist() == [0] * start + [*numbers, last]
    half = {**pair("Hi", "Hello"), "weight": 0.5, "token_weights": json.dumps([2, 0, *numbers[2:]])}  # as a table has it
    assert one_sample(half, tokenizer, prompts.ChatML()).weights.tolist()[start:] == [1, 0, *(n / 2 for n in numbers[2:]), 0.5]
    turns = [user := {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye", "weight": 0}, user]
    turns.append({"role": "assistant", "content": "Hello"})
    later = one_sample({"messages": turns, "token_weights": numbers}, tokenizer, prompts.ChatML())
    assert later.weights.tolist()[-len(answer) - 1 :] == [*numbers, 1] and later.n_targets == len(answer) + 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], r"'token_weights' has 1 numbers, the reply \d tokens: give one per token"),
        ([1] * 50, "'token_weights' has 50 numbers"),
        ([], "'token_weights' has 0 numbers"),
        ([1, -1], "number 2 of 'token_weights' is -1: a number from 0"),
        (0.5, "'token_weights' is a number, a list is needed"),
    ],
)
def test_bad_token_weights(tokenizer: Tokenizer, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        one_sample({**pair("Hi", "Hello"), "token_weights": given}, tokenizer, prompts.ChatML())


@pytest.mark.parametrize(("weight", "each"), [(1e-46, None), (1, 1e-46), (1e-46, 1), (1e-30, 1e-30)])
def test_weights_that_are_0_in_fp32_are_not_learned(weight: float, each: float | None, tokenizer: Tokenizer) -> None:
    count = len(tokenizer.ids("Hello")) + 1
    record = {**pair("Hi", "Hello"), "weight": weight, "token_weights": None if each is None else [each] * count}
    with pytest.raises(UserError, match="none of the . training records is left: their answers are empty.* let a turn have the weight 1"):
        Given(train=[record] * 3).splits(tokenizer, prompts.ChatML())


def test_weight_1_is_no_weight(tokenizer: Tokenizer) -> None:
    plain = one_sample(pair("Hi", "Hello"), tokenizer, prompts.Alpaca())
    assert plain.weights is None and plain.weight == plain.n_targets
    assert one_sample({**pair("Hi", "Hello"), "weight": 1.0}, tokenizer, prompts.Alpaca()) == plain


def test_the_report_names_the_weights(tokenizer: Tokenizer) -> None:
    records = [{**pair("Hi", "Hello"), "weight": weight} for weight in (0, 0.5, 1, 2)]
    report = Given(train=[*records, pair("Hi", "")], val=records).splits(tokenizer, prompts.Alpaca()).report
    assert "weights from 0.5 to 2" in report and "1 dropped: empty answer, 2 dropped: weight 0" in report


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("one two three four", "one two"),
        ("one two\nthree four", "one two"),
        ("anticonstitutionally", "anticonsti"),
        ("a", "a"),
        ("twelve chars " * 40, ("twelve chars " * 40)[:194]),
    ],
)
def test_the_beginning_of_running_text_ends_with_a_word(text: str, beginning: str) -> None:
    """Half of a text, or 200 characters. A part of a word would be other tokens than the word."""
    assert Rendered(text, [(0, len(text))]).prompt == beginning
    assert Rendered(text, [(1, len(text))]).prompt == text[:1]  # behind a question


def test_paths_come_first_and_the_rest_has_names() -> None:
    """As LitGPT orders them: `JSON("my.json")` is not `mask_prompt="my.json"`."""
    assert (JSON(Path("a.json")).json_path, JSON(Path("a.json")).mask_prompt) == (Path("a.json"), False)
    texts, tokens = TextFiles(Path("a"), Path("b")), LitData(Path("a"), ["train", "val"])
    assert (texts.train_data_path, texts.val_data_path) == (Path("a"), Path("b"))
    assert (tokens.data_path, tokens.split_names) == (Path("a"), ["train", "val"])
    assert all(kind(Path("a")).data_path == Path("a") for kind in (TinyLlama, TinyStories, OpenWebText))
    for kind in (Alpaca, Deita):
        with pytest.raises(TypeError, match="positional"):
            kind(True)
