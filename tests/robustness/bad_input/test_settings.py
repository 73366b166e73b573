"""Bad settings: words of the command line, and YAML files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.cases import quick
from tests.helpers.places import Case, Place, check, check_message, run
from tests.helpers.runs import PLAIN

JSON = ["--data", "JSON", "--data.json_path", "data.json"]


def command(name: str, *more: Any) -> Callable[[Place], list[Any]]:
    """The command on the good checkpoint; the fine-tuning ones with good data too."""

    def words(place: Place) -> list[Any]:
        base = place.base()
        if name.startswith(("finetune_lora", "sweep")):
            place.data()
            return [name, base, *JSON, "--out_dir", "out", *more]
        return [name, base, *more]

    return words


def yaml(text: str, name: str = "finetune_lora", *more: Any) -> Callable[[Place], list[Any]]:
    """`text` as the file f.yaml; the good checkpoint, data and out_dir come from the command line, behind it."""

    def words(place: Place) -> list[Any]:
        place.data()
        place.write("f.yaml", text)
        checkpoint = [] if "checkpoint_dir" in text else ["--checkpoint_dir", place.base()]
        data = [] if "data:" in text else JSON
        return [name, "f.yaml", *checkpoint, *data, *([] if "out_dir" in text else ["--out_dir", "out"]), *more]

    return words


def tune(key: str, value: Any, remedy: str, code: int = 1, culprit: str | None = None) -> Case:
    return Case(f"{key}={value}"[:60], command("finetune_lora", f"--{key}={value}"), culprit or key, remedy, code)


# Each of these is a key that does not exist and the one that was meant: for the command line, and for a YAML file.
UNKNOWN = {
    "finetune_lora": {
        "chekpoint_dir": "checkpoint_dir",
        "outdir": "out_dir",
        "lora_rank": "lora_r",
        "lora_drop_out": "lora_dropout",
        "skip2lora_enable": "skip2lora_enabled",
        "skip2lora_blocks_indices": "skip2lora_block_indices",
        "skip2lora_cachedir": "skip2lora_cache_dir",
        "train.epoch": "train.epochs",
        "train.global_batchsize": "train.global_batch_size",
        "train.micro_batchsize": "train.micro_batch_size",
        "train.lr_warmup_step": "train.lr_warmup_steps",
        "trian.max_steps": "train.max_steps",
        "eval.intervall": "eval.interval",
        "eval.max_token": "eval.max_new_tokens",
        "log.projekt": "log.project",
        "loggername": "logger_name",
        "Precision": "precision",
        "sead": "seed",
    },
    "sweep": {"grid.lora_rank": "grid.lora_r", "grid.train.epoch": "grid.train.epochs", "gird": "grid", "sample": "samples"},
    "finetune_full": {"checkpointdir": "checkpoint_dir", "train.tie_embedding": "train.tie_embeddings", "over_write": "overwrite"},
    "generate": {"promt": "prompt", "max_new_token": "max_new_tokens", "topk": "top_k", "temprature": "temperature"},
    "chat": {"temperatur": "temperature", "top-p": "top_p"},
    "convert_to_litgpt": {"checkpoint-dir": "checkpoint_dir", "modelname": "model_name", "dytpe": "dtype"},
    "merge_lora": {"pretrained_checkpoint": "pretrained_checkpoint_dir"},
}
UNKNOWN_ROWS = [(name, key, meant) for name, keys in UNKNOWN.items() for key, meant in keys.items()]


@pytest.mark.parametrize(("name", "key", "meant"), quick(UNKNOWN_ROWS, *UNKNOWN_ROWS[::4]))
def test_an_unknown_key_gets_the_nearest_known_one(name: str, key: str, meant: str, place: Place) -> None:
    check(Case(key, command(name, f"--{key}", "1"), f"--{key} is not a known key", f"did you mean {meant}", 2), place)
    check(Case(key, yaml(f"{key}: 1\n", name), f"f.yaml: {key} is not a known key", f"did you mean {meant}", 2), place)


COMMAND_LINE = [
    Case("command misspelt", lambda place: ["finetune-lora", "x"], "'finetune-lora'", "Did you mean 'finetune_lora'?", 2),
    Case("command in capitals", lambda place: ["Generate", "x"], "'Generate'", "Did you mean 'generate'?", 2),
    Case("a file as the command", lambda place: ["f.yaml"], "'f.yaml'", "`litgpt --help` lists them", 2),
    Case("a path with a zero byte", command("finetune_lora", "--out_dir", "a\0b"), "out_dir", "zero byte", 2),
    Case("an empty out_dir", command("finetune_lora", "--out_dir="), "--out_dir is empty", "name a file or a folder", 2),
    Case("an empty checkpoint", lambda place: ["generate", ""], "--checkpoint_dir is empty", "name a file or a folder", 2),
    Case("an empty config", command("finetune_lora", "--config="), "--config", "needs a value", 2),
    Case(
        "a config that is a folder",
        lambda place: ["finetune_lora", place.write("d/x", "").parent, "--config", "d"],
        "it is a folder",
        "put a file there",
        2,
    ),
    Case("two values alone", command("finetune_lora", "4", "5"), "'4' stands alone", "--key value", 2),
    Case("one dash", command("finetune_lora", "-lora_r=4"), "'-lora_r=4'", "--key value", 2),
    Case("two dashes", command("finetune_lora", "--"), "'--'", "--key value", 2),
    Case("a group as a number", command("finetune_lora", "--eval", "3"), "--eval", "eval.interval", 2),
    Case(
        "data without its class", lambda place: ["finetune_lora", "c", "--data.json_path", "x"], "--data.json_path", "--data with one of", 2
    ),
    Case("a data class misspelt", command("finetune_lora", "--data", "Alpacca"), "'Alpacca'", "did you mean Alpaca?", 2),
    Case("a data class's key", command("finetune_lora", "--data.json_pat", "x"), "'json_pat'", "did you mean json_path?", 2),
    Case("a data class as a mapping", command("finetune_lora", "--data", "{json_path: x}"), "--data", "class_path", 2),
    Case("temperature", command("generate", "--temperature", "-1"), "temperature is -1", "(0: always the most probable token)"),
    Case("temperature nan", command("generate", "--temperature", "nan"), "--temperature: 'nan'", "a number", 2),
    Case("temperature inf", command("generate", "--temperature", "inf"), "--temperature: 'inf'", "a number", 2),
    Case("top_p", command("generate", "--top_p", "1.5"), "top_p is 1.5", "from 0 to 1"),
    Case("top_p nan", command("generate", "--top_p", "nan"), "--top_p: 'nan'", "a number", 2),
    Case("no new tokens", command("generate", "--max_new_tokens", "0"), "max_new_tokens is 0", "at least 1"),
    Case("negative samples", command("generate", "--num_samples", "-2"), "num_samples is -2", "at least 1"),
    Case("a prompt too long", command("generate", "--prompt", "word " * 400), "the model reads at most 256", "shorten the prompt"),
    Case("a seed of text", command("generate", "--seed", "lucky"), "--seed: 'lucky'", "an integer", 2),
    Case("a seed too large", command("generate", "--seed", str(2**70)), "seed is 1180591620717411303424", "from 0 to 4294967295", 2),
    Case("chat precision", command("chat", "--precision", "fp16"), "precision 'fp16'", "16-true"),
    Case("full with LoRA's key", command("finetune_full", "--lora_r", "4"), "--lora_r", "not a known key", 2),
    Case("no grid", command("sweep", "--config", PLAIN), "no grid", "--grid.lora_r '[4, 8, 16]'"),
    Case("a grid as a number", command("sweep", "--grid", "3"), "--grid needs keys below it", "--grid.lora_r '[4, 8]'", 2),
    Case("a grid of one value", command("sweep", "--grid.lora_r", "8"), "--grid.lora_r: '8' is not a list", "such as '[4, 8]'", 2),
    Case("a grid of no value", command("sweep", "--grid.lora_r", "[]"), "--grid.lora_r: '[]' is not a list", "such as '[4, 8]'", 2),
    Case("a grid of text", command("sweep", "--grid.lora_r", "[4, x]"), '--grid.lora_r: "x"', "an integer", 2),
    Case("a grid of seeds", command("sweep", "--grid.seed", "[1, -1]"), "--grid.seed is -1", "from 0 to 4294967295", 2),
    Case("a value twice", command("sweep", "--grid.lora_r", "[4, 4]"), "grid.lora_r names 4 twice", "leave one out"),
    Case("a grid of data", command("sweep", "--grid.data", "[JSON]"), "data cannot vary", "These may vary: "),
    Case(
        "a grid of a class", command("sweep", "--grid.optimizer", "[{class_path: os.system}]"), "'os.system' is not allowed", "litgpt.", 2
    ),
    Case("a grid of a grid", command("sweep", "--grid.grid.lora_r", "[4]"), "--grid.grid.lora_r is not a known key", "grid.lora_r?", 2),
    Case("no samples", command("sweep", "--grid.lora_r", "[4]", "--samples", "0"), "samples is 0", "at least 1"),
    Case(
        "a sweep of nothing frozen",
        command("sweep", "--lora_query", "true", "--grid.lora_r", "[2, 4]"),
        "none is frozen",
        "skip2lora_enabled",
    ),
    # values of training
    tune("lora_r", -1, "from 0 to 65536"),
    tune("lora_r", 10**9, "from 0 to 65536"),
    tune("lora_r", 10**30, "from 0 to 65536"),
    tune("lora_r", 4.5, "an integer", 2),
    tune("lora_alpha", "nan", "an integer", 2),
    tune("lora_dropout", 1.5, "from 0"),
    tune("lora_dropout", -0.1, "from 0"),
    tune("lora_dropout", "nan", "a number", 2),
    tune("lora_query", "perhaps", "true or false", 2),
    tune("skip2lora_dropout", 2, "from 0"),
    tune("seed", -1, "from 0 to 4294967295", 2),
    tune("seed", 2**40, "from 0 to 4294967295", 2),
    tune("devices", "many", '"auto"'),
    tune("devices", -3, "a number from 1"),
    tune("devices", "[]", "'[]'"),
    tune("num_nodes", -1, "at least 1"),
    tune("precision", "fp4", "bf16-true"),
    tune("logger_name", "tensorbord", "tensorboard", 2),
    tune("skip2lora_cache", "disc", "disk", 2),
    tune("optimizer", "Adan", "Adam"),
    tune("optimizer", "torch.optim.lr_scheduler.StepLR", "not an optimizer"),
    tune("optimizer.lr", "-1", "refuses its arguments", culprit="optimizer"),
    tune("optimizer.lr", "nan", "a finite number", culprit="lr"),
    tune("optimizer.lr", "abc", "'abc'", culprit="lr"),
    tune("optimizer.betas", "[1, 2, 3]", "betas", culprit="optimizer"),
    tune("optimizer.params", "[]", "params", culprit="optimizer"),
    tune("train.epochs", "inf", "an integer", 2),
    tune("train.max_steps", 0, "at least 1", 2),
    tune("train.max_time", "nan", "a number", 2),
    tune("train.max_norm", -1, "above 0", 2),
    tune("train.min_lr", "nan", "a number", 2),
    tune("train.max_seq_length", 1, "at least 2"),
    tune("train.lr_warmup_fraction", 3, "from 0 to 1", 2),
    tune("eval.interval", 0, "at least 1", 2),
    tune("eval.evaluate_example", "third", '"first", "random", a number from 0 or a list of them', 2),
    tune("data.val_split_fraction", 1, "a number from 0 to below 1"),
    tune("data.val_split_fraction", "nan", "a number", 2),
    tune("data.prompt_style", "alpca", "did you mean 'alpaca'", culprit="'alpca'"),
    tune("data.prompt_style", "os.system", "There are chat, alpaca", culprit="'os.system'"),
    # blocks
    tune("lora_block_indices", "[2]", "blocks 0 to 1"),
    tune("lora_block_indices", "[-3]", "blocks 0 to 1"),
    tune("lora_block_indices", "last:0", "last:"),
    tune("lora_block_indices", "last:x", "last:"),
    tune("lora_block_indices", "every:0", "every:"),
    tune("lora_block_indices", "first:2", "last:"),
    tune("lora_block_indices", "[1.5]", "give a list such as [0, 1, -1]"),
    tune("lora_block_indices", "[[0]]", "give a list such as [0, 1, -1]"),
    tune("lora_block_indices", "{a: 0}", "give a list such as [0, 1, -1]"),
    tune("lora_block_indices", "transformer.h.x", "blocks 0 to 1"),
    tune("lora_block_indices", "last:" + "9" * 5000, "last:"),
    tune("lora_block_indices", "[]", "name at least one"),
    Case(
        "output layer misspelt",
        command("finetune_lora", "--skip2lora_enabled", "--skip2lora_output_layer", "lm_hed"),
        "skip2lora_output_layer is 'lm_hed'",
        "lm_head",
    ),
    Case(
        "negative warm-up",
        command("finetune_lora", "--skip2lora_enabled", "--skip2lora_warmup_steps", "-5"),
        "skip2lora_warmup_steps",
        "is -5: a whole number of at least 0 is needed",
    ),
    Case(
        "warm-up twice",
        command("finetune_lora", "--skip2lora_enabled", "--skip2lora_warmup_steps", "5", "--skip2lora_warmup_epochs", "0.5"),
        "skip2lora_warmup_steps and skip2lora_warmup_epochs",
        "give one of them",
    ),
    Case(
        "negative warm-up in epochs",
        command("finetune_lora", "--skip2lora_enabled", "--skip2lora_warmup_epochs", "-1"),
        "skip2lora_warmup_epochs is -1.0",
        "a number of at least 0 is needed",
    ),
    Case(
        "warm-up that goes nowhere",
        command("finetune_lora", "--skip2lora_enabled", "--skip2lora_warmup_steps", "5", "--skip2lora_warmup_lr", "0"),
        "skip2lora_warmup_lr is 0.0",
        "a number above 0",
    ),
]

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
YAML = [
    Case("a list of keys", yaml("- checkpoint_dir: c\n- lora_r: 4\n"), "f.yaml holds a list", "`checkpoint_dir: DIR`", 2),
    Case("a text", yaml("just words checkpoint_dir"), "f.yaml holds a", "`checkpoint_dir: DIR`", 2),
    Case("comments only", yaml("# nothing\n"), "f.yaml is empty", "`checkpoint_dir: DIR`", 2),
    Case("a tab", yaml("train:\n\tepochs: 3\n"), "f.yaml, line 2", "not valid YAML", 2),
    Case("a zero byte", yaml("lora_r: 4\0\n"), "f.yaml", "not valid YAML", 2),
    Case("two documents", yaml("lora_r: 4\n---\nlora_r: 8\n"), "f.yaml, line 2", "one document is read", 2),
    Case("an unclosed quote", yaml("precision: 'bf16\n"), "f.yaml, line 2", "not valid YAML", 2),
    Case("an unknown alias", yaml("lora_r: *r\n"), "f.yaml, line 1", "alias 'r'", 2),
    Case("a key twice", yaml("lora_r: 4\nseed: 1\nlora_r: 8\n"), "f.yaml, line 3", "'lora_r' twice", 2),
    Case("a key twice below", yaml("train:\n  epochs: 4\n  epochs: 8\n"), "f.yaml, line 3", "'epochs' twice", 2),
    Case("a bomb of aliases", yaml(BOMB), "f.yaml", "aliases", 2),
    Case("a bomb in a known key", yaml("log:\n  metadata:\n    " + BOMB.replace("\n", "\n    ")), "f.yaml", "aliases", 2),
    Case("a list in itself", yaml("lora_block_indices: &a [*a]\n"), "f.yaml", "aliases", 2),
    Case("nested too deeply", yaml("lora_r: " + "[" * 1000 + "]" * 1000), "f.yaml", "nested too deeply", 2),
    Case("UTF-16", yaml("lora_r: 4\n".encode("utf-16").decode("latin-1")), "f.yaml", "YAML", 2),
    Case("a Python object", yaml("out_dir: !!python/object/apply:os.system [touch x]\n"), "f.yaml, line 1", "not valid YAML", 2),
    Case("a Python name", yaml("lora_r: !!python/name:os.system\n"), "f.yaml, line 1", "not valid YAML", 2),
    Case("an own tag", yaml("lora_r: !mine 4\n"), "f.yaml, line 1", "'!mine'", 2),
    Case("a list for a number", yaml("lora_r: [4]\n"), "f.yaml: lora_r: [4]", "an integer", 2),
    Case("a mapping for a number", yaml("train: {epochs: {a: 1}}\n"), "f.yaml: train.epochs", "an integer", 2),
    Case("a number for text", yaml("precision: 16\n"), "f.yaml: precision: 16", "text", 2),
    Case("null for a number", yaml("lora_r:\n"), "f.yaml: lora_r: None", "an integer", 2),
    Case("text for a switch", yaml("overwrite: 'yes please'\n"), "f.yaml: overwrite", "true or false", 2),
    Case("data as a list", yaml("data: [JSON]\n"), "f.yaml: data", "name of a class", 2),
    Case("data as a switch", yaml("data: true\n"), "f.yaml: data", "name of a class", 2),
    Case("a class in data's key", yaml("data: {class_path: JSON, init_args: {json_path: [1]}}\n"), "f.yaml: data", "a path", 2),
    Case("an optimizer's typo", yaml("optimizer: {class_path: AdamW, init_args: {learning_rate: 1}}\n"), "learning_rate", "lr"),
    Case("an optimizer as a list", yaml("optimizer: [AdamW]\n"), "f.yaml: optimizer", "name of a class", 2),
    Case("metadata as a list", yaml("log: {metadata: [1]}\n"), "f.yaml: log.metadata", "a mapping", 2),
    Case("a foreign class", yaml("data: {class_path: os.system}\n"), "'os.system' is not allowed", "litgpt.", 2),
    Case(
        "unbalanced batches", yaml("train: {global_batch_size: 4, micro_batch_size: 3}\n"), "(4)", "multiple of train.micro_batch_size", 2
    ),
    Case("nothing ends it", yaml("train: {epochs: null}\n"), "training would never end", "train.max_steps", 2),
    Case(
        "both warm-ups",
        yaml("train: {lr_warmup_steps: 3, lr_warmup_fraction: 0.1}\n"),
        "train.lr_warmup_steps (3) and train.lr_warmup_fraction (0.1)",
        "leave one out",
        2,
    ),
    Case("both names", yaml("skip2lora_positions: [0]\nskip2lora_block_indices: [1]\n"), "skip2lora_positions", "give one of them", 2),
    Case("a grid as a list", yaml("grid: [4]\n", "sweep"), "f.yaml: grid needs keys below it", "--grid.lora_r '[4, 8]'", 2),
    Case("a grid of numbers", yaml("grid: {optimizer: {lr: 4}}\n", "sweep"), "f.yaml: grid.optimizer.lr: 4", "such as '[4, 8]'", 2),
    Case("a missing checkpoint", yaml("checkpoint_dir: nowhere\n"), "nowhere does not exist", "litgpt download list"),
    Case("a file as the checkpoint", yaml("checkpoint_dir: data.json\nlora_r: 4\n"), "data.json", "folder"),
]
ROWS = [*COMMAND_LINE, *YAML]


@pytest.mark.parametrize("case", quick(ROWS, *ROWS[::3]), ids=lambda case: case.name)
def test_bad_settings(case: Case, place: Place) -> None:
    check(case, place)


def test_bad_settings_have_names_of_their_own() -> None:
    assert len({case.name for case in ROWS}) == len(ROWS)


def test_all_unknown_keys_are_reported_at_once(place: Place) -> None:
    ended = run(command("finetune_lora", "--lora_rr", "4", "--trian.epochs", "3", "--sed", "1")(place))
    check_message(ended, "lora_rr", "did you mean lora_r", 2)
    assert "did you mean train.epochs" in ended.err and "did you mean seed" in ended.err
