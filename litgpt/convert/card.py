"""Model cards: the README.md of an exported model or adapter, written from the files of the run."""

import math
import re
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple

from litgpt import __version__, args, atomic, data as data_modules, files
from litgpt.checkpoint import read_hyperparameters
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.finetune.full import Full
from litgpt.finetune.lora import Lora
from litgpt.logs import read_metrics
from litgpt.pretrain import Pretrain
from litgpt.prompts import has_prompt_style
from litgpt.text import markdown_table

Kind = Literal["lora", "skip2lora", "model"]


class Words(NamedTuple):
    """The parts of a card that differ between kinds of export."""

    title: str
    library: str
    tags: list[str]
    loading: str


WORDS: dict[Kind, Words] = {
    "lora": Words(
        "a LoRA adapter in PEFT's format",
        "peft",
        ["litgpt", "lora"],
        """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "{folder}")""",
    ),
    "skip2lora": Words(
        "a Skip2-LoRA adapter",
        "litgpt",
        ["litgpt", "lora", "skip2-lora"],
        """from transformers import AutoModelForCausalLM, AutoTokenizer
from litgpt.integrations.transformers import load_skip2lora

base = "{base}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
adapter = load_skip2lora(model, "{folder}")  # model.generate(...) uses it now; adapter.remove() takes it off""",
    ),
    "model": Words(
        "a causal language model",
        "transformers",
        ["litgpt"],
        """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")""",
    ),
}
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{12,}")
NOT_IN_TABLE = ("checkpoint_dir", "data", "out_dir", "log", "logger_name", "eval")  # elsewhere in the card, or not part of the training


def write_card(folder: Path, source: Path, kind: Kind, name: str | None = None) -> None:
    """Write README.md into `folder`, an export of the litgpt folder `source` (an adapter, or a checkpoint of any origin).

    An existing README.md is kept. Secrets and the machine's paths are left out. `name` is the final name of `folder`, if it has a
    temporary one.
    """
    if (folder / "README.md").exists():
        return
    settings, words = read_hyperparameters(source), WORDS[kind]
    trained, start = settings.get("train") is not None, _start(settings)
    base, dataset = base_name(source, settings), _data_class(settings.get("data") or {})
    front: dict[str, Any] = {"base_model": base} if (trained and start) or kind != "model" else {}
    front |= {key: value for key, value in _base_card(settings).items() if key in ("license", "language")}
    front |= {"library_name": words.library, "pipeline_tag": "text-generation"}
    if trained and (hub_name := getattr(dataset, "repo_id", None)):
        front["datasets"] = [hub_name]
    front["tags"] = words.tags
    origin = "tuned from " if trained and start else "trained from scratch in the shape of " if trained else ""
    title = f"{words.title} for {base}" if kind != "model" else f"{words.title}, {origin}{base}"
    blocks = [f"# {title[0].upper()}{title[1:]}"]
    if trained:
        blocks += ["## Data", _describe_data(settings.get("data") or {})]
        blocks += ["## Settings", _table(settings)]
        if losses := _losses(source):
            blocks += ["## Result", losses]
        blocks += ["## Command", f"With litgpt {__version__}:", f"```sh\n{command(settings)}\n```"]
    blocks += ["## Use", f"```python\n{words.loading.format(base=base, folder=name or folder.name)}\n```"]
    if has_prompt_style(source) and kind != "model":
        blocks.append("The prompts had the form that prompt_style.yaml names.")
    atomic.write_text(folder / "README.md", f"---\n{files.dump_yaml(front)}---\n\n" + "\n\n".join(blocks) + "\n")


def base_name(source: Path, settings: dict[str, Any]) -> str:
    """Return the base model's name on the hub (`org/name`) if the folder or its base states it, else its local name."""
    base = Path(settings.get("checkpoint_dir") or source)
    for folder in (source, base):
        if (folder / "model_config.yaml").is_file():
            config = Config.from_checkpoint(folder)
            org, name = (config.hf_config.get(key) for key in ("org", "name"))
            return f"{org}/{name}" if org and name else config.name
    return base.name


def command(settings: dict[str, Any]) -> str:
    """Return the command for these settings: those that differ from the defaults, without loggers' names, paths by their last part."""
    kind: Any = Lora if "lora_r" in settings else Pretrain if "model_name" in settings else Full
    name = "pretrain" if kind is Pretrain else f"finetune_{kind.__name__.lower()}"
    defaults = _flat(args.as_config(args.defaults(kind)))
    if data := _data_class(settings.get("data") or {}):
        defaults |= {f"data.{key}": value for key, value in args.as_config(args.defaults(data)).items()}
    words = [f"litgpt {name}" + (f" {shlex.quote(_public(folder))}" if (folder := settings.get("checkpoint_dir")) else "")]
    for key, value in _flat({key: value for key, value in settings.items() if key not in ("checkpoint_dir", "log")}).items():
        if value != defaults.get(key):
            words.append(f"{shlex.quote(f'--{key}')} {_word(value)}")
    return " \\\n  ".join(words)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with flat keys, such as `train.epochs` and `optimizer.lr`, without secrets."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            if "class_path" in value:
                flat[key], value = value["class_path"], value.get("init_args") or {}
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if not args.SECRET_KEY.search(key)}


def _data_class(data: dict[str, Any]) -> Any:
    """Return the class of litgpt.data that a file names; None for any other, which is not imported."""
    module, _, name = str(data.get("class_path", "")).rpartition(".")
    return getattr(data_modules, name, None) if module.startswith("litgpt.data") else None


def _word(value: Any) -> str:
    """Return a value as one word of the command line."""
    if isinstance(value, dict | list):
        value = files.dump_yaml(_public(value), default_flow_style=True, sort_keys=True, width=10**6).strip()
    if isinstance(value, bool) or value is None:
        value = {True: "true", False: "false", None: "null"}[value]
    if str(value).startswith(("litgpt.data.", "torch.optim.")):  # --data and --optimizer take the name of such a class
        value = value.rpartition(".")[2]
    return shlex.quote(_public(str(value)))


def _public(value: Any) -> Any:
    """Return the value without private parts: absolute paths become names, tokens and a URL's password three asterisks."""
    if isinstance(value, dict):
        return {key: "***" if args.SECRET_KEY.search(str(key)) else _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(/|~|[A-Za-z]:[\\/]|\.\.[\\/])", value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    value = value.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else value
    return SECRET_VALUE.sub("***", re.sub(r"(?<=://)[^/@\s]+@", "***@", value))


def _start(settings: dict[str, Any]) -> Any:
    """Return the checkpoint that a run started from; None for training from scratch."""
    return settings.get("checkpoint_dir") or settings.get("initial_checkpoint_dir")


def _base_card(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the front matter of the base's own README.md, if it has one: its license applies to derived models."""
    card = Path(_start(settings) or "") / "README.md"
    try:
        text = files.read_text(card) if _start(settings) else ""
        front = files.parse_yaml(re.split(r"(?m)^---\s*$", text)[1], str(card)) if text.startswith("---") else {}
    except (UserError, IndexError):  # a foreign file, and optional
        return {}
    return front if isinstance(front, dict) else {}


def _describe_data(data: dict[str, Any]) -> str:
    """Return a sentence about the data."""
    values = data.get("init_args") or {}
    parts = [str(_public(str(value))) for key, value in values.items() if key.endswith("path") and value]
    parts += [str(hub_name)] if (hub_name := getattr(_data_class(data), "repo_id", None)) else []
    text = f"litgpt.data.{str(data.get('class_path', '')).rpartition('.')[2]}" + (f" ({', '.join(parts)})" if parts else "")
    if values.get("val_split_fraction"):
        text += f"; {100 * float(values['val_split_fraction']):g} % of it held out for validation"
    return text + ("; loss on the answers only." if values.get("mask_prompt") else ".")


def _table(settings: dict[str, Any]) -> str:
    """Return a table of the settings, without switches that are off and empty values."""
    unused = () if settings.get("skip2lora_enabled") else ("skip2lora_",)
    listed = {key: value for key, value in settings.items() if key not in NOT_IN_TABLE and not key.startswith(unused)}
    rows = [[key, str(_public(value))] for key, value in _flat(listed).items() if value is not False and value not in (None, {}, [])]
    return markdown_table(["setting", "value"], rows)


def _losses(source: Path) -> str | None:
    """Return the first validation loss and that of the folder's step (`step-*`, `best`; else the last), from metrics.csv next to it."""
    curve = read_metrics(source.resolve().parent).get("val_loss", [])
    name, end = source.resolve().name, math.inf
    if name == "best" and curve:
        end = min(curve, key=lambda point: point[1])[0]
    elif match := re.fullmatch(r"step-(\d+)", name):
        end = int(match[1])
    curve = [point for point in curve if point[0] <= end]
    if not curve:
        return None
    ends = [curve[0], curve[-1]] if len(curve) > 1 else curve
    rows = [
        ["before" if step == 0 and len(curve) > 1 else f"step {step}", f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}"]
        for step, loss in ends
    ]
    return markdown_table(["", "validation loss", "perplexity"], rows)
