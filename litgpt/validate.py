"""`litgpt validate`: whether a checkpoint or an adapter is whole and fits together, and what memory fine-tuning it takes."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt import atomic, checkpoint
from litgpt.config import Config
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

TEXTS = (
    "Hello world, the year 2024 isn't over.",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # two\n\n    indented",
    "Zürich, naïve café, œuvre, Straße, Łódź",
    "Привет мир! 你好，世界。こんにちは 안녕하세요 مرحبا नमस्ते",
    "emoji 🙂👩‍🚀 and math ∑ αβγ ≤ ∞, 3.14159 1e-5 0xFF",
    '<html>&amp; https://example.org/a?b=c#d \\n "quoted" ‘curly’ …',
    "word " * 200,
)
BATCH, LENGTH = 8, 512
"""the micro-batch that memory is stated for"""
CHUNK = 2**24
"""numbers that are checked at a time"""
TRAINING: tuple[tuple[str, dict[str, Any], dict[str, bool]], ...] = (
    ("all weights", {}, {"full": True}),
    ("LoRA on q, v", {"lora_r": 8, "lora_query": True, "lora_value": True, "lora_dropout": 0.05}, {}),
    (
        "LoRA on all layers",
        {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")} | {"lora_r": 8, "lora_dropout": 0.05},
        {},
    ),
    ("Skip2-LoRA", {"lora_r": 8, "skip2lora_enabled": True}, {}),
    ("Skip2-LoRA, bnb.nf4", {"lora_r": 8, "skip2lora_enabled": True}, {"nf4": True}),
)
"""what memory is stated for: name, settings of `litgpt.lora.Config`, arguments of `litgpt.memory.estimate`"""


class Check(NamedTuple):
    """One line of the table."""

    name: str
    found: str
    problems: list[str]


def validate(checkpoint_dir: Path) -> None:
    """Check a checkpoint or an adapter, and print what memory each way to fine-tune it takes. Exit code 1 if anything is wrong.

    Args:
        checkpoint_dir: A base model, a merged model or an adapter. A Hugging Face folder or a GGUF file is converted first.
    """
    from litgpt.convert.resolve import open_checkpoint

    folder = open_checkpoint(checkpoint_dir)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    done = list(adapter_checks(folder) if checkpoint.is_adapter_folder(folder) else model_checks(folder))
    _print_checks(folder, done)
    if problems := [f"{check.name}: {problem}" for check in done for problem in check.problems]:
        raise UserError("\n  ".join((f"{folder} has {len(problems)} problem{'s' * (len(problems) > 1)}:", *problems)))
    _print_memory(folder)


def model_checks(folder: Path, prefix: str = "") -> Iterator[Check]:
    """Everything about a folder with a whole model."""
    yield _try(prefix + "files", lambda: files(folder, (checkpoint.WEIGHTS, "model_config.yaml", "tokenizer.json")))
    yield _try(prefix + "manifest", lambda: manifest(folder))
    yield (settings := _try(prefix + "config", lambda: (describe(Config.from_checkpoint(folder)), [])))
    yield _try(prefix + "tokenizer", lambda: tokenizer(folder))
    yield _try(prefix + "prompt style", lambda: prompt_style(folder))
    if (folder / checkpoint.WEIGHTS).is_file():
        yield (readable := _try(prefix + "weights", lambda: weights(folder, fit=not settings.problems)))
        if readable.found:
            yield _try(prefix + "values", lambda: values(checkpoint.load_weights(folder / checkpoint.WEIGHTS)))


def adapter_checks(folder: Path) -> Iterator[Check]:
    """Everything about an adapter folder, its base included."""
    yield _try("files", lambda: files(folder, (checkpoint.ADAPTER_WEIGHTS, "hyperparameters.yaml")))
    yield _try("manifest", lambda: manifest(folder))
    yield (found := _try("base", lambda: (str(checkpoint.adapter_settings(folder)[0]), [])))
    yield _try("values", lambda: values(checkpoint.load_weights(folder / checkpoint.ADAPTER_WEIGHTS)))
    if (folder / "tokenizer.json").is_file():
        yield _try("prompt style", lambda: prompt_style(folder))
    if not found.problems:
        base = list(model_checks(Path(found.found), "base: "))
        yield from base
        if not any(check.problems for check in base):
            yield _try("adapter", lambda: adapter(folder))


def _try(name: str, check: Callable[[], tuple[str, list[str]]]) -> Check:
    try:
        return Check(name, *check())
    except UserError as error:
        return Check(name, "", [str(error)])
    except OSError as error:
        return Check(name, "", [f"{error.filename}: {error.strerror}"])


def files(folder: Path, needed: tuple[str, ...]) -> tuple[str, list[str]]:
    """Those that must be there, and that none is empty."""
    there = sorted(file for file in folder.iterdir() if file.is_file())
    names = {file.name for file in there}
    problems = [f"{name} is missing" for name in needed if name not in names]
    problems += [f"{file.name} is empty" for file in there if not file.stat().st_size and not file.name.startswith(".")]
    return f"{len(there)} files, {_size(sum(file.stat().st_size for file in there))}", problems


def manifest(folder: Path) -> tuple[str, list[str]]:
    """The files against the sizes and digests that were written with them."""
    if not (folder / atomic.MANIFEST).is_file():
        return "none", []
    return f"{len(atomic.read_manifest(folder) or ())} files compared", atomic.damages(folder, contents=True)


def describe(config: Config) -> str:
    """The model in a line."""
    heads = f"{config.n_head} heads" + (f" ({config.n_query_groups} key/value)" if config.n_query_groups != config.n_head else "")
    experts = f", {config.n_expert} experts" if config.n_expert else ""
    return (
        f"{config.name}: {config.n_layer} blocks of {config.n_embd}, {heads}{experts}, {config.block_size:,} positions, {config.V:,} tokens"
    )


def tokenizer(folder: Path) -> tuple[str, list[str]]:
    """Texts of many kinds there and back, and ids that the model knows."""
    from litgpt.tokenizer import Tokenizer

    known, problems = Tokenizer(folder), []
    limit = Config.from_checkpoint(folder).V
    spaces = 0
    for text in TEXTS:
        ids = known.ids(text, bos=False)
        back = known.decode(ids)
        if max(ids, default=0) >= limit:
            problems.append(f"{text[:20]!r} has the id {max(ids)}, the model knows {limit}: tokenizer.json belongs to another model")
        elif back.split() != text.split():
            problems.append(f"{text[:40]!r} comes back as {back[:40]!r}")
        spaces += back.strip() != text.strip()
    for name, token in (("bos", known.bos_id), ("eos", known.eos_id), *(("stop", token) for token in known.stop_ids)):
        if token is not None and token >= limit:
            problems.append(f"the {name} token has the id {token}, the model knows {limit}")
    if known.eos_id is None:
        problems.append("no eos token: neither tokenizer_config.json nor generation_config.json names one, so no answer would end")
    lost = f", {spaces} of {len(TEXTS)} texts with other spaces" if spaces and not problems else ""
    return f"{known.vocab_size:,} tokens, eos {known.eos_id}, texts come back{lost}", problems


def prompt_style(folder: Path) -> tuple[str, list[str]]:
    """The style or chat template with which the checkpoint is asked: one question, and a conversation if it can have one."""
    from litgpt.prompts import resolve_prompt_style
    from litgpt.tokenizer import Tokenizer

    known = Tokenizer(folder)
    style: Any = resolve_prompt_style(None, folder, known)
    asked = style.apply("What is a llama?")
    problems = [] if "What is a llama?" in asked else [f"the question is not in the prompt: {asked[:60]!r}"]
    if hasattr(style, "render"):
        turns = [{"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))]
        text = style.render(turns, add_generation_prompt=True)
        problems += [f"{turn['content']!r} is not in the conversation {text[:60]!r}" for turn in turns if turn["content"] not in text]
    return f"{style.name or type(style).__name__}, {len(known.ids(asked))} tokens for a short question", problems


def weights(folder: Path, fit: bool) -> tuple[str, list[str]]:
    """Number format and size; names and shapes against the config, as a model that loads them compares them."""
    path = folder / checkpoint.WEIGHTS
    stored = checkpoint.load_weights(path)
    dtypes = {str(value.dtype).removeprefix("torch."): value.dtype for value in stored.values()}
    count = sum(value.numel() for value in unique(stored).values())
    found = f"{len(stored)} tensors, {count:,} numbers, {' and '.join(sorted(dtypes))}, {_size(path.stat().st_size)}"
    problems = [f"{name} holds {value.dtype}, no real numbers" for name, value in stored.items() if not value.is_floating_point()]
    if fit and not problems:
        from litgpt.lora import Config as LoRAConfig

        try:
            model = checkpoint.empty_model(LoRAConfig.from_checkpoint(folder), stored, path)
            checkpoint.load_base(model, stored, next(iter(stored.values())).dtype, path)
        except UserError as error:
            problems.append(str(error))
    return found, problems


def values(stored: "dict[str, torch.Tensor]") -> tuple[str, list[str]]:
    """Every number: finite, and no matrix that is zero all over (an adapter's B may be: it has not been trained)."""
    import torch

    problems, largest = [], 0.0
    for name, value in unique(stored).items():
        bad, peak = 0, 0.0
        for part in value.flatten().split(CHUNK):
            if part.is_floating_point():
                finite = part.isfinite()
                bad += part.numel() - int(finite.sum())
                peak = max(peak, float(torch.where(finite, part, 0).abs().max()))
        if bad:
            problems.append(f"{name}: {bad:,} of {value.numel():,} numbers are not finite")
        elif not peak and value.dim() > 1 and not name.endswith("lora_B"):
            problems.append(f"{name} is zero all over")
        largest = max(largest, peak)
    return f"all finite, the largest {largest:.4g}", problems


def unique(stored: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Each tensor once: a tied head is the embedding."""
    return dict({value.data_ptr(): (name, value) for name, value in stored.items()}.values())


def adapter(folder: Path) -> tuple[str, list[str]]:
    """The adapter on its base, loaded as for an answer."""
    import torch

    from litgpt.lora import lora_filter

    model = checkpoint.load_model(folder, torch.bfloat16)
    trained = sum(p.numel() for name, p in model.named_parameters() if lora_filter(name))
    return f"{trained:,} numbers, fits its base", []


def _print_checks(folder: Path, done: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "check", "found", title=str(folder), title_justify="left")
    for check in done:
        problems = f"{len(check.problems)} problem{'s' * (len(check.problems) > 1)}, see below" if check.problems else ""
        table.add_row("ok" if not problems else "NO", check.name, Text("; ".join(filter(None, (check.found, problems)))))
    Console().print(table)


def _print_memory(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from litgpt.lora import Config as LoRAConfig
    from litgpt.memory import PROCESS, estimate

    base, settings = checkpoint.adapter_settings(folder) if checkpoint.is_adapter_folder(folder) else (folder, {})
    stored = checkpoint.load_weights(base / checkpoint.WEIGHTS)
    tied = len(unique(stored)) < len(stored) or "lm_head.weight" not in stored
    config = Config.from_checkpoint(base)
    length = min(LENGTH, config.block_size)
    methods = (("this adapter", settings, {}),) if settings else TRAINING
    title = f"memory to fine-tune it in bf16-true, micro-batches of {BATCH} x {length} tokens"
    table = Table("method", "trained", "weights", "training", "activations", "total", title=title, title_justify="left")
    for name, adapter_settings, arguments in methods:
        need = estimate(LoRAConfig.from_checkpoint(base, **adapter_settings), BATCH * length, tied=tied, **arguments)
        sizes = (need.weights, need.training, need.activations, need.total + PROCESS)
        table.add_row(name, f"{need.trained:,}", *map(_size, sizes))
    for column in table.columns[1:]:
        column.justify = "right"
    console = Console()
    console.print(table)
    console.print(
        "Estimated (litgpt/memory.py) for rank 8, with 0.45 GiB for Python and torch in the total. A cache in memory comes on top, and on "
        "a CPU what the C library keeps of freed memory: up to half as much again."
    )


def _size(count: float) -> str:
    """Bytes, readable."""
    power = min(int(math.log(count, 1024)), 3) if count >= 1 else 0
    return f"{count / 1024**power:.{2 if power == 3 else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
