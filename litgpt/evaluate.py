"""`litgpt evaluate`: the loss and the answers on your own records, or the tasks of the LM Evaluation Harness."""

import copy
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from litgpt import checkpoint
from litgpt.args import COUNT, Quantization
from litgpt.atomic import write_text
from litgpt.convert.resolve import open_checkpoint
from litgpt.data.base import DataModule, question_of
from litgpt.data.text_files import Text, TextFiles
from litgpt.errors import NonFiniteError, UserError
from litgpt.files import json_in, require_place
from litgpt.generate.base import open_model
from litgpt.generate.sample import is_exact
from litgpt.keys import known_classes
from litgpt.prompts import read_reply, resolve_prompt_style
from litgpt.text import text_table
from litgpt.values import checked

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.data.records import Record
    from litgpt.logs import Console
    from litgpt.sample import Sample

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true", "auto": None}
AUTO_BATCH = 8
WORD = re.compile(r"[^\W_]+")


@checked
def evaluate(
    checkpoint_dir: Path,
    tasks: Optional[str] = None,
    out_dir: Optional[Path] = None,
    force_conversion: bool = False,
    num_fewshot: Optional[int] = None,
    batch_size: Union[int, str] = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    limit: Optional[float] = None,
    seed: int = 1234,
    save_filepath: Optional[Path] = None,
    access_token: Optional[str] = None,
    *,
    data: Optional[DataModule] = None,
    max_new_tokens: int = 128,
    quantize: Optional[Quantization] = None,
) -> None:
    """Measure a model or an adapter on records of your own (--data FILE), or on tasks of the LM Evaluation Harness (--tasks NAMES).

    Args:
        checkpoint_dir: A base model, a merged model or an adapter (LoRA or Skip2-LoRA); or "list", which prints the names of the tasks.
        tasks: Comma-separated names of the harness's tasks, or YAML files of tasks: hellaswag,mmlu (`pip install "litgpt[eval]"`).
        out_dir: Folder for results.json. Default: evaluate in the folder of the model.
        force_conversion: Accepted for LitGPT's command lines; no effect, since nothing is converted.
        num_fewshot: Examples before each question of a task. Default: the task's own number.
        batch_size: Sequences in a forward pass, or auto.
        device: Device to run on, such as cuda:0. Default: the first GPU, else the CPU.
        dtype: float32, bfloat16 or float16. Default: bfloat16 where the processor has it, else float32.
        limit: Use only the first records, or questions of each task: a number, or with tasks a share below 1.
        seed: Random seed, for the tasks' choices of examples.
        save_filepath: The file for the results. Default: results.json in out_dir.
        access_token: Hugging Face token, for the tasks' data.
        data: Records to measure: a file (all of it), a folder or data set (its validation part), a data module, or a folder of .txt files,
            whose blocks count as records. Default: the validation records of the run that wrote the folder. The loss is that of the
            answers, unless `data.mask_prompt` is false.
        max_new_tokens: Longest answer to compare with the record's own. 0: only the loss is measured.
        quantize: Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8).
    """
    if tasks is not None and data is not None:
        raise UserError("tasks and data are both given: leave one of them out")
    if not re.fullmatch(r"auto(:\d+)?|[0-9]*[1-9][0-9]*", str(batch_size)):
        raise UserError(f"batch_size is {batch_size!r}: give a number from 1, or auto")
    size = int(batch_size) if str(batch_size).isdecimal() else AUTO_BATCH
    if tasks is not None or str(checkpoint_dir) == "list":
        from litgpt.integrations.harness import TaskManager, run_tasks  # fails here if the harness is not installed

        if str(checkpoint_dir) == "list":
            print("\n".join(sorted(TaskManager().all_tasks)))
            return
    if dtype not in (None, *PRECISIONS):
        raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(PRECISIONS)}")
    if not COUNT.holds(max_new_tokens):
        raise UserError(f"max_new_tokens is {max_new_tokens}: {COUNT} is needed; 0 measures the loss alone")
    chosen = data or (data_of_run(open_checkpoint(checkpoint_dir)) if tasks is None else None)
    llm = open_model(checkpoint_dir, precision=PRECISIONS[dtype or "auto"], quantize=quantize, device=device)
    folder = llm.checkpoint_dir or Path()
    file = save_filepath or (out_dir or folder / "evaluate") / "results.json"
    _require_results(file)
    if chosen is None:
        assert tasks is not None
        results, table = run_tasks(llm, tasks, num_fewshot, size, limit, seed, access_token)
    else:
        results = on_records(llm, chosen, everything=data is not None, batch_size=size, limit=limit, max_new_tokens=max_new_tokens)
        table = text_table(rows_of(results))
    print(table)
    from litgpt.logs import Console

    _require_results(file)  # it may have been written in the meantime
    write_text(file, json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n")
    Console().say(f"the results are in {file}")


evaluate.data_defaults = {"mask_prompt": True}  # type: ignore[attr-defined]


def _require_results(file: Path) -> None:
    """Raise UserError if results cannot be written to this place, or if something else is there."""
    require_place(file)
    if file.exists() and {"checkpoint_dir", "results"}.isdisjoint(json_in(file)):  # of records, of tasks
        raise UserError(f"{file} exists and holds no results of litgpt evaluate: name another place, or move it away")


def data_of_run(folder: Path) -> DataModule:
    """Return the data of the run that wrote the folder. Raises UserError if there was none."""
    named = checkpoint.read_hyperparameters(folder).get("data")
    named = named if isinstance(named, dict) else {}
    kind = known_classes(DataModule).get(str(named.get("class_path")).rpartition(".")[2])
    if kind is None:
        raise UserError(f"no data to evaluate {folder} on: give --data FILE, or --tasks NAMES (`litgpt evaluate list` prints them)")
    try:
        return kind(**(named.get("init_args") or {}))
    except TypeError as error:
        raise UserError(f"{folder / 'hyperparameters.yaml'}: data: {error}. Give --data FILE") from None


def on_records(
    llm: "LLM", data: DataModule, everything: bool = True, batch_size: int = 1, limit: Optional[float] = None, max_new_tokens: int = 128
) -> dict[str, Any]:
    """Return the loss per token on the validation records, and how the model's most probable answers compare with theirs.

    `everything`: measure all records if the data has no validation part and sets no share for it.
    """
    if limit is not None and (limit < 1 or limit != int(limit)):
        raise UserError(f"limit is {limit}: a number of records, from 1, is needed")
    from litgpt.logs import Console

    data.prepare_data()
    is_text = isinstance(data, Text)
    if everything and data.val_split_fraction is None and not is_text:
        train, val = data.records()
        measured = train if val is None else val
        data = copy.copy(data)
        data.records = lambda: (measured, measured)  # type: ignore[method-assign]
    if data.prompt_style is not None:
        llm.prompt_style = resolve_prompt_style(data.prompt_style, llm.tokenizer.folder, llm.tokenizer)
    splits = data.splits(llm.tokenizer, llm.prompt_style, _length(data, llm, is_own=not everything))
    samples = splits.val
    if is_text and everything:
        samples = [*splits.train, *splits.val] if data.held_out_share() else splits.train
    count = min(len(samples), int(limit or len(samples)))
    console = Console()
    results: dict[str, Any] = {
        "model": llm.config.name,
        "checkpoint_dir": str(llm.checkpoint_dir),
        "data": data.source,
        "records": count,
        **_measured(llm, samples[:count], batch_size, console),
    }
    asked = [record for record in splits.examples[:count] if not record.is_text] if max_new_tokens else []
    if asked:
        answers = []
        with console.progress("answers") as progress:
            for record in asked:
                answers.append(_answered(llm, record, max_new_tokens))
                progress(len(answers), len(asked))
        for name in ("exact_match", "rouge_l"):
            results[name] = sum(answer[name] for answer in answers) / len(asked)
        results["answers"] = answers
    return results


def _length(data: DataModule, llm: "LLM", is_own: bool) -> int:
    """Return the longest sample in tokens: what the model reads; for running text and the run's own data the length in training.

    Blocks are shorter if a text would give fewer than two.
    """
    trained = checkpoint.read_hyperparameters(llm.checkpoint_dir or Path()).get("train") if is_own or isinstance(data, Text) else None
    own, most = trained.get("max_seq_length") if isinstance(trained, dict) else None, llm.model.max_seq_length
    most = min(own, most) if isinstance(own, int) else most
    return min(most, data.block()) if isinstance(data, TextFiles) and data.tokens() < 2 * most else most


def _measured(llm: "LLM", samples: "list[Sample]", batch_size: int, console: "Console") -> dict[str, float]:
    """Return the number of loss tokens, their weighted mean loss, and how well a value head predicts the rewards, if there are both."""
    import torch

    from litgpt.activations.cache import Recompute
    from litgpt.loss import HeadLoss, hidden_of, loss_at
    from litgpt.objectives.critic import last_values, quality
    from litgpt.packing import loss_weights

    model = llm.model
    activations, head_loss = Recompute(model, samples, llm.device), HeadLoss.of(model)
    total, weight, values = 0.0, sum(sample.weight for sample in samples), list[float]()
    with torch.no_grad(), console.progress("loss") as progress:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            features = activations(range(start, start + len(batch)))
            hidden = hidden_of(model, features)
            total += loss_at(model, hidden, features.targets, head_loss, loss_weights(batch)).item()
            if model.value_head is not None:
                values += last_values(model.value_head, hidden, batch)
            progress(start + len(batch), len(samples))
    if not math.isfinite(total):
        raise NonFiniteError(f"the loss is {total}: `litgpt validate {llm.checkpoint_dir}` names non-finite weights")
    loss, rewards = total / weight, [sample.reward for sample in samples if sample.reward is not None]
    judged = {"rated": len(values), **quality(values, rewards)} if values else {}
    tokens = sum(sample.n_targets for sample in samples)
    return {"tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), **judged}


def _answered(llm: "LLM", record: "Record", max_new_tokens: int) -> dict[str, Any]:
    """Return the question of a record, its answer, the model's, and how they compare. In a conversation the last reply counts."""
    prompt, expected = question_of(record, llm.prompt_style, llm.tokenizer), record.reply
    room = min(max_new_tokens, llm.model.max_seq_length - len(llm.prompt_ids(prompt)))
    ids = list(llm.complete(prompt, room, temperature=0.0)) if room > 0 else []
    answer = str(read_reply(llm.tokenizer.decode(ids, skip_special_tokens=False), llm.prompt_style, llm.tokenizer)["content"])
    scores = {"exact_match": float(is_exact(expected, answer)), "rouge_l": rouge_l(expected, answer)}
    return {"question": str(record.messages[record.last - 1]["content"]), "expected": expected, "answer": answer, **scores}


def rouge_l(expected: str, answer: str) -> float:
    """Return ROUGE-L (Lin 2004): the F1 of the longest common subsequence of words, in lower case."""
    left, right = (WORD.findall(text.lower()) for text in (expected, answer))
    row = [0] * (len(right) + 1)
    for word in left:
        above = row
        row = [0]
        for i, other in enumerate(right):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
    return 2 * row[-1] / (len(left) + len(right)) if row[-1] else 0.0


def rows_of(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures to print: name and value."""
    names = {"records": "records", "tokens": "tokens with loss", "loss": "loss per token", "perplexity": "perplexity"}
    names |= {"rated": "answers with a reward", "auc": "value: AUC", "brier": "value: Brier score", "calibration_error": "value: ECE"}
    names |= {"exact_match": "exact match", "rouge_l": "ROUGE-L"}
    shown = {int: "{:,}", float: "{:.4f}"}
    return [(title, shown[type(results[name])].format(results[name])) for name, title in names.items() if name in results]
