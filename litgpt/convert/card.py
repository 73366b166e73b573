"""Model cards: the README.md beside an exported model or adapter. All that it says stands in the folders of the run."""

from __future__ import annotations

import inspect
import math
import re
import shlex
from pathlib import Path
from typing import Any, Literal

import yaml

from litgpt import __version__, atomic, files
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.logs import read_metrics
from litgpt.text import markdown_table

Kind = Literal["lora", "skip2lora", "model"]
TITLES: dict[str, str] = {
    "lora": "a LoRA adapter in PEFT's format",
    "skip2lora": "a Skip2-LoRA adapter",
    "model": "a causal language model",
}
LIBRARIES = {"lora": "peft", "skip2lora": "litgpt", "model": "transformers"}
LOADING = {
    "lora": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "{folder}")""",
    "skip2lora": """from transformers import AutoModelForCausalLM, AutoTokenizer
from litgpt.integrations.transformers import load_skip2lora

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
adapter = load_skip2lora(model, "{folder}")  # model.generate(...) uses it now; adapter.remove() takes it off""",
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")""",
}
SECRET_KEY = re.compile(r"(^|_)(access_token|hf_token|token|api_key|key|secret|password)$")
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{12,}")
NOT_SETTINGS = ("checkpoint_dir", "out_dir", "data", "log", "logger_name", "overwrite", "access_token", "eval")


def write_card(folder: Path, source: Path, kind: Kind, name: str | None = None) -> None:
    """Write README.md into `folder`, what was exported of the litgpt folder `source` (an adapter, or a checkpoint of any origin).

    `name`: what `folder` will be called, where it is still a temporary one. A README.md that is there already stays. Never in it:
    tokens, the machine's folders.
    """
    if (folder / "README.md").exists():
        return
    settings = _hyperparameters(source)
    trained = settings.get("train") is not None
    base, about = base_name(source, settings), _base_card(settings)
    front: dict[str, Any] = {"base_model": base} if trained or kind != "model" else {}
    front |= {key: about[key] for key in ("license", "language") if key in about}
    front |= {"library_name": LIBRARIES[kind], "pipeline_tag": "text-generation"}
    if trained and (data := _data(settings)) and data[0]:
        front["datasets"] = [data[0]]
    front["tags"] = ["litgpt", *(["lora"] if kind != "model" else []), *(["skip2-lora"] if kind == "skip2lora" else [])]
    title = f"{TITLES[kind]} for {base}" if kind != "model" else f"{TITLES[kind]}, {'tuned from ' if trained else ''}{base}"
    sections: dict[str, list[str]] = {}
    if trained:
        sections["Data"] = [_data(settings)[1]]
        sections["Settings"] = [markdown_table(["setting", "value"], [[key, text] for key, text in _settings(settings).items()])]
        if losses := _losses(source):
            sections["Result"] = [losses]
        sections["Command"] = [f"With litgpt {__version__}:", f"```sh\n{command(settings)}\n```"]
    sections["Use"] = [f"```python\n{LOADING[kind].format(base=base, folder=name or folder.name)}\n```"]
    if (source / "prompt_style.yaml").is_file() and kind != "model":
        sections["Use"].append("Prompts were put in the form that prompt_style.yaml names.")
    blocks = [f"# {title[0].upper()}{title[1:]}", *(block for heading, parts in sections.items() for block in (f"## {heading}", *parts))]
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(blocks) + "\n"
    atomic.write_text(folder / "README.md", text)


def base_name(source: Path, settings: dict[str, Any] | None = None) -> str:
    """The base model's name on the hub (`org/name`) as far as the folder knows it, else its name here."""
    settings = _hyperparameters(source) if settings is None else settings
    for folder in (source, Path(settings.get("checkpoint_dir") or source)):
        if (folder / "model_config.yaml").is_file():
            config = Config.from_checkpoint(folder)
            origin = config.hf_config
            return f"{origin['org']}/{origin['name']}" if origin.get("org") and origin.get("name") else config.name
    return Path(settings.get("checkpoint_dir") or source).name


def command(settings: dict[str, Any]) -> str:
    """The command that hyperparameters.yaml is of, with what differs from the defaults (loggers' names aside); of paths the last part."""
    from litgpt.args import as_config
    from litgpt.finetune import full, lora

    name, setup = ("finetune", lora.setup) if "lora_r" in settings else ("finetune_full", full.setup)
    defaults = as_config({key: parameter.default for key, parameter in inspect.signature(setup).parameters.items()})
    words = [f"litgpt {name} {shlex.quote(_public(settings.get('checkpoint_dir', '')))}"]
    for key, value in settings.items():
        if key in ("checkpoint_dir", "log") or SECRET_KEY.search(key):
            continue
        if isinstance(value, dict) and "class_path" in value:
            words.append(f"--{key} {_word(_short_class(value['class_path']))}")
            words += _options(key, value.get("init_args") or {}, _class_defaults(value["class_path"]))
        elif isinstance(value, dict) and isinstance(defaults.get(key), dict):
            words += _options(key, value, defaults[key])
        elif value != defaults.get(key):
            words.append(f"--{key} {_word(value)}")
    return " \\\n  ".join(words)


def _options(group: str, values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    changed = {
        key: value for key, value in values.items() if not SECRET_KEY.search(key) and (key not in defaults or defaults[key] != value)
    }
    return [f"--{group}.{key} {_word(value)}" for key, value in changed.items() if value is not None or key in defaults]


def _class_defaults(class_path: str) -> dict[str, Any]:
    """The defaults of a class of litgpt.data; {} for any other, which is not imported by a file's word."""
    from litgpt.args import as_config

    found = _data_class(class_path)
    parameters = inspect.signature(found).parameters.values() if found else ()
    return as_config({p.name: p.default for p in parameters if p.default is not p.empty})


def _short_class(class_path: str) -> str:
    """What --data and --optimizer take: the class alone, where it is one of ours or torch's."""
    return class_path.rpartition(".")[2] if class_path.startswith(("litgpt.data.", "torch.optim.")) else class_path


def _data_class(class_path: str) -> Any:
    import litgpt.data

    module, _, name = class_path.rpartition(".")
    return getattr(litgpt.data, name, None) if module.startswith("litgpt.data") else None


def _word(value: Any) -> str:
    """A value as the command line and YAML take it."""
    if isinstance(value, dict | list):
        value = yaml.safe_dump(_public(value), default_flow_style=True, width=10**6).strip()
    if isinstance(value, bool) or value is None:
        value = {True: "true", False: "false", None: "null"}[value]
    return shlex.quote(_public(str(value)))


def _public(value: Any) -> Any:
    """The value without what is nobody's business: absolute paths become names, tokens and a URL's password three asterisks."""
    if isinstance(value, dict):
        return {key: "***" if SECRET_KEY.search(str(key)) else _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(/|~|[A-Za-z]:[\\/]|\.\.[\\/])", value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    value = value.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else value
    return SECRET_VALUE.sub("***", re.sub(r"(?<=://)[^/@\s]+@", "***@", value))


def _hyperparameters(source: Path) -> dict[str, Any]:
    """hyperparameters.yaml, if a run wrote one."""
    file = source / "hyperparameters.yaml"
    content = files.read_yaml(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings")
    return content


def _base_card(settings: dict[str, Any]) -> dict[str, Any]:
    """The front matter of the base's own README.md, if it has one: its license goes with what is made of it."""
    card = Path(settings.get("checkpoint_dir") or "") / "README.md"
    try:
        text = files.read_text(card) if settings.get("checkpoint_dir") else ""
        front = files.parse_yaml(text.split("---")[1], str(card)) if text.startswith("---") else {}
    except (UserError, IndexError):  # it is somebody else's, and not needed
        return {}
    return front if isinstance(front, dict) else {}


def _data(settings: dict[str, Any]) -> tuple[str | None, str]:
    """The data set's name on the hub, if it has one, and a sentence about the data."""
    data = settings.get("data") or {}
    class_path, values = str(data.get("class_path", "")), data.get("init_args") or {}
    found = _data_class(class_path)
    hub = getattr(found, "repo_id", None)
    parts = [str(_public(str(value))) for key, value in values.items() if key.endswith("path") and value]
    parts += [str(hub)] if hub else []
    told = f"litgpt.data.{class_path.rpartition('.')[2]}" + (f" ({', '.join(parts)})" if parts else "")
    if values.get("val_split_fraction"):
        told += f"; {100 * float(values['val_split_fraction']):g} % of it held out for validation"
    return hub, told + ("; loss on the answers only." if values.get("mask_prompt") else ".")


def _settings(settings: dict[str, Any]) -> dict[str, str]:
    """What the run was told, by its names; switches that are off and empty values left out."""

    def flat(values: dict[str, Any], group: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            if SECRET_KEY.search(key) or value in (None, False, {}, []):
                continue
            if isinstance(value, dict):
                found |= flat(value, group if key == "init_args" else f"{group}{key}.")
            else:
                found[(group + key).removesuffix(".class_path")] = value
        return found

    left_out = (*NOT_SETTINGS, *(() if settings.get("skip2lora_enabled") else (key for key in settings if key.startswith("skip2lora_"))))
    return {key: str(_public(value)) for key, value in flat({k: v for k, v in settings.items() if k not in left_out}).items()}


def _losses(source: Path) -> str | None:
    """The first validation loss and that of the folder's step (`step-*`, `best`; else the last), from metrics.csv beside it."""
    curve = read_metrics(source.resolve().parent).get("val_loss", [])
    name, end = source.resolve().name, curve[-1][0] if curve else 0
    if name == "best" and curve:
        end = min(curve, key=lambda point: point[1])[0]
    elif step := re.fullmatch(r"step-(\d+)", name):
        end = int(step[1])
    curve = [point for point in curve if point[0] <= end]
    if not curve:
        return None
    rows = [("before" if curve[0][0] == 0 else f"step {curve[0][0]}", curve[0][1]), (f"step {curve[-1][0]}", curve[-1][1])]
    shown = [[when, f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}"] for when, loss in (rows if len(curve) > 1 else rows[1:])]
    return markdown_table(["", "validation loss", "perplexity"], shown)
