"""Prompt styles against hand-written texts of the models' cards, and which style a name or a folder has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from litgpt import prompts
from litgpt.errors import UserError
from litgpt.prompts import ChatML, ChatTemplate, PromptStyle, load_prompt_style, resolve_prompt_style, save_prompt_style
from litgpt.tokenizer import Tokenizer
from tests.helpers import tiny

NAMES = sorted(prompts.STYLES)

KNOWN = {
    "default": "Hi",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n"
    ),
    "codellama": "[INST] Hi [/INST]",
    "mistral": "<s>[INST] Hi [/INST]",
    "mistral-v3": "<s>[INST] Hi[/INST]",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "tinyllama": (
        "<|system|>\nYou are a friendly chatbot who always gives helpful, detailed, and polite answers.</s>\n"
        "<|user|>\nHi</s>\n<|assistant|>\n"
    ),
    "phi-3": "<|system|>\nYou are a helpful assistant.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
    "falcon": "User: Hi\n\nAssistant:",
    "falcon3": "<|user|>\nHi\n<|assistant|>\n",
    "llama2-function-calling": "[INST] Hi [/INST]\n\n",
    "freewilly2": "### System:\nThis is a system prompt, please behave and help the user.\n\n### User:\nHi\n\n### Assistant:\n",
    "stablecode": "###Instruction\nHi###Response\n",
    "phi-4": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
    "phi-4-mini": "<|user|>Hi<|end|><|assistant|>",
    "phi-4-mini-reasoning": ("<|system|>Your name is Phi, an AI math expert developed by Microsoft.<|end|><|user|>Hi<|end|><|assistant|>"),
    "phi-2": "Instruct: Hi\nOutput:",
    "gemma": "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "stablelm-zephyr": "<|user|>\nHi<|endoftext|>\n<|assistant|>\n",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: Hi ASSISTANT:"
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_prompt_text(name: str) -> None:
    assert PromptStyle.from_name(name).apply("Hi") == KNOWN[name]


def test_llama2_is_metas_form() -> None:
    text = PromptStyle.from_name("llama2").apply("Hi", sys_prompt="Be brief.")
    assert text == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    default = PromptStyle.from_name("llama2").apply("Hi")
    assert default.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.")
    assert default.endswith("please don't share false information.\n<</SYS>>\n\nHi [/INST]")
    assert PromptStyle.from_name("llama2").apply("Hi", sys_prompt="") == "[INST] Hi [/INST]"


def test_llama2_conversation() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    expected = "[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b</s><s>[INST] c [/INST]"
    assert prompts.Llama2().render(messages, add_generation_prompt=True) == expected


def test_alpaca_with_input_and_system() -> None:
    text = prompts.Alpaca().apply("Add {prompt}", input="2 {system} 2")
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides further context. Write")
    assert text.endswith("\n\n### Instruction:\nAdd {prompt}\n\n### Input:\n2 {system} 2\n\n### Response:\n")
    assert prompts.Alpaca().apply("Hi", sys_prompt="S") == "S\n\n### Instruction:\nHi\n\n### Response:\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_style_carries_prompt_and_input(name: str) -> None:
    text = PromptStyle.from_name(name).apply("THE PROMPT {}", input="THE INPUT {}")
    assert text.index("THE PROMPT {}") < text.index("THE INPUT {}")


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    style = PromptStyle.from_name(name)
    save_prompt_style(style, tmp_path)
    loaded = load_prompt_style(tmp_path)
    assert type(loaded) is type(style)
    assert loaded.apply("Hi") == style.apply("Hi")
    assert resolve_prompt_style(None, tmp_path).apply("Hi") == style.apply("Hi")


def test_save_keeps_the_system_message(tmp_path: Path) -> None:
    save_prompt_style(ChatML("Speak French."), tmp_path)
    assert yaml.safe_load((tmp_path / "prompt_style.yaml").read_text()) == {
        "class_path": "litgpt.prompts.ChatML",
        "init_args": {"system_message": "Speak French."},
    }
    assert "Speak French." in load_prompt_style(tmp_path).apply("Hi")


# every class that LitGPT 0.5.13 writes into the file
UPSTREAM = """
    Default Alpaca FLAN Longform StableLMAlpha StableLMZephyr Falcon Falcon3 Llama2FunctionCalling Llama2 Llama3 R1Base FreeWilly2 Platypus
    StableCode CodeLlama Phi1 Phi2 Phi3 Phi4 Phi4Reasoning Phi4Mini Phi4MiniReasoning TinyLlama Gemma OLMo ChatML Qwen2_5 Qwen2_5_Math QwQ
    Qwen3 SmolLM2 Salamandra
"""


@pytest.mark.parametrize("name", UPSTREAM.split())
def test_upstream_file_loads(name: str, tmp_path: Path) -> None:
    (tmp_path / "prompt_style.yaml").write_text(f"class_path: litgpt.prompts.{name}\ninit_args: {{}}\n")
    assert type(load_prompt_style(tmp_path)) is getattr(prompts, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class_path: os.system\n", "no prompt style is named 'os.system'"),
        ("class_path: litgpt.prompts.Path\n", "no prompt style is named"),
        ("class_path: litgpt.prompts.Alpacca\n", "did you mean 'alpaca'"),
        ("class_path: litgpt.prompts.Alpaca\ninit_args: {x: 1}\n", "do not fit litgpt.prompts.Alpaca"),
        ("!!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("- 1\n", "expected `class_path"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_broken_style_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompt_style.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        load_prompt_style(tmp_path)
    assert message in str(error.value)
    assert "prompt_style.yaml" in str(error.value)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'tinyllama'"):
        PromptStyle.from_name("TinyLama")


def test_resolve_order(write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "checkpoint")
    (folder / "model_config.yaml").write_text("name: Llama-2-7b-chat-hf\n")
    tokenizer = Tokenizer(folder)
    assert isinstance(resolve_prompt_style(None, folder, tokenizer), ChatTemplate)
    assert isinstance(resolve_prompt_style("chat", folder, tokenizer), ChatTemplate)
    assert isinstance(resolve_prompt_style("flan", folder, tokenizer), prompts.FLAN)
    save_prompt_style(prompts.Gemma(), folder)
    assert isinstance(resolve_prompt_style(None, folder, tokenizer), prompts.Gemma)
    (folder / "prompt_style.yaml").unlink()

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert isinstance(resolve_prompt_style(None, folder), prompts.Llama2)
    (folder / "model_config.yaml").write_text("name: pythia-160m\n")
    assert isinstance(resolve_prompt_style(None, folder), prompts.Alpaca)
    assert isinstance(resolve_prompt_style(None, folder, fallback="default"), prompts.Default)
    with pytest.raises(UserError, match="has no chat template"):
        resolve_prompt_style("chat", folder)


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_chat_template_is_read_again_from_the_folder(form: str, write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "checkpoint")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    expected = ChatTemplate(template).apply("Hi")
    if form == "file":
        (folder / "chat_template.jinja").write_text(template)
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        settings["chat_template"] = template if form == "text" else named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    style = resolve_prompt_style("chat", folder)
    save_prompt_style(style, folder)
    assert not (folder / "prompt_style.yaml").exists()  # LitGPT, which reads the folder too, has no such style
    assert resolve_prompt_style(None, folder).apply("Hi") == style.apply("Hi") == expected == KNOWN["chatml"]
    (folder / "prompt_style.yaml").write_text("class_path: litgpt.prompts.ChatTemplate\n")  # of an earlier version
    assert load_prompt_style(folder).apply("Hi") == expected


@pytest.mark.parametrize(
    ("model", "style"),
    [
        ("Llama-2-7b-chat-hf", "Llama2"),
        ("Llama-2-7b-hf", "Default"),
        ("Llama-3.2-1B-Instruct", "Llama3"),
        ("Llama-3.2-1B", "Default"),
        ("tiny-llama-1.1b-chat", "TinyLlama"),
        ("tiny-llama-1.1b", "Default"),
        ("SmolLM2-135M-Instruct", "SmolLM2"),
        ("SmolLM2-135M", "Default"),
        ("CodeLlama-7b-Instruct-hf", "CodeLlama"),
        ("Mistral-7B-Instruct-v0.3", "MistralV3"),
        ("Mixtral-8x7B-Instruct-v0.1", "Mistral"),
        ("pythia-160m", "Default"),
        ("Phi-3-mini-4k-instruct", "Phi3"),
        ("Gemma-2-2b-it", "Gemma"),
        ("Gemma-2-2b", "Default"),
        ("Qwen2.5-0.5B-Instruct", "Qwen2_5"),
        ("stablelm-zephyr-3b", "StableLMZephyr"),
    ],
)
def test_style_by_model_name(model: str, style: str) -> None:
    assert type(PromptStyle.from_config(SimpleNamespace(name=model))).__name__ == style


def test_stop_tokens(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert PromptStyle.from_name("alpaca").stop_tokens(tokenizer) == ([2],)
    assert PromptStyle.from_name("olmo").stop_tokens(tokenizer) == ([0], [2])  # <|endoftext|> ends its turns
    assert PromptStyle.from_name("llama3").stop_tokens(tokenizer) == ([2],)  # <|eot_id|> is unknown here


def test_light_import() -> None:
    heavy = "{'torch', 'numpy', 'jinja2', 'tokenizers', 'transformers', 'lightning', 'rich', 'huggingface_hub'}"
    code = f"import sys, litgpt.prompts, litgpt.data; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_conversation_and_litgpts_names(tmp_path: Path) -> None:
    style = PromptStyle.from_name("llama3")
    question = [{"role": "user", "content": "Why?"}]
    assert style.apply(question) == style.apply("Why?")  # type: ignore[arg-type]
    assert style.apply(question, sys_prompt="Be brief.") == style.apply("Why?", sys_prompt="Be brief.")  # type: ignore[arg-type]
    assert prompts.prompt_styles["llama3"] is type(style) is type(prompts.model_name_to_prompt_style("Llama-3-8B-Instruct"))
    assert not prompts.has_prompt_style(tmp_path)
    save_prompt_style("alpaca", tmp_path)
    assert prompts.has_prompt_style(tmp_path) and load_prompt_style(tmp_path).name == "alpaca"


@pytest.mark.parametrize("template", [tiny.THINKING, tiny.CHANNELS])
def test_a_generated_reply_is_read_as_the_template_writes_it(template: str, tiny_tokenizer_dir: Path) -> None:
    """What the template renders behind the prompt, up to the stop token, gives the message again."""
    style, tokenizer = ChatTemplate(template, eos_token="<|im_end|>"), Tokenizer(tiny_tokenizer_dir)
    asked = [{"role": "user", "content": "Hi"}]
    head = style.render(asked, add_generation_prompt=True)
    for more in ({}, {"reasoning_content": "They greet.\n\nSo I do."}):
        reply = {"role": "assistant", "content": "Hello,\n\nyou.", **more}
        text = style.render([*asked, reply]).removeprefix(head).strip().removesuffix("<|im_end|>")
        assert prompts.read_reply(text, style, tokenizer) == reply
        assert prompts.read_reply(f"\n{text}\n", style, tokenizer) == reply
        reader, parts = prompts.ReplyReader(style, tokenizer), ["", ""]
        for piece in (*re.findall(r"<\|\w+\|>|.", text, re.DOTALL), "\n", ""):  # a special token is one piece
            for index, part in enumerate(reader.push(piece, is_last=not piece)):
                parts[index] += part
                assert reply["content"].startswith(parts[1])  # what was shown is not taken back
        assert parts == [more.get("reasoning_content", ""), reply["content"]]
    text = style.render([*asked, {"role": "assistant", "content": "Hello", "reasoning_content": "They gr"}]).removeprefix(head)
    for end in range(text.index("They gr") + len("They gr"), text.index("Hello")):  # cut off
        expected = {"role": "assistant", "content": "", "reasoning_content": "They gr"}
        assert prompts.read_reply(text[:end], style, tokenizer) == expected
    assert prompts.read_reply(" Hello<|im_start|> ", style, tokenizer) == {"role": "assistant", "content": "Hello"}


def test_a_reply_of_a_template_without_reasoning_is_its_content(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    labelled = (  # no mark between reasoning and content, or a word that contents may have
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.reasoning_content %}{{ 'Because ' + m.reasoning_content + 'MARK' }}{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for style in (tokenizer_template(tokenizer), ChatTemplate(labelled.replace("MARK", " ")), PromptStyle.from_name("alpaca")):
        for text in ("<think>\nwhy\n</think>\n\nHello", "Because I say so", ""):
            assert prompts.read_reply(text, style, tokenizer) == {"role": "assistant", "content": text}
    style = ChatTemplate(labelled.replace("MARK", " So: "))
    assert prompts.read_reply("It is. So: yes", style, tokenizer)["content"] == "It is. So: yes"
    assert prompts.read_reply("Because it is. So: yes", style, tokenizer) == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "it is.",
    }


def tokenizer_template(tokenizer: Tokenizer) -> ChatTemplate:
    template = ChatTemplate.from_tokenizer(tokenizer)
    assert template is not None
    return template
