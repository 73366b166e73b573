"""The figures that a run measured: report.json, report.html, and the summary on the terminal."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.convert.gguf.writer import has_gguf
from litgpt.lora import Config
from litgpt.text import counted, duration
from litgpt.train.page import Answers, Points, curve_of, flat, page
from litgpt.train.resume import State

REPORT, PAGE = "report.json", "report.html"


def as_json(figures: dict[str, Any]) -> str:
    """Return the figures as JSON, which has no NaN or infinity: null stands for them."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in figures.items()}
    return json.dumps(finite, indent=2) + "\n"


def figures(state: State, steps_per_epoch: int, trainable: int, total: int, peak_memory_gb: float) -> dict[str, Any]:
    """Return the figures of a run that has ended; seconds include all its sessions. `trainable`, `total`: numbers of parameters."""
    losses, best = state.losses, state.best
    return {
        "steps": state.step,
        "epochs": round(state.step / steps_per_epoch, 4),
        "initial_val_loss": losses[0][1] if losses and losses[0][0] == 0 else None,
        "final_val_loss": losses[-1][1] if losses and losses[-1][0] == state.step else None,
        "best_val_loss": best[1] if best else None,
        "best_step": best[0] if best else None,
        "skipped_steps": state.skipped,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_seconds": state.seconds,
        "total_seconds": state.clock.seconds,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "peak_memory_gb": peak_memory_gb,
    }


def summary_rows(figures: dict[str, Any], best: Path, target: float | None = None) -> dict[str, str]:
    """Return the rows of the summary. `best`: the checkpoint with the lowest validation loss; `target`: `eval.target_loss`."""
    accuracy = figures.get("val_accuracy")

    def loss(value: float | None) -> str:
        perplexity = "" if accuracy is not None or value is None else f" (perplexity {math.exp(min(value, 700)):.2f})"
        return "not measured" if value is None else f"{value:.4f}{perplexity}"

    trained, total = figures["trainable_parameters"], figures["total_parameters"]
    rows = {
        "validation loss before": loss(figures["initial_val_loss"]),
        "validation loss after": loss(figures["final_val_loss"]),
        **({"merged into the base": loss(figures["merged_val_loss"])} if figures.get("merged_val_loss") is not None else {}),
        **({"answers judged correctly": f"{accuracy:.1%} of the validation records"} if accuracy is not None else {}),
        "trainable parameters": f"{trained:,} of {total:,} ({100 * trained / total:.3f} %)",
        "steps": f"{figures['steps']:,} ({counted(figures['epochs'], 'epoch')})",
        "time": f"{figures['total_seconds']:.1f} s, {figures['train_seconds']:.1f} s of it in training steps",
        "speed": f"{figures['tokens_per_second']:,.0f} tokens/s in training steps",
        "peak memory": f"{figures['peak_memory_gb']:.2f} GiB",
    }
    if target is not None and (figures["final_val_loss"] or 0) > target:
        longer = f"--train.epochs {math.ceil(2 * figures['epochs'])}"
        rows["eval.target_loss"] = f"{target:g} was not reached: more epochs may teach the answers that are missing ({longer})"
    if figures["skipped_steps"]:
        rows["skipped steps"] = f"{figures['skipped_steps']:,} with a non-finite loss or gradient"
    if figures["best_step"] is not None and best.is_dir():
        rows["best checkpoint"] = f"{best}: step {figures['best_step']:,}, validation loss {figures['best_val_loss']:.4f}"
    return rows


def page_of(
    model: str, figures: dict[str, Any], metrics: Mapping[str, Points], answers: Answers, settings: dict[str, Any], folder: Path
) -> str:
    """Return the page about a run. The settings are those of hyperparameters.yaml; paths are reduced to their names. `folder`: best/."""
    before, after, best = figures["initial_val_loss"], figures["final_val_loss"], figures["best_val_loss"]
    measured = [f"{loss:.3f} {when}" for loss, when in ((before, "before"), (after, "after")) if loss is not None]
    losses = [f"Validation loss {', '.join(measured)}."] if measured else []
    if best is not None and (after is None or best < after):
        kept = ": its checkpoint is in best/" if folder.is_dir() else ""
        losses.append(f"The lowest validation loss, {best:.3f}, was at step {figures['best_step']:,}{kept}.")
    if (accuracy := figures.get("val_accuracy")) is not None:
        losses.append(f"{accuracy:.1%} of the validation records are judged correctly.")
    share = 100 * figures["trainable_parameters"] / figures["total_parameters"]
    tiles = {
        "time": duration(figures["total_seconds"]),
        "steps": f"{figures['steps']:,}",
        "epochs": f"{figures['epochs']:g}",
        "trained": f"{share:.2g} %",
        "peak memory": f"{figures['peak_memory_gb']:.1f} GiB",
    }
    curves = {"training": curve_of(metrics.get("train_loss", ())), "validation": curve_of(metrics.get("val_loss", ()))}
    shown = {key: Path(value).name if key.endswith(("_dir", "_path", "_reference")) else value for key, value in flat(settings).items()}
    return page(f"{model}, tuned", " ".join(losses), tiles, curves, figures["best_step"], answers, shown)


def next_steps(
    out_dir: Path, config: Config, chat: tuple[str, str], is_whole: bool = True, has_held_out: bool = False
) -> list[tuple[str, str]]:
    """Return commands for a finished run, `chat` first, each with what it does.

    `is_whole`: the final folder holds a model. `has_held_out`: some questions and answers were not trained.
    """
    final, stem = shlex.quote(str(out_dir / "final")), shlex.quote(str(out_dir))
    page = (str(out_dir / PAGE), "curves, answers and settings, in a browser")
    rows = [chat, (f"litgpt serve {stem}", "a chat page, and OpenAI's API")]
    rows += [(f"litgpt evaluate {stem}", "its answers to the records that were held out")] * has_held_out
    if config.heads:  # no other format can hold them
        generate, rows = f"litgpt generate {final} --prompt 'A question'", rows if config.changes_text or not config.value_head else []
        rows += [(f"{generate} --best_of 8 --by value", "the best of eight answers")] if config.value_head else []
        rows += [(f"{generate} --speculate heads", "an answer that the heads draft")] if config.mtp_heads else []
        return [*rows, page]
    if config.skip2lora_enabled or config.alora_enabled:
        name, users = ("portable", "for transformers") if config.skip2lora_enabled else ("peft", "for transformers with PEFT, and vLLM")
        rows.append((f"litgpt convert_adapter {final} {stem}/{name}", users))
        if not config.skip2lora_enabled and has_gguf(config):
            rows.append((f"litgpt convert_adapter {final} {stem}/gguf --to gguf", "for llama.cpp"))
    elif is_whole:
        rows.append((f"litgpt convert_from_litgpt {final} {stem}/hf", "for transformers"))
        if has_gguf(config):
            rows.append((f"litgpt convert_to_gguf {final} {stem}/model.gguf", "for llama.cpp and Ollama"))
    elif config.lora_r and config.is_mergeable:  # of a sharded model, which was not merged; a LLaMA-Adapter cannot be
        rows.append((f"litgpt merge_lora {final}", "a model of its own"))
    return [*rows, page]
