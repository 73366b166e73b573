"""Bad checkpoint folders: weights, model_config.yaml, tokenizer files, prompt styles and adapter folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.cases import quick
from tests.helpers.places import Case, Place, check


def generate(spoil: Callable[[Path], Any], *more: Any) -> Callable[[Place], list[Any]]:
    """`litgpt generate` on a spoilt checkpoint."""

    def words(place: Place) -> list[Any]:
        folder = place.base()
        spoil(folder)
        return ["generate", folder, "--max_new_tokens", 2, *more]

    return words


def finetune(spoil: Callable[[Path], Any]) -> Callable[[Place], list[Any]]:
    def words(place: Place) -> list[Any]:
        folder, data = place.base(), place.data()
        spoil(folder)
        return ["finetune_lora", folder, "--data", "JSON", "--data.json_path", data, "--out_dir", "out", "--max_steps", 1]

    return words


def adapter(spoil: Callable[[Path], Any], command: str = "generate") -> Callable[[Place], list[Any]]:
    def words(place: Place) -> list[Any]:
        folder = place.adapter()
        spoil(folder)
        return [command, folder]

    return words


def file(name: str, content: Any) -> Callable[[Path], Any]:
    """Put this in place of a file: bytes, text, or anything else as JSON; None: nothing, ...: a folder."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is ...:
            (folder / name).mkdir()
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return spoil


def config(**changes: Any) -> Callable[[Path], Any]:
    """Change fields of model_config.yaml; ... leaves one out."""

    def spoil(folder: Path) -> None:
        path = folder / "model_config.yaml"
        values = {**yaml.safe_load(path.read_text()), **changes}
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))

    return spoil


def settings(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Change keys of a JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return spoil


def weights(change: Callable[[dict[Any, Any]], Any], name: str = "lit_model.pth") -> Callable[[Path], Any]:
    """Change the state dict, or give another content."""

    def spoil(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, folder / name)

    return spoil


def cut(name: str, share: float) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return spoil


def tokens(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change tokenizer.json."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return spoil


def new_token(folder: Path) -> None:
    """A token that the model has no row for."""
    tokens(lambda content: content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<new>"}))(folder)


def hyperparameters(text: str) -> Callable[[Path], Any]:
    return file("hyperparameters.yaml", text)


WTE, QKV = "transformer.wte.weight", "transformer.h.0.attn.qkv.weight"
TEMPLATE = "{% for message in messages %}{{ message.content }}"
CHECKPOINT = "lit_model.pth"

WEIGHTS = [
    Case("no folder", lambda place: ["generate", "nowhere"], "nowhere does not exist", "litgpt download list"),
    Case("a file for the folder", lambda place: ["generate", place.write("c", "")], "c", "folder"),
    Case(
        "an empty folder", lambda place: ["generate", place.write("d/x/y", "").parent.parent], "d lacks lit_model.pth", "model_config.yaml"
    ),
    Case(
        "a folder in a loop of links",
        lambda place: [os.symlink("loop", place.folder / "loop"), ["generate", "loop"]][1],
        "loop",
        "does not exist",
    ),
    Case("no weights", generate(file(CHECKPOINT, None)), "lacks lit_model.pth", "convert"),
    Case("no config", generate(file("model_config.yaml", None)), "lacks model_config.yaml", "convert"),
    Case("no tokenizer", generate(file("tokenizer.json", None)), "lacks tokenizer.json", "convert"),
    Case("a folder for the weights", generate(file(CHECKPOINT, ...)), "lit_model.pth (a folder has this name)", "copy what is missing"),
    Case(
        "a folder for the config",
        generate(file("model_config.yaml", ...)),
        "model_config.yaml (a folder has this name)",
        "copy what is missing",
    ),
    Case("a folder for the tokenizer", generate(file("tokenizer.json", ...)), "lacks tokenizer.json", "copy what is missing"),
    Case("empty weights", generate(file(CHECKPOINT, b"")), "lit_model.pth is not a readable checkpoint", "truncated"),
    Case("half the weights", generate(cut(CHECKPOINT, 0.5)), "lit_model.pth is not a readable checkpoint", "truncated"),
    Case("nearly all weights", generate(cut(CHECKPOINT, 0.999)), "lit_model.pth is not a readable checkpoint", "truncated"),
    Case("text for weights", generate(file(CHECKPOINT, "weights")), "lit_model.pth is not a readable checkpoint", "plain tensors"),
    Case("a Git LFS pointer", generate(file(CHECKPOINT, "version https://git-lfs.github.com/spec/v1\n")), "lit_model.pth", "plain tensors"),
    Case(
        "safetensors for weights",
        lambda place: [shutil.copyfile(place.hf() / "model.safetensors", place.base() / CHECKPOINT), ["generate", "base"]][1],
        "lit_model.pth is not a readable checkpoint",
        "plain tensors",
    ),
    Case(
        "a zip of something else",
        generate(
            lambda folder: (
                file(CHECKPOINT, None)(folder)
                or (
                    shutil.make_archive(str(folder / "z"), "zip", folder, "tokenizer.json")
                    and (folder / "z.zip").rename(folder / CHECKPOINT)
                )
            )
        ),
        "lit_model.pth is not a readable checkpoint",
        "plain tensors",
    ),
    Case("a pickle of the old kind", generate(file(CHECKPOINT, pickle.dumps({"a": 1}))), "lit_model.pth", "plain tensors"),
    Case(
        "a whole module", generate(lambda folder: torch.save(torch.nn.Linear(2, 2), folder / CHECKPOINT)), "lit_model.pth", "plain tensors"
    ),
    Case("a number", generate(weights(lambda state: 3)), "lit_model.pth holds no state dict", "tensors"),
    Case("a list of tensors", generate(weights(lambda state: [*state.values()])), "lit_model.pth holds no state dict", "tensors"),
    Case("numbers for tensors", generate(weights(lambda state: dict.fromkeys(state, 1.0))), "lit_model.pth holds no state dict", "tensors"),
    Case("no tensors", generate(weights(lambda state: {})), "lit_model.pth holds 0 tensors", "too few for the 2 blocks"),
    Case(
        "numbers as names",
        generate(weights(lambda state: dict(enumerate(state.values())))),
        "lit_model.pth",
        "tensors",
    ),
    Case(
        "an optimizer's state",
        generate(weights(lambda state: {"state": {}, "param_groups": [{"lr": 1.0}]})),
        "lit_model.pth holds no state dict",
        "tensors",
    ),
    Case("a missing tensor", generate(weights(lambda state: [state.pop(QKV)][1:] or None)), QKV, "is missing"),
    Case("an unknown tensor", generate(weights(lambda state: state.update(extra=torch.zeros(2)))), "extra", "is unknown"),
    Case(
        "other names",
        generate(weights(lambda state: {key.replace(".qkv.", ".wqkv."): value for key, value in state.items()})),
        QKV,
        "is missing",
    ),
    Case(
        "Hugging Face's names",
        generate(weights(lambda state: {f"model.{key}": value for key, value in state.items()})),
        "model.transformer",
        "is unknown",
    ),
    Case(
        "5,000 unknown tensors",
        generate(weights(lambda state: state.update({f"x{i}": torch.zeros(1) for i in range(5000)}))),
        "x0",
        "unknown",
    ),
    Case(
        "a wrong shape", generate(weights(lambda state: state.update({QKV: torch.zeros(3, 3)}))), f"{QKV} has shape (3, 3)", "not (64, 32)"
    ),
    Case(
        "a turned tensor",
        generate(weights(lambda state: state.update({QKV: state[QKV].T.contiguous()}))),
        f"{QKV} has shape (32, 64)",
        "not (64, 32)",
    ),
    Case("a scalar", generate(weights(lambda state: state.update({QKV: torch.tensor(1.0)}))), f"{QKV} has shape ()", "not (64, 32)"),
    Case("whole numbers", generate(weights(lambda state: state.update({QKV: torch.zeros(64, 32, dtype=torch.int64)}))), QKV, "floating"),
    Case(
        "complex numbers", generate(weights(lambda state: state.update({QKV: torch.zeros(64, 32, dtype=torch.complex64)}))), QKV, "floating"
    ),
    Case("a sparse tensor", generate(weights(lambda state: state.update({QKV: torch.zeros(64, 32).to_sparse()}))), QKV, "dense"),
    Case(
        "a quantised tensor",
        generate(weights(lambda state: state.update({QKV: torch.quantize_per_tensor(torch.zeros(64, 32), 0.1, 0, torch.qint8)}))),
        f"{QKV} is not a dense tensor",
        "ordinary tensor",
    ),
    Case("negated views", generate(weights(lambda state: state.update({QKV: torch._neg_view(state[QKV])}))), QKV, "is not a dense tensor"),
    Case(
        "a nested tensor",
        generate(weights(lambda state: state.update({QKV: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}))),
        QKV,
        "is not a dense tensor",
    ),
    Case("8-bit floats", generate(weights(lambda state: state.update({QKV: state[QKV].to(torch.float8_e4m3fn)}))), QKV, "is quantised"),
    Case("a tensor without data", generate(weights(lambda state: state.update({QKV: torch.zeros(64, 32, device="meta")}))), QKV, "no data"),
]
CONFIG = [
    Case("an empty config", generate(file("model_config.yaml", "")), "model_config.yaml holds no settings", "convert"),
    Case("a list as config", generate(file("model_config.yaml", "- 1\n")), "model_config.yaml holds no settings", "convert"),
    Case("no YAML", generate(file("model_config.yaml", "a: [1\n")), "model_config.yaml, line", "not valid YAML"),
    Case("binary", generate(file("model_config.yaml", bytes(range(256)))), "model_config.yaml", "UTF-8"),
    Case(
        "a Python object",
        generate(file("model_config.yaml", "n_layer: !!python/object/apply:os.system [id]\n")),
        "model_config.yaml, line 1",
        "not valid YAML",
    ),
    Case("deep", generate(file("model_config.yaml", "n_layer: " + "[" * 5000 + "]" * 5000)), "model_config.yaml", "nested too deeply"),
    Case("an unknown field", generate(config(n_layrs=2)), "unknown field 'n_layrs'", "did you mean n_layer"),
    Case("another unknown field", generate(config(rotary_percent=0.5)), "unknown field 'rotary_percent'", "did you mean rotary_percentage"),
    Case("a number as field", generate(config(**{"5": 1})), "unknown field '5'", "model_config.yaml"),
    Case("half a latent attention", generate(config(latent_attention={"q": 1})), "latent_attention is {'q': 1}", "a mapping of"),
    Case("text for a size", generate(config(n_layer="two")), "n_layer is 'two'", "whole number from 1"),
    Case("a fraction for a size", generate(config(n_embd=32.5)), "n_embd is 32.5", "whole number from 1"),
    Case("a switch for a size", generate(config(n_head=True)), "n_head is True", "whole number from 1"),
    Case("no blocks", generate(config(n_layer=0)), "n_layer is 0", "whole number from 1"),
    Case("negative", generate(config(vocab_size=-1)), "vocab_size is -1", "whole number from 1"),
    Case("a billion blocks", generate(config(n_layer=10**9)), "model_config.yaml", "n_layer"),
    Case("a huge width", generate(config(n_embd=2**62)), "n_embd", "model_config.yaml"),
    Case(
        "a huge vocabulary",
        generate(config(vocab_size=2**30, padded_vocab_size=2**30)),
        "transformer.wte.weight has shape",
        "(1073741824, 32)",
    ),
    Case("an impossible vocabulary", generate(config(vocab_size=2**40)), "vocab_size is 1099511627776", "from 1 to 2147483647"),
    Case("impossible products", generate(config(n_head=2**30, head_size=2**30)), "the sizes that model_config.yaml gives", "overflowed"),
    Case("more blocks than weights", generate(config(n_layer=3)), "transformer.h.2", "is missing"),
    Case("fewer blocks than weights", generate(config(n_layer=1)), "transformer.h.1", "is unknown"),
    Case("another width", generate(config(n_embd=64)), "has shape", "not ("),
    Case("groups that do not divide", generate(config(n_query_groups=3)), "n_head (4)", "n_query_groups (3)"),
    Case("heads that do not divide", generate(config(n_head=5, head_size=...)), "n_embd (32)", "n_head (5)"),
    Case("an unknown norm", generate(config(norm_class_name="BatchNorm")), "norm_class_name 'BatchNorm'", "RMSNorm"),
    Case("an unknown MLP", generate(config(mlp_class_name="os.system")), "mlp_class_name 'os.system'", "LLaMAMLP"),
    Case("text for eps", generate(config(norm_eps="small")), "norm_eps is 'small'", "number"),
    Case("no number for eps", generate(config(norm_eps=float("nan"))), "norm_eps is nan", "number"),
    Case("text for a switch", generate(config(bias="no")), "bias is 'no'", "true or false"),
    Case("a share of 3", generate(config(rotary_percentage=3.0)), "rotary_percentage is 3.0", "from 0 to 1"),
    Case("a rope base of 0", generate(config(rope_base=0)), "rope_base is 0", "a positive number"),
    Case("rope scaling of nothing", generate(config(rope_adjustments={"factor": "x"})), "rope_adjustments", "factor"),
    Case("rope scaling as a list", generate(config(rope_adjustments=[1])), "rope_adjustments", "mapping"),
    Case("a window of text", generate(config(sliding_window_size="wide")), "sliding_window_size is 'wide'", "whole number"),
    Case(
        "a window index too few",
        generate(config(sliding_window_size=4, sliding_window_indices=[1])),
        "sliding_window_indices",
        "one for each of the 2 blocks",
    ),
]
TOKENIZER = [
    Case("an empty tokenizer", generate(file("tokenizer.json", "")), "tokenizer.json is not a readable tokenizer", "Copy it again"),
    Case("an empty object", generate(file("tokenizer.json", {})), "tokenizer.json is not a readable tokenizer", "Copy it again"),
    Case(
        "another JSON",
        generate(file("tokenizer.json", {"model_max_length": 5})),
        "tokenizer.json is not a readable tokenizer",
        "Copy it again",
    ),
    Case("half a tokenizer", generate(cut("tokenizer.json", 0.5)), "tokenizer.json is not a readable tokenizer", "Copy it again"),
    Case(
        "a binary tokenizer",
        generate(file("tokenizer.json", bytes(range(256)))),
        "tokenizer.json is not a readable tokenizer",
        "Copy it again",
    ),
    Case(
        "an unknown kind",
        generate(tokens(lambda content: content["model"].update(type="Telepathy"))),
        "tokenizer.json is not a readable tokenizer",
        "Copy it again",
    ),
    Case(
        "a merge of unknown tokens",
        generate(tokens(lambda content: content["model"]["merges"].append(["no", "such"]))),
        "tokenizer.json is not",
        "Copy it again",
    ),
    Case(
        "a broken pattern",
        generate(
            tokens(
                lambda content: content.update(
                    pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
                )
            )
        ),
        "tokenizer.json is not a readable tokenizer",
        "Copy it again",
    ),
    Case(
        "only tokenizer.model",
        generate(lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model")),
        "only tokenizer.model",
        "tokenizer.json is needed",
    ),
    Case(
        "more tokens than the model",
        generate(new_token, "--prompt", "a <new> b"),
        "the prompt holds token id 320",
        "belongs to another model",
    ),
    Case(
        "training with more tokens",
        finetune(
            lambda folder: (
                new_token(folder),
                (folder.parent / "data.json").write_text(json.dumps([{"prompt": "<new>", "response": "a"}] * 3)),
            )
        ),
        "tokenizer.json gives the token id 320",
        "another model, copy it again",
    ),
    Case(
        "no JSON in its config", generate(file("tokenizer_config.json", "{")), "tokenizer_config.json, line 1, column 2", "not valid JSON"
    ),
    Case(
        "a list as its config", generate(file("tokenizer_config.json", [])), "tokenizer_config.json holds no JSON object", "copy it again"
    ),
    Case("a folder as its config", generate(file("tokenizer_config.json", ...)), "tokenizer_config.json", "is a folder"),
    Case("deep JSON", generate(file("tokenizer_config.json", '{"a":' * 100_000)), "tokenizer_config.json", "nested too deeply"),
    Case(
        "a number of 5,000 digits",
        generate(file("generation_config.json", '{"eos_token_id": ' + "9" * 5000 + "}")),
        "generation_config.json",
        "number",
    ),
    Case(
        "an end beyond the vocabulary",
        generate(settings("generation_config.json", eos_token_id=[2, 5000])),
        "generation_config.json",
        "5000",
    ),
    Case("a beginning as text", generate(settings("generation_config.json", bos_token_id="zero")), "generation_config.json", "'zero'"),
    Case(
        "an unknown end",
        generate(
            lambda folder: (
                settings("tokenizer_config.json", eos_token="<no such token>")(folder),
                file("generation_config.json", None)(folder),
            )
        ),
        "tokenizer_config.json",
        "'<no such token>'",
    ),
    Case("an end that is a list", generate(settings("tokenizer_config.json", eos_token=["a"])), "tokenizer_config.json", "eos_token"),
    Case(
        "a template of another kind", generate(settings("tokenizer_config.json", chat_template=5)), "tokenizer_config.json", "chat_template"
    ),
    Case(
        "a broken template",
        generate(settings("tokenizer_config.json", chat_template=TEMPLATE)),
        "chat template failed (line 1)",
        "Choose another prompt style",
    ),
    Case(
        "a template's unknown filter",
        generate(settings("tokenizer_config.json", chat_template="{{ messages | shout }}")),
        "'shout'",
        "Choose another prompt style",
    ),
    Case(
        "a template's unknown name",
        generate(settings("tokenizer_config.json", chat_template="{{ missing.thing }}")),
        "'missing' is undefined",
        "Choose another prompt style",
    ),
    Case(
        "a template that refuses",
        generate(settings("tokenizer_config.json", chat_template="{{ raise_exception('no, not you') }}")),
        "no, not you",
        "Choose another prompt style",
    ),
    Case(
        "a template with no end",
        generate(
            settings(
                "tokenizer_config.json", chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            )
        ),
        "more than",
        "Choose another prompt style",
    ),
    Case(
        "a template that includes files",
        generate(settings("tokenizer_config.json", chat_template="{% include '/etc/passwd' %}")),
        "chat template failed",
        "Choose another prompt style",
    ),
    Case("a huge template", generate(settings("tokenizer_config.json", chat_template="x" * 300_000)), "300,000 characters", "at most"),
    Case(
        "a template file of bytes",
        generate(
            lambda folder: (settings("tokenizer_config.json", chat_template=...)(folder), file("chat_template.jinja", b"\xff\xfe")(folder))
        ),
        "chat_template.jinja",
        "UTF-8",
    ),
    Case(
        "a template that says nothing",
        generate(settings("tokenizer_config.json", chat_template="")),
        "the prompt is empty",
        "nothing to continue",
    ),
]
STYLE = [
    Case(
        "a style misspelt",
        generate(file("prompt_style.yaml", "class_path: litgpt.prompts.Alpca\n")),
        "prompt_style.yaml",
        "did you mean 'alpaca'",
    ),
    Case("a foreign style", generate(file("prompt_style.yaml", "class_path: os.system\n")), "prompt_style.yaml", "There are"),
    Case(
        "a style that is no style",
        generate(file("prompt_style.yaml", "class_path: litgpt.prompts.Path\n")),
        "prompt_style.yaml",
        "There are",
    ),
    Case(
        "a style's unknown argument",
        generate(file("prompt_style.yaml", "class_path: litgpt.prompts.Alpaca\ninit_args: {system: x}\n")),
        "prompt_style.yaml",
        "init_args",
    ),
    Case(
        "arguments as a list",
        generate(file("prompt_style.yaml", "class_path: litgpt.prompts.Alpaca\ninit_args: [x]\n")),
        "prompt_style.yaml",
        "init_args",
    ),
    Case(
        "a message of another kind",
        generate(file("prompt_style.yaml", "class_path: litgpt.prompts.ChatML\ninit_args: {system_message: [1]}\n")),
        "prompt_style.yaml",
        "system_message",
    ),
    Case("an empty style", generate(file("prompt_style.yaml", "")), "prompt_style.yaml", "`class_path: litgpt.prompts.NAME`"),
    Case("a style as a list", generate(file("prompt_style.yaml", "[1]")), "prompt_style.yaml", "`class_path: litgpt.prompts.NAME`"),
    Case("a style of bytes", generate(file("prompt_style.yaml", b"\xff\xfe\x00")), "prompt_style.yaml", "UTF-8"),
    Case("a folder as a style", generate(file("prompt_style.yaml", ...)), "prompt_style.yaml", "is a folder"),
    Case(
        "a Python object as a style",
        generate(file("prompt_style.yaml", "!!python/object/apply:os.system [id]\n")),
        "prompt_style.yaml, line 1",
        "not valid YAML",
    ),
    Case(
        "the template that is not there",
        finetune(
            lambda folder: (
                settings("tokenizer_config.json", chat_template=...)(folder),
                file("prompt_style.yaml", "class_path: litgpt.prompts.ChatTemplate\n")(folder),
            )
        ),
        "has no chat template",
        "choose a prompt style by name",
    ),
]
ADAPTER = [
    Case("no adapter", lambda place: ["merge_lora", place.base()], "base holds no adapter", "`litgpt finetune`"),
    Case(
        "no folder to merge",
        lambda place: ["merge_lora", "nowhere"],
        "nowhere holds no adapter",
        "Name a folder that `litgpt finetune` wrote",
    ),
    Case("no settings", adapter(hyperparameters("")), "hyperparameters.yaml", "checkpoint_dir"),
    Case("settings as a list", adapter(hyperparameters("- 1\n")), "hyperparameters.yaml", "checkpoint_dir"),
    Case("settings of nothing", adapter(hyperparameters("lora_r: 2\n")), "hyperparameters.yaml", "checkpoint_dir"),
    Case("settings that are no YAML", adapter(hyperparameters("a: [1\n")), "hyperparameters.yaml", "not valid YAML"),
    Case(
        "settings of bytes",
        adapter(hyperparameters("checkpoint_dir: b\n").__call__ and file("hyperparameters.yaml", b"\xff\xfe\x00")),
        "hyperparameters.yaml",
        "UTF-8",
    ),
    Case(
        "a base that is gone",
        adapter(hyperparameters("checkpoint_dir: nowhere\nlora_r: 2\n")),
        "hyperparameters.yaml names nowhere",
        "correct checkpoint_dir",
    ),
    Case("a base of another kind", adapter(hyperparameters("checkpoint_dir: [1]\nlora_r: 2\n")), "hyperparameters.yaml", "checkpoint_dir"),
    Case(
        "a rank of text",
        adapter(lambda folder: (folder / "hyperparameters.yaml").write_text("checkpoint_dir: base\nlora_r: two\nlora_query: true\n")),
        "hyperparameters.yaml",
        "lora_r",
    ),
    Case(
        "another rank",
        adapter(lambda folder: (folder / "hyperparameters.yaml").write_text("checkpoint_dir: base\nlora_r: 3\nlora_query: true\n")),
        "lora_A has shape (2, 32)",
        "not (3, 32)",
    ),
    Case(
        "other layers",
        adapter(lambda folder: (folder / "hyperparameters.yaml").write_text("checkpoint_dir: base\nlora_r: 2\nlora_mlp: true\n")),
        "mlp.fc_1",
        "is missing",
    ),
    Case(
        "an alpha of text",
        adapter(
            lambda folder: (folder / "hyperparameters.yaml").write_text(
                "checkpoint_dir: base\nlora_r: 2\nlora_alpha: big\nlora_query: true\n"
            )
        ),
        "hyperparameters.yaml",
        "lora_alpha",
    ),
    Case(
        "a rank of a billion",
        adapter(
            lambda folder: (folder / "hyperparameters.yaml").write_text("checkpoint_dir: base\nlora_r: 1000000000\nlora_query: true\n")
        ),
        "hyperparameters.yaml: lora_r is 1000000000",
        "from 0 to 65536",
    ),
    Case("half the adapter", adapter(cut("lit_model.pth.lora", 0.5)), "lit_model.pth.lora is not a readable checkpoint", "truncated"),
    Case(
        "an adapter of text", adapter(file("lit_model.pth.lora", "x")), "lit_model.pth.lora is not a readable checkpoint", "plain tensors"
    ),
    Case(
        "an adapter of nothing",
        adapter(weights(lambda state: {"model": {}}, "lit_model.pth.lora")),
        "lit_model.pth.lora does not fit",
        "is missing",
    ),
    Case(
        "an adapter of whole numbers",
        adapter(weights(lambda state: {"model": {key: value.long() for key, value in state["model"].items()}}, "lit_model.pth.lora")),
        "lit_model.pth.lora",
        "floating",
    ),
    Case(
        "an adapter on an adapter",
        lambda place: ["finetune_lora", place.adapter(), "--data", "JSON", "--data.json_path", place.data(), "--out_dir", "out"],
        "adapter",
        "adapter",
    ),
    Case(
        "merging in an unknown precision",
        lambda place: ["merge_lora", place.adapter(), "--precision", "int8"],
        "precision 'int8'",
        "bf16-true",
    ),
    Case(
        "merging with another base",
        lambda place: ["merge_lora", place.adapter(), "--pretrained_checkpoint_dir", "other"],
        "other does not exist",
        "litgpt download list",
    ),
    Case(
        "merging what is merged",
        adapter(lambda folder: file("lit_model.pth", "x")(folder), "merge_lora"),
        "lit_model.pth exists already",
        "move it away",
    ),
    Case(
        "merging a precision of a list",
        adapter(
            lambda folder: (folder / "hyperparameters.yaml").write_text(
                "checkpoint_dir: base\nlora_r: 2\nlora_query: true\nprecision: [1]\n"
            ),
            "merge_lora",
        ),
        "precision",
        "bf16-true",
    ),
]
ROWS = [*WEIGHTS, *CONFIG, *TOKENIZER, *STYLE, *ADAPTER]


SLOW = {"5,000 unknown tensors", "deep", "training with more tokens"}


@pytest.mark.parametrize("case", quick(ROWS, *(case for case in ROWS[::3] if case.name not in SLOW)), ids=lambda case: case.name)
def test_bad_checkpoint(case: Case, place: Place) -> None:
    check(case, place)


def test_bad_checkpoints_have_names_of_their_own() -> None:
    assert len({case.name for case in ROWS}) == len(ROWS)
