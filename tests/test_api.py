"""`litgpt.LLM`: from every kind of folder, whole and streamed, seeded; and the real model's answer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import litgpt
from litgpt import checkpoint
from litgpt.api import LLM, inference_dtype, recommended
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.convert.adapter import convert_adapter
from litgpt.convert.from_litgpt import convert_from_litgpt
from litgpt.convert.merge import merge_lora
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora, setup
from litgpt.generate.base import Generate
from litgpt.prompts import Alpaca, ChatTemplate, save_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.validate import validate
from tests.helpers import tiny
from tests.helpers.cases import quick

WriteTokenizer = Callable[[Path], Path]
SKIP: dict[str, Any] = {"lora_r": 3, "skip2lora_enabled": True, "skip2lora_block_indices": [0, 1, 2, 3, 4]}


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


def adapter(base: Path, **settings: Any) -> Path:
    model = tiny.move_adapters(tiny.tiny(**{**tiny.SPEAKING, **settings}))
    return tiny.write_adapter(base.parent / "adapter", base, model, **settings)


def load(folder: Path) -> LLM:
    return LLM.load(folder, precision="32-true", device="cpu")


def test_generate_is_greedy_text_of_the_chat_prompt(base: Path) -> None:
    """Prompt through the chat template, argmax by full passes, until the template's end of turn."""
    llm = load(base)
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(text)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 30:
            token = int(llm.model(torch.cat((ids, torch.tensor(new, dtype=torch.long)))[None])[0, -1].argmax())
            if token == 2:
                break
            new.append(token)
    assert llm.generate("why?", sys_prompt="Be short.", max_new_tokens=30, temperature=0.0) == llm.tokenizer.decode(new)
    got = llm.generate("why?", "Be short.", 30, temperature=0.0, return_as_token_ids=True)
    assert isinstance(got, torch.Tensor) and got.tolist() == new
    streamed: Any = list(llm.generate("why?", "Be short.", 30, temperature=0.0, return_as_token_ids=True, stream=True))
    assert torch.equal(torch.cat(streamed), got) and llm.preprocessor.decode(streamed[0]) == llm.tokenizer.decode(new[:1])
    assert llm.generate("why?", max_new_tokens=30, temperature=0.0) != llm.tokenizer.decode(new)  # the system text counts


@pytest.mark.parametrize("seed", quick([1, 2, 3], 2))
def test_streamed_pieces_make_the_whole(base: Path, seed: int) -> None:
    """A random model speaks broken UTF-8; the pieces still join to the text."""
    llm = load(base)
    whole = llm.generate("hello", max_new_tokens=60, seed=seed)
    pieces = list(llm.generate("hello", max_new_tokens=60, seed=seed, stream=True))
    assert "".join(pieces) == whole and len(pieces) > 5  # type: ignore[arg-type]


def test_a_seed_repeats_the_answer(base: Path) -> None:
    llm = load(base)

    def run(seed: int | None) -> str:
        return llm.generate("hello", max_new_tokens=16, seed=seed)

    assert run(1) == run(1) == load(base).generate("hello", max_new_tokens=16, seed=1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_a_list_of_prompts_is_answered_as_one_by_one(base: Path) -> None:
    llm = load(base)
    prompts = ["hello", "why?", "hello"]
    for settings in ({"temperature": 0.0}, {"seed": 3, "top_k": 9}, {"seed": 1, "sys_prompt": "Be short.", "return_as_token_ids": True}):
        answers: Any = llm.generate(prompts, max_new_tokens=12, **settings)  # type: ignore[call-overload]
        single = [llm.generate(prompt, max_new_tokens=12, **settings) for prompt in prompts]  # type: ignore[call-overload]
        assert [list(answer) for answer in answers] == [list(answer) for answer in single] and list(answers[0]) != list(answers[1])
    assert llm.generate([]) == []
    stop = next(char for char in llm.generate("why?", None, 12, 0.0) if char.isascii())
    stopped = llm.generate(prompts, max_new_tokens=12, temperature=0.0, stop=stop)
    assert stopped == [llm.generate(prompt, None, 12, 0.0).partition(stop)[0] for prompt in prompts]
    assert stopped == ["".join(llm.generate(prompt, None, 12, 0.0, stop=[stop], stream=True)) for prompt in prompts]  # type: ignore[arg-type]
    ids: Any = llm.generate("why?", max_new_tokens=12, temperature=0.0, stop=stop, return_as_token_ids=True)
    assert llm.tokenizer.decode(ids) == stopped[1]
    with pytest.raises(UserError, match="stream answers one prompt at a time, and the list has 3"):
        llm.generate(prompts, stream=True)


def test_an_empty_stop_text_ends_nothing(base: Path) -> None:
    llm = load(base)
    assert (
        llm.generate("why?", None, 5, 0.0, stop="")
        == llm.generate("why?", None, 5, 0.0, stop=["", ""])
        == llm.generate("why?", None, 5, 0.0)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 2.5),
        ("temperature", "1"),
        ("top_k", 1.5),
        ("top_p", True),
        ("logit_bias", [1]),
        ("logit_bias", {320: 1.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: None}),
        ("logit_bias", {3: float("nan")}),
        ("stop", [5]),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("seed", True),
        ("max_new_tokens", True),
        ("max_new_tokens", None),
        ("sys_prompt", ["x"]),
        ("stream", "x"),
        ("return_as_token_ids", None),
        ("temperature", float("nan")),
    ],
)
def test_settings_of_the_wrong_kind(name: str, value: Any, base: Path) -> None:
    with pytest.raises(UserError, match=f"{name} (is|names)"):
        load(base).generate("why?", **{"max_new_tokens": 2, name: value})


def test_a_folder_in_the_home_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    assert LLM.load(f"~/{base.name}/", precision="32-true").checkpoint_dir == base
    assert Tokenizer(f"~/{base.name}").folder == base and Config.from_checkpoint(f"~/{base.name}") == Config.from_checkpoint(base)


def test_sampling_defaults(base: Path) -> None:
    """Those of `litgpt chat`, or of generation_config.json; what the caller gives comes first."""
    llm = load(base)
    explicit = llm.generate("hello", max_new_tokens=20, temperature=0.8, top_k=50, top_p=1.0, seed=3)
    assert llm.generate("hello", max_new_tokens=20, seed=3) == explicit
    assert llm.generate("hello", max_new_tokens=20, top_k=0, seed=3) == llm.generate("hello", max_new_tokens=20, top_k=9999, seed=3)
    file = base / "generation_config.json"
    recommended = {"temperature": 0.3, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.2, "do_sample": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **recommended}))
    values: dict[str, Any] = {"temperature": 0.3, "top_k": 999, "min_p": 0.1, "repetition_penalty": 1.2}
    assert load(base).generate("hello", max_new_tokens=20, seed=3) == llm.generate("hello", max_new_tokens=20, seed=3, **values) != explicit
    file.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(UserError, match="generation_config.json: .*"):
        load(base)


def test_a_conversation_is_rendered_as_transformers_does(base: Path) -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    llm, reference = load(base), transformers.AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    expected = list(tiny.generate(llm.model, ids, len(ids) + 12, temperature=0.0, stop_tokens=[[2]]))
    answer = llm.generate(messages, max_new_tokens=12, temperature=0.0, return_as_token_ids=True)
    assert isinstance(answer, torch.Tensor) and answer.tolist() == expected
    text = llm.generate(messages, max_new_tokens=12, temperature=0.0)
    assert llm.generate([messages, messages[1:2]], max_new_tokens=12, temperature=0.0) == [text, llm.generate("user", None, 12, 0.0)]
    other = llm.generate(messages, "Be short.", 12, temperature=0.0)
    assert other == llm.generate([{"role": "system", "content": "Be short."}, *messages[1:]], None, 12, temperature=0.0) != text
    assert text == llm.generate([{"role": "developer", "content": "system"}, *messages[1:]], None, 12, temperature=0.0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt: None is not understood: give a text, or a list of messages"),
        ([{"role": "user"}], "prompt: {'role': 'user'} is not understood"),
        ([{"role": "robot", "content": "x"}], "roles: system, user, assistant, tool, developer"),
        ([{"role": "user", "content": "x"}, "y"], "prompt: 'y' is not understood"),
        (["x", 7], "prompt: 7 is not understood"),
        ({"role": "user", "content": ["x"]}, "is not understood"),
        ([[]], "prompt: [] is not understood"),
        (b"x", "prompt: b'x' is not understood"),
    ],
)
def test_prompts_that_are_none(prompt: Any, message: str, base: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(base).generate(prompt, max_new_tokens=1)


def test_a_conversation_needs_a_style_with_turns(base: Path) -> None:
    save_prompt_style(Alpaca(), base)
    with pytest.raises(UserError, match="prompt style 'alpaca' has no turns"):
        load(base).generate([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.5, "1"])
def test_seeds_that_are_none(seed: Any, base: Path, tmp_path: Path) -> None:
    message = re.escape(f"seed is {seed!r}: a number from 0 to 4294967295 is needed")
    with pytest.raises(UserError, match=message):
        load(base).generate("x", seed=seed)
    with pytest.raises(UserError, match=message):
        Lora(checkpoint_dir=base, data=JSON(json_path=tmp_path / "none.json"), seed=seed)


def test_a_device_that_does_not_exist(base: Path) -> None:
    with pytest.raises(UserError, match="device 'cuda:99' does not exist on this machine"):
        LLM.load(base, device="cuda:99")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "model is None: text or a path is needed"),
        ({"model": ["a"]}, "model is ['a']: text or a path is needed"),
        ({"model": ""}, "'' is not a path"),
        ({"init": "other"}, "init is 'other': one of pretrained, random or null is needed"),
        ({"init": "random", "model": 5}, "model is 5: text or a path is needed"),
        ({"tokenizer_dir": 5}, "tokenizer_dir is 5: text or a path or null is needed"),
        ({"base": 5}, "base is 5: text or a path or null is needed"),
        ({"distribute": "all"}, "distribute is 'all': one of auto or null is needed"),
        ({"precision": 32}, "precision is 32: text or null is needed"),
        ({"quantize": 8}, "quantize is 8: text or null is needed"),
        ({"access_token": b"hf_secret"}, "access_token is of another type: text or null is needed"),
        ({"device": [1]}, "device '[1]' does not exist"),
    ],
)
def test_arguments_of_load(settings: dict[str, Any], message: str, base: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        LLM.load(**{"model": base, **settings})


def test_other_arguments(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(base)
    monkeypatch.chdir(base.parent)
    before = sorted(base.parent.iterdir())
    for path in (None, 5, ""):
        with pytest.raises(UserError, match="path"):
            llm.save(path)  # type: ignore[arg-type]
    assert sorted(base.parent.iterdir()) == before
    for call in (lambda: llm.distribute(devices=None), lambda: llm.value("x", answer=5), lambda: llm.generate("x", beams=2)):  # type: ignore[arg-type]
        with pytest.raises(UserError, match="devices is None|answer is 5|no argument 'beams': min_p, .* can be given"):
            call()
    for call, message in (
        (lambda: llm.complete(text=5, max_new_tokens=2), "text is 5: text is needed"),  # type: ignore[arg-type]
        (lambda: llm.complete("x", 2, generator=5), "generator is 5: a torch.Generator is needed"),  # type: ignore[arg-type]
        (lambda: llm.complete("x", 2, beams=5), "no argument 'beams'"),
        (lambda: llm.complete("x"), "complete: missing a required argument: 'max_new_tokens'"),  # type: ignore[call-arg]
        (lambda: llm.benchmark(num_iterations=5), "generate: missing a required argument: 'prompt'"),
        (lambda: llm.generate(), "generate: missing a required argument: 'prompt'"),  # type: ignore[call-overload]
    ):
        with pytest.raises(UserError, match=message):
            call()
    for function in (merge_lora, validate, convert_from_litgpt, convert_adapter):
        with pytest.raises(UserError, match="_dir is None: .*path is needed"):
            function(None, *["x"] * (function in (convert_from_litgpt, convert_adapter)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", list(range(50))),
        ("begin_suppress_tokens", list(range(50))),
        ("bad_words_ids", [[token] for token in range(50)]),
        ("forced_bos_token_id", 0),
        ("forced_eos_token_id", 3),
        ("no_repeat_ngram_size", 1),
        ("num_beams", 3),
    ],
)
def test_settings_that_only_transformers_follows_are_named(name: str, value: Any, tmp_path: Path, capsys: Any) -> None:
    model = tiny.hf_llama()
    plain, changed = (
        model.generate(torch.tensor([[5]]), generation_config=transformers.GenerationConfig(max_new_tokens=8, **settings)).tolist()
        for settings in ({}, {name: value})
    )
    assert plain != changed
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value, "temperature": 0.7}))
    assert recommended(tmp_path) == {"temperature": 0.7}
    assert f": {name} would change answers in transformers" in capsys.readouterr().err
    transformers.GenerationConfig(repetition_penalty=1.0, max_new_tokens=8).save_pretrained(tmp_path)
    assert recommended(tmp_path) == {"repetition_penalty": 1.0} and not capsys.readouterr().err


def test_a_checkpoint_that_asks_for_the_most_probable_token(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7, "top_p": 0.9}))
    assert recommended(tmp_path) == {"temperature": 0.0, "top_p": 0.9}


def test_numbers_and_texts_of_numpy(base: Path) -> None:
    plain = load(base).generate("why?", None, 5, 0.5, 4, 0.75, seed=3)
    numbers = (np.int64(5), np.float32(0.5), np.int32(4), np.float64(0.75))
    assert plain == load(base).generate(np.str_("why?"), None, *numbers, seed=np.uint8(3))  # type: ignore[arg-type]
    assert (
        load(base).generate(["why?", {"role": "user", "content": "why?"}], None, 5, 0.0) == [load(base).generate("why?", None, 5, 0.0)] * 2
    )
    assert load(base).generate("why?", None, 5, 0.0, stop=None) == load(base).generate("why?", None, 5, 0.0)  # type: ignore[call-overload]


def test_paths_may_be_texts(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every function that a command calls, as in notebooks."""
    monkeypatch.chdir(base.parent)
    Path("d.json").write_text(json.dumps([{"instruction": "q", "output": "a"}] * 9))
    settings: dict[str, Any] = {"data": JSON(json_path="d.json"), "train": TrainArgs(max_steps=1)}  # type: ignore[arg-type]
    setup("base", out_dir="out", skip2lora_cache_dir="cache", precision="32-true", **settings)
    texts: Any = {
        validate: ["base"],
        merge_lora: ["out/best", "base"],
        convert_adapter: ["out/best", "peft", "base"],
        convert_from_litgpt: ["out/final", "hf"],
        convert_to_litgpt: ["hf", "again"],
        lambda folder: Generate(folder).main(): ["again"],
    }
    for function, paths in texts.items():
        function(*paths)
    assert LLM.load("out/final").config.name == "tiny" and Path("peft/adapter_config.json").is_file()


def test_every_kind_of_folder(base: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    lora_settings: dict[str, Any] = {"lora_r": 3, **tiny.ALL_LORA}
    answers = {}
    for kind, settings in {"lora": lora_settings, "skip2lora": SKIP}.items():
        folder = adapter(base, **settings)
        llm = load(folder)
        assert llm.config.name == "tiny" and llm.model is not None
        answers[kind] = llm.generate("hello", max_new_tokens=20, temperature=0.0)
        if kind == "lora":
            from litgpt.convert.merge import merge_lora

            merge_lora(folder)
            assert load(folder).generate("hello", max_new_tokens=20, temperature=0.0) == answers[kind]
        shutil.rmtree(folder)
    answers["base"] = load(base).generate("hello", max_new_tokens=20, temperature=0.0)
    assert len(set(answers.values())) == 3


def test_tokenizer_and_style_of_an_adapter_folder(base: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    """Its own files count; where it has none, the base's do."""
    folder = adapter(base, **SKIP)
    assert isinstance(load(folder).prompt_style, ChatTemplate)  # the base's template
    save_prompt_style(Alpaca(), folder)
    assert isinstance(load(folder).prompt_style, Alpaca)
    write_tiny_tokenizer(folder)
    (folder / "prompt_style.yaml").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "Q {{ messages[0].content }} A"}))
    assert load(folder).prompt_style.apply("why?") == "Q why? A"


def test_no_template_means_the_prompt_alone(base: Path) -> None:
    (base / "tokenizer_config.json").unlink()
    llm = load(base)
    assert llm.prompt_style.apply("Once upon") == "Once upon"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1000}, r"the model reads at most 256"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"top_k": -1, "stream": True}, "top_k is -1"),
    ],
)
def test_refusals(base: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(base).generate("hello", **settings)


def test_load_refusals(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        LLM.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="precision 'fp8' is unknown"):
        LLM.load(base, precision="fp8")


def test_precisions(base: Path) -> None:
    names = ("32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")
    half, brain = torch.float16, torch.bfloat16
    assert [inference_dtype(name) for name in names] == [torch.float32, brain, half, brain, half]
    llm = LLM.load(base, precision="bf16-true", device="cpu")
    assert llm.model.transformer["wte"].weight.dtype == brain
    assert llm.generate("hello", max_new_tokens=5, temperature=0.0)


def test_foreign_tokenizer_is_noticed(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    folder = tiny.write_base(tmp_path / "small", write_tiny_tokenizer, vocab_size=30, padded_vocab_size=30)
    with pytest.raises(UserError, match="belongs to another model"):
        load(folder).generate("hello")


def test_lazy_name() -> None:
    assert litgpt.LLM is LLM


@pytest.mark.slow
def test_smollm2_knows_the_capital(smollm2_dir: Path) -> None:
    llm = LLM.load(smollm2_dir, precision="32-true", device="cpu")
    text = llm.tokenizer.decode(list(llm.complete("The capital of France is", 2, temperature=0.0)))
    assert text.startswith(" Paris")
    answer = llm.generate("What is the capital of France? Answer with one word.", max_new_tokens=30, temperature=0.0)
    assert "Paris" in answer and "<|im_end|>" not in answer


@pytest.mark.slow
def test_smollm2_greedy_text_of_transformers(smollm2_dir: Path) -> None:
    """The same weights in transformers continue a text by the same 20 tokens."""
    import transformers

    config = Config.from_checkpoint(smollm2_dir)
    hf = tiny.hf_of(config, checkpoint.load_weights(smollm2_dir / "lit_model.pth"))
    llm = LLM.load(smollm2_dir, precision="32-true", device="cpu")
    prompt = llm.tokenizer.encode("Gravity is")[None]
    settings = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
    want = hf.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)[0, prompt.size(1) :].tolist()
    assert list(llm.complete("Gravity is", 20, temperature=0.0)) == want


def test_table_of_a_benchmark() -> None:
    lines = litgpt.api.benchmark_dict_to_markdown_table({"Seconds total": [1.0, 2.0, 6.0], "Tokens generated": [7.0]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["Metric", "Mean", "Std Dev"] and cells[2:] == [
        ["Seconds total", "3.00", "2.65"],
        ["Tokens generated", "7.00", "nan"],
    ]
    assert len({len(line) for line in lines}) == 1
