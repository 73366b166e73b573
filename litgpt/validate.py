"""`litgpt validate`: check that a checkpoint or an adapter is complete and consistent, and estimate the memory to fine-tune it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional

from litgpt import atomic, checkpoint
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.errors import UserError
from litgpt.files import kind_note
from litgpt.prompts import ChatStyle, resolve_prompt_style
from litgpt.text import counted, size, text_table
from litgpt.tokenizer import Tokenizer
from litgpt.values import checked

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
BATCH, LENGTH = 8, 512  # of the micro-batch that memory is estimated for
CHUNK = 2**24  # values checked at a time
TRAINING: tuple[tuple[str, dict[str, Any], str | None], ...] = (  # name, settings of `litgpt.lora.Config`, quantisation
    ("all weights", {}, None),
    ("LoRA on q, v", {"lora_r": 8, "lora_query": True, "lora_value": True, "lora_dropout": 0.05}, None),
    (
        "LoRA on all layers",
        {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")} | {"lora_r": 8, "lora_dropout": 0.05},
        None,
    ),
    ("Skip2-LoRA", {"lora_r": 8, "skip2lora_enabled": True}, None),
    ("Skip2-LoRA, bnb.nf4", {"lora_r": 8, "skip2lora_enabled": True}, "bnb.nf4"),
)
ESTIMATED = (
    "Estimated (litgpt/memory.py) for rank 8, with 0.45 GiB for Python and torch in the total. A cache in memory comes on top, and on "
    "a CPU the memory that the C library keeps after it is freed: up to half as much again."
)

Result = tuple[str, list[str]]  # a summary, and the problems


class Check(NamedTuple):
    """One row of the table."""

    name: str
    summary: str
    problems: list[str]


@checked
def validate(checkpoint_dir: Path, *, dtype: Optional[Literal["float32", "float16", "bfloat16"]] = None, training: bool = False) -> None:
    """Check a checkpoint or an adapter, and print the memory that each fine-tuning method needs. The exit code is 1 if there is a problem.

    Args:
        checkpoint_dir: A base model, a merged model or an adapter. A Hugging Face folder or a GGUF file is converted first.
        dtype: Also estimate the memory of all weights in this format.
        training: Estimate it with gradients and AdamW's two moments, in float32 unless dtype is given.
    """
    folder = open_checkpoint(checkpoint_dir)
    is_adapter = checkpoint.is_adapter_folder(folder)
    if not is_adapter and not (folder / checkpoint.WEIGHTS).is_file() and (hint := checkpoint.adapter_hint(folder)):
        raise UserError(f"{folder} is not a model{hint}")
    checks = list(adapter_checks(folder) if is_adapter else model_checks(folder))
    rows = [("NO" if check.problems else "ok", check.name, _summary(check)) for check in checks]
    print(folder, text_table(rows, left=(0, 1, 2)), sep="\n")
    if problems := [f"{check.name}: {problem}" for check in checks for problem in check.problems]:
        raise UserError("\n  ".join((f"{folder} has {counted(len(problems), 'problem')}:", *problems)))
    base, settings = checkpoint.adapter_settings(folder) if is_adapter else (folder, {})
    print(f"\n{memory_table(base, settings, folder if is_adapter else None)}\n{ESTIMATED}")
    if dtype or training:
        tied = checkpoint.is_tied(checkpoint.load_weights(base / checkpoint.WEIGHTS))
        need = estimate_model_memory(Config.from_checkpoint(base), dtype or "float32", training, tied)
        purpose = "train" if training else "hold"
        print(f"{need['estimated_total_gb']:.2f} GiB to {purpose} all {need['param_count']:,} weights in {dtype or 'float32'}")


def estimate_model_memory(
    config: Config, dtype: "str | torch.dtype" = "float32", training: bool = False, tied: bool = False
) -> dict[str, Any]:
    """Return the number of weights, their GiB, those with gradients and AdamW's two moments if they are trained, and the first GPU's."""
    import torch

    from litgpt.device import on_meta
    from litgpt.model import GPT

    with on_meta():
        count = sum(p.numel() for p in GPT(config).parameters()) - (config.V * config.n_embd if tied else 0)
    weights = count * (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)).itemsize / 2**30
    total = weights * (4 if training else 1)
    there = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None
    figures = {"param_count": count, "param_memory_gb": weights, "estimated_total_gb": total, "available_gpu_memory_gb": there}
    return {**figures, "fits_in_memory": None if there is None else total < there}


def _summary(check: Check) -> str:
    return "; ".join(filter(None, (check.summary, f"{counted(len(check.problems), 'problem')}, see below" if check.problems else "")))


def model_checks(folder: Path, prefix: str = "") -> Iterator[Check]:
    """Check everything in a folder with a complete model."""
    yield _run(prefix + "files", lambda: files(folder, (checkpoint.WEIGHTS, "model_config.yaml", "tokenizer.json")))
    yield _run(prefix + "manifest", lambda: manifest(folder))
    yield (config := _run(prefix + "config", lambda: (describe(Config.from_checkpoint(folder)), [])))
    yield _run(prefix + "tokenizer", lambda: tokenizer(folder))
    yield _run(prefix + "prompt style", lambda: prompt_style(folder))
    if (folder / checkpoint.WEIGHTS).is_file():
        yield (readable := _run(prefix + "weights", lambda: weights(folder, fit=not config.problems)))
        if readable.summary:
            yield _run(prefix + "values", lambda: values(checkpoint.load_weights(folder / checkpoint.WEIGHTS)))


def adapter_checks(folder: Path) -> Iterator[Check]:
    """Check everything in an adapter's folder, and its base."""
    yield _run("files", lambda: files(folder, (checkpoint.adapter_file(folder).name, "hyperparameters.yaml")))
    yield _run("manifest", lambda: manifest(folder))
    yield (base := _run("base", lambda: (str(checkpoint.adapter_settings(folder)[0]), [])))
    yield _run("values", lambda: values(checkpoint.load_weights(checkpoint.adapter_file(folder))))
    if (folder / "tokenizer.json").is_file():
        yield _run("prompt style", lambda: prompt_style(folder))
    if not base.problems:
        checks = list(model_checks(Path(base.summary), "base: "))
        yield from checks
        if not any(check.problems for check in checks):
            yield _run("adapter", lambda: adapter(folder))


def _run(name: str, check: Callable[[], Result]) -> Check:
    try:
        return Check(name, *check())
    except UserError as error:
        return Check(name, "", [str(error)])
    except OSError as error:
        return Check(name, "", [f"{error.filename}: {error.strerror}"])


def files(folder: Path, needed: tuple[str, ...]) -> Result:
    """Check that all needed files exist and that no file is empty."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    problems = [f"{name} is missing{kind_note(folder / name)}" for name in needed if name not in sizes]
    problems += [f"{name} is empty" for name, count in sizes.items() if not count and not name.startswith(".")]
    return f"{counted(len(sizes), 'file')}, {size(sum(sizes.values()))}", problems


def manifest(folder: Path) -> Result:
    """Compare the files with the sizes and digests in the manifest."""
    if not os.path.lexists(folder / atomic.MANIFEST):
        return "none", []
    return f"{len(atomic.read_manifest(folder) or ())} files compared", atomic.damages(folder, contents=True)


def describe(config: Config) -> str:
    """Return the shape of the model in a line."""
    heads = f"{config.n_head} heads" + (f" ({config.n_query_groups} key/value)" if config.n_query_groups != config.n_head else "")
    experts = f", {config.n_expert} experts" if config.n_expert else ""
    shape = f"{config.n_layer} blocks of {config.n_embd}, {heads}{experts}"
    return f"{config.name}: {shape}, {config.block_size:,} positions, {config.V:,} tokens"


def tokenizer(folder: Path) -> Result:
    """Encode and decode texts of many kinds, and compare the ids with the model's vocabulary."""
    tokenizer, problems = Tokenizer(folder), []
    vocabulary = Config.from_checkpoint(folder).V
    other_spaces = 0
    for text in TEXTS:
        ids = tokenizer.ids(text, bos=False)
        decoded = tokenizer.decode(ids)
        if max(ids, default=0) >= vocabulary:
            problems.append(f"{text[:20]!r} has the id {max(ids)}, the model has {vocabulary}: tokenizer.json belongs to another model")
        elif decoded.split() != text.split():
            problems.append(f"{text[:40]!r} comes back as {decoded[:40]!r}")
        other_spaces += decoded.strip() != text.strip()
    for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), *(("stop", token) for token in tokenizer.stop_ids)):
        if token is not None and token >= vocabulary:
            problems.append(f"the {name} token has the id {token}, the model has {vocabulary}")
    if tokenizer.eos_id is None:
        problems.append("no eos token: neither tokenizer_config.json nor generation_config.json names one, so answers would not end")
    spaces = f", {other_spaces} of {len(TEXTS)} texts with other spaces" if other_spaces and not problems else ""
    return f"{tokenizer.vocab_size:,} tokens, eos {tokenizer.eos_id}, texts come back{spaces}", problems


def prompt_style(folder: Path) -> Result:
    """Apply the checkpoint's prompt style or chat template to a question, and to a conversation if it has turns."""
    tokenizer = Tokenizer(folder)
    style = resolve_prompt_style(None, folder, tokenizer)
    question = style.apply("What is a llama?")
    problems = [] if "What is a llama?" in question else [f"the question is not in the prompt: {question[:60]!r}"]
    if isinstance(style, ChatStyle):
        turns = [{"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))]
        text = style.render(turns, add_generation_prompt=True)
        problems += [f"{turn['content']!r} is not in the conversation {text[:60]!r}" for turn in turns if turn["content"] not in text]
    return f"{style.name or type(style).__name__}, {len(tokenizer.ids(question))} tokens for a short question", problems


def weights(folder: Path, fit: bool) -> Result:
    """Check dtypes and, if `fit` is set, names and shapes as a model that loads the weights does."""
    path = folder / checkpoint.WEIGHTS
    stored = checkpoint.load_weights(path)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in stored.values()}
    count = sum(value.numel() for value in unique(stored).values())
    problems = [f"{name} holds {value.dtype}, not floating point" for name, value in stored.items() if not value.is_floating_point()]
    if fit and not problems:
        from litgpt.lora import Config as LoRAConfig

        try:
            model = checkpoint.empty_model(LoRAConfig.from_checkpoint(folder), stored, path)
            checkpoint.load_base(model, stored, next(iter(stored.values())).dtype, path)
        except UserError as error:
            problems.append(str(error))
    return f"{len(stored)} tensors, {count:,} parameters, {' and '.join(sorted(dtypes))}, {size(path.stat().st_size)}", problems


def values(stored: "dict[str, torch.Tensor]") -> Result:
    """Check that all values are finite and that no matrix is zero, except the B or the gate of an untrained adapter."""
    import torch

    problems, largest = [], 0.0
    for name, value in unique(stored).items():
        not_finite, peak = 0, 0.0
        for part in value.flatten().split(CHUNK):
            if part.is_floating_point() and len(part):
                finite = part.isfinite()
                not_finite += part.numel() - int(finite.sum())
                peak = max(peak, float(torch.where(finite, part, 0).abs().max()))
        if not_finite:
            problems.append(f"{name}: {not_finite:,} of {value.numel():,} values are not finite")
        elif not peak and value.dim() > 1 and not name.endswith(("lora_B", "gating_factor")):
            problems.append(f"{name} is zero everywhere")
        largest = max(largest, peak)
    return f"all finite, the largest {largest:.4g}", problems


def unique(stored: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Return each tensor once: a tied output layer shares the embedding's."""
    return dict({value.data_ptr(): (name, value) for name, value in stored.items()}.values())


def adapter(folder: Path) -> Result:
    """Load the adapter on its base as `litgpt generate` does."""
    import torch

    from litgpt.adapters.base import adapter_parameters

    model = checkpoint.load_model(folder, torch.bfloat16)
    trained = sum(p.numel() for p in adapter_parameters(model).values())
    return f"{trained:,} parameters, fits its base", []


def memory_table(base: Path, adapter_settings: dict[str, Any], adapter: Path | None = None) -> str:
    """Return the estimated memory to train an adapter with these settings, or to train the base in each way of `TRAINING`."""
    from litgpt.lora import Config as LoRAConfig
    from litgpt.memory import PROCESS, estimate

    stored = checkpoint.load_weights(base / checkpoint.WEIGHTS)
    tied = checkpoint.is_tied(stored)
    length = min(LENGTH, Config.from_checkpoint(base).block_size)
    rows = [["method", "trained", "weights", "training", "activations", "total"]]
    for name, settings, quantize in (("this adapter", adapter_settings, None),) if adapter else TRAINING:
        config = checkpoint.adapted_config(adapter, base, settings) if adapter else LoRAConfig.from_checkpoint(base, **settings)
        need = estimate(config, BATCH * length, tied=tied, keys=length, quantize=quantize)
        sizes = (need.weights, need.training, need.activations, need.total + PROCESS)
        rows.append([name, f"{need.trained:,}", *map(size, sizes)])
    return f"memory to fine-tune it in bf16-true, micro-batches of {BATCH} x {length} tokens\n{text_table(rows)}"
