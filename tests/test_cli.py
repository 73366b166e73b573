"""The command line: how words become arguments, what a mistake looks like, what it may import, and how a process ends."""

import http.server
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from litgpt import __main__ as program, __version__
from litgpt.__main__ import COMMANDS, OTHER_NAMES, load, main
from litgpt.args import EvalArgs, LogArgs, TrainArgs, as_config
from litgpt.cli import UsageError, parse
from litgpt.data import JSON, Alpaca, Alpaca2k, PythonDocs
from litgpt.errors import UserError
from tests.helpers.runs import PLAIN

HEAVY = {"torch", "lightning", "transformers", "numpy", "rich", "tokenizers", "jinja2", "safetensors", "gguf"}


def finetune(*words: str) -> dict[str, Any]:
    return parse("litgpt finetune", load("finetune_lora"), list(words))


def error(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        finetune(*words)
    return str(caught.value)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A YAML file as a user would write it."""
    file = tmp_path / "my.yaml"
    file.write_text(
        """
checkpoint_dir: checkpoints/base
lora_r: 4
data:
  class_path: litgpt.data.JSON
  init_args:
    json_path: train.json
    seed: 7
train:
  epochs: 2
  min_lr: 1e-5
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 2e-3
    betas: [0.9, 0.95]
"""
    )
    return str(file)


# The table


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    table = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", table, re.MULTILINE) for name in COMMANDS)
    assert max(map(len, table.splitlines())) <= 80, "a terminal wraps it"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"litgpt {__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetun"]) == 2
    assert "did you mean 'finetune'" in capsys.readouterr().err.lower()
    assert main([]) == 2


@pytest.mark.parametrize("words", ["finetune full", "convert from_litgpt", "generate adapter_v2", "merge lora", "generate base"])
def test_a_command_in_two_words(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As in early versions of LitGPT."""
    with pytest.raises(SystemExit):
        main([words.replace(" ", "_").removesuffix("_base"), "--help"])
    expected = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    assert capsys.readouterr().out == expected


def test_help_without_heavy_imports() -> None:
    """The table needs nothing but the standard library; a command's help and its parse errors not torch."""
    script = f"""
import contextlib, io, sys
before = set(sys.modules)
from litgpt.__main__ import COMMANDS, main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(["--help"])
    table = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
    for name in COMMANDS:
        assert main([name, "--no_such_key", "1"]) == 2
        try:
            main([name, "--help"])
        except SystemExit as end:
            assert end.code == 0
assert table == {{"litgpt"}}, table
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


# Words to arguments


def test_a_checkpoint_and_data(tmp_path: Path) -> None:
    given = finetune("checkpoints/base", "--data", "JSON", "--data.json_path", "my.json", "--max_steps", "10")
    assert given["checkpoint_dir"] == Path("checkpoints/base")
    assert given["data"] == JSON(json_path=Path("my.json"))
    assert given["train"].max_steps == 10 and given["train"].epochs == 5
    assert given["eval"] == EvalArgs(interval=100, max_new_tokens=100, max_iters=100) and given["log"] == LogArgs()


def test_the_order_of_words_does_not_matter() -> None:
    given = finetune("--max_steps=10", "--data.json_path=my.json", "c", "--data=JSON")
    assert given == finetune("c", "--data", "JSON", "--data.json_path", "my.json", "--train.max_steps", "10")


@pytest.mark.parametrize("words", [["{}"], ["--config", "{}"], ["--config={}"]])
def test_a_yaml_file(config: str, words: list[str]) -> None:
    given = finetune(*(word.format(config) for word in words))
    assert given["checkpoint_dir"] == Path("checkpoints/base") and given["lora_r"] == 4
    assert given["data"] == JSON(json_path=Path("train.json"), seed=7)
    assert given["train"].epochs == 2 and given["train"].min_lr == 1e-5
    assert given["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "betas": [0.9, 0.95]}}


def test_the_command_line_counts_more_than_the_file(config: str) -> None:
    given = finetune("--epochs", "9", "other/base", "--data.seed", "8", config, "--lora_r", "16")
    assert given["checkpoint_dir"] == Path("other/base") and given["lora_r"] == 16
    assert given["train"].epochs == 9 and given["train"].min_lr == 1e-5
    assert given["data"] == JSON(json_path=Path("train.json"), seed=8)


def test_another_class_keeps_what_fits(config: str) -> None:
    assert finetune(config, "--data", "PythonDocs", "--data.max_samples", "50")["data"] == PythonDocs(seed=7, max_samples=50)


def test_a_later_file_counts_more(config: str, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("train: {epochs: 3}\ndata: {init_args: {seed: 9}}\n")
    given = finetune(config, str(tmp_path / "more.yaml"))
    assert (given["train"].epochs, given["train"].min_lr) == (3, 1e-5)
    assert given["data"] == JSON(json_path=Path("train.json"), seed=9)


def test_a_class_drops_the_arguments_of_another(config: str) -> None:
    given = finetune(config, "--data.json_path", "b.json", "--data", "PythonDocs", "--data", "JSON")
    assert given["data"] == JSON(json_path=Path("b.json"), seed=7)
    assert finetune(config, "--data", "null", "--dry_run")["data"] is None
    assert finetune(config, "--optimizer", "torch.optim.AdamW", "--optimizer.eps", "1")["optimizer"]["init_args"] == {
        "lr": 2e-3,
        "betas": [0.9, 0.95],
        "eps": 1,
    }


def test_entries_of_a_mapping() -> None:
    assert finetune("c", "--log.metadata", "{a: 1}", "--log.metadata.b", "[2]")["log"].metadata == {"a": 1, "b": [2]}


def test_values_have_the_types_of_their_keys(tmp_path: Path) -> None:
    given = finetune("c", "--lora_dropout", "0", "--eval.evaluate_example", "3", "--devices", "2", "--resume", "auto", "--precision", "16")
    assert [type(given[key]) for key in ("lora_dropout", "devices", "resume", "precision", "checkpoint_dir")][:4] == [float, int, str, str]
    assert given["eval"].evaluate_example == 3
    (tmp_path / "f.yaml").write_text("lora_r: '4'\nlora_dropout: '1e-1'\noverwrite: 'true'\n")
    given = finetune("c", str(tmp_path / "f.yaml"))
    assert (given["lora_r"], given["lora_dropout"], given["overwrite"]) == (4, 0.1, True)


def test_a_file_stands_on_its_base(tmp_path: Path) -> None:
    """The path is relative to the file that names it; what the file itself states counts more, the command line most."""
    (tmp_path / "models").mkdir()
    (tmp_path / "base.yaml").write_text(
        "lora_r: 4\nseed: 1\ntrain: {epochs: 7, max_steps: 3}\ndata: {class_path: JSON, init_args: {seed: 7}}\n"
    )
    (tmp_path / "models/a.yaml").write_text("base: ../base.yaml\ncheckpoint_dir: c\nseed: 2\ntrain: {epochs: 8}\n")
    (tmp_path / "models/b.yaml").write_text(f"base: {tmp_path}/models/a.yaml\nseed: 3\ndata: {{init_args: {{json_path: x}}}}\n")
    given = finetune("--seed", "4", str(tmp_path / "models/b.yaml"))
    assert (given["lora_r"], given["seed"], given["train"].epochs, given["train"].max_steps) == (4, 4, 8, 3)
    assert given["checkpoint_dir"] == Path("c") and given["data"] == JSON(json_path=Path("x"), seed=7) and "base" not in given


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: f.yaml", "f.yaml: base: a chain of more than 8 base files"),
        ("base: 5", "f.yaml: base: 5 is not the name of a YAML file"),
        ("base: [f.yaml]", "f.yaml: base: ['f.yaml'] is not the name of a YAML file"),
        ("base: data.json", "f.yaml: base: 'data.json' is not the name of a YAML file"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: bad.yaml", "bad.yaml: lora_rr is not a known key (did you mean lora_r?)"),
        ("base: attack.yaml", "attack.yaml: data.class_path: the class 'os.system' is not allowed"),
        ("train: {base: bad.yaml}", "f.yaml: train.base is not a known key"),
    ],
)
def test_mistakes_of_a_base(text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text(text)
    Path("bad.yaml").write_text("lora_rr: 4")
    Path("attack.yaml").write_text("data: {class_path: os.system}")
    assert part in error("f.yaml", "--checkpoint_dir", "c")


def test_one_argument_of_the_optimizer(config: str) -> None:
    for key in ("--optimizer.lr", "--optimizer.init_args.lr"):
        assert finetune(config, key, "1e-4")["optimizer"]["init_args"] == {"lr": 1e-4, "betas": [0.9, 0.95]}
    assert finetune("c", "--optimizer.lr", "1e-4")["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 1e-4}}
    assert finetune(config, "--optimizer", "SGD", "--optimizer.lr", "1")["optimizer"] == {"class_path": "SGD", "init_args": {"lr": 1}}
    assert finetune(config, "--optimizer", "torch.optim.SGD")["optimizer"] == {"class_path": "torch.optim.SGD"}
    assert finetune("c", "--optimizer", "SGD")["optimizer"] in ("SGD", {"class_path": "SGD"})


@pytest.mark.parametrize("key", ["skip2lora_block_indices", "skip2lora_positions", "lora_block_indices"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0, 1, 2, 3]", [0, 1, 2, 3]),
        ("[-1]", [-1]),
        ("3", 3),
        ("-1", -1),
        ("last:6", "last:6"),
        ("every:5", "every:5"),
        ("all", "all"),
        ("transformer.h.3", "transformer.h.3"),
        ('["transformer.h.0", 4]', ["transformer.h.0", 4]),
        ("null", None),
    ],
)
def test_block_indices(key: str, text: str, value: object, tmp_path: Path) -> None:
    """The same on the command line and in a file."""
    file = tmp_path / "blocks.yaml"
    file.write_text(f"checkpoint_dir: c\n{key}: {text}\n")
    name = key.replace("skip2lora_positions", "skip2lora_block_indices")
    assert finetune("c", f"--{key}", text)[name] == value
    assert finetune(str(file))[name] == value


def test_a_flag_without_a_value_is_true() -> None:
    assert finetune("c", "--overwrite")["overwrite"] is True
    assert finetune("--overwrite", "--skip2lora_enabled", "false", "c")["overwrite"] is True


def test_a_grid(tmp_path: Path) -> None:
    """Option by option, inline, and nested or flat in a file; short names and types as of the keys themselves; the later one counts."""
    blocks = ["all", "last:6", [0, 1]]
    expected = {"lora_dropout": [0.0, 0.1], "skip2lora_block_indices": blocks, "optimizer.lr": [5e-4], "train.epochs": [1, 2]}
    file = tmp_path / "grid.yaml"
    nested = {"lora_dropout": [0, 0.1], "skip2lora_block_indices": blocks, "optimizer": {"lr": ["5e-4"]}, "train.epochs": [1, 2]}
    file.write_text(json.dumps({"checkpoint_dir": "c", "grid": nested}).replace('"5e-4"', "5e-4"))
    words = ["--grid.lora_dropout", "[0, 0.1]", "--grid.skip2lora_block_indices", "[all, last:6, [0, 1]]", "--grid.optimizer.lr", "[5e-4]"]
    inline = "{lora_dropout: [0, 0.1], skip2lora_block_indices: [all, last:6, [0, 1]], optimizer: {lr: [5e-4]}, epochs: [1, 2]}"
    plain = str(PLAIN)
    for given in ([plain, "c", *words, "--grid.epochs", "[1, 2]"], [str(file)], [plain, "c", "--grid", inline]):
        found = parse("litgpt sweep", load("sweep"), given)["grid"]
        assert found == expected and isinstance(found["lora_dropout"][0], float)
    assert parse("litgpt sweep", load("sweep"), [str(file), "--grid.optimizer.lr", "[1]"])["grid"] == {**expected, "optimizer.lr": [1]}
    given = parse("litgpt sweep", load("sweep"), [plain, "c"])
    assert given.pop("grid") == {} and given.pop("samples") is None and given.keys() == finetune("c").keys()


def test_groups_and_classes_may_come_whole(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("epochs: 7\n")
    (tmp_path / "data.yaml").write_text("class_path: JSON\ninit_args: {json_path: a.json}\n")
    given = finetune("c", "--train", str(tmp_path / "train.yaml"), "--data", str(tmp_path / "data.yaml"), "--max_steps", "3")
    assert (given["train"].epochs, given["train"].max_steps) == (7, 3) and given["data"] == JSON(json_path=Path("a.json"))
    given = finetune("c", "--train", "{epochs: 7}", "--data", "{class_path: litgpt.data.JSON, init_args: {json_path: a.json}}")
    assert given["train"].epochs == 7 and given["data"] == JSON(json_path=Path("a.json"))


def test_what_is_saved_can_be_read_back(config: str, tmp_path: Path) -> None:
    given = finetune(config, "--access_token", "sesame", "--log.metadata", '{"a": 1, "when": "2e-3"}', "--skip2lora_positions", "[0, -1]")
    saved = tmp_path / "hyperparameters.yaml"
    saved.write_text(yaml.safe_dump(as_config(given)))
    assert "sesame" not in saved.read_text()
    assert finetune(str(saved)) == {**given, "access_token": None}


OWN_DATA = """
from dataclasses import dataclass
from litgpt.data import DataModule
@dataclass
class Mine(DataModule):
    size: int = 3
    def records(self): return [{"instruction": "a", "output": "b"}] * self.size, None
class Other: pass
"""


def test_a_data_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name on the command line, from the current folder; not from a file, which may come from someone else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_data.py").write_text(OWN_DATA)
    Path("broken_data.py").write_text("1 / 0")
    data = finetune("c", "--data", "own_data.Mine", "--data.size", "7")["data"]
    assert type(data).__name__ == "Mine" and data.size == 7 and len(data.records()[0]) == 7
    assert "own_data.Mine" in str(as_config({"data": data}))
    for name, message in {
        "own_data.Other": "not a subclass of litgpt.data.DataModule with a method `records`, or LitGPT's `setup`",
        "own_data.None_": "not a subclass of litgpt.data.DataModule",
        "os.system": "not a subclass of litgpt.data.DataModule",
        "litgpt_nowhere.X": "'litgpt_nowhere' cannot be imported (No module",
        "broken_data.X": "'broken_data' cannot be imported (division by zero",
    }.items():
        assert message in error("c", "--data", name)
    Path("f.yaml").write_text("checkpoint_dir: c\ndata: own_data.Mine\n")
    assert "own_data.Mine' is not allowed" in error("f.yaml")


def test_a_config_from_an_address(tmp_path: Path) -> None:
    """And from the base beside it; whatever is wrong with the server is one message."""
    pages = {"/a/x.yaml": b"base: y.yaml\nlora_r: 5\n", "/a/y.yaml": b"checkpoint_dir: c\ndata: JSON\nlora_r: 4\n", "/big": b"#" * 2**19}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        assert (finetune("--config", f"{host}/a/x.yaml")["lora_r"], finetune(f"{host}/a/y.yaml")["lora_r"]) == (5, 4)
        assert "/none cannot be fetched (HTTP status 404)" in error("--config", f"{host}/none")
        assert "/big cannot be fetched (it has more than 262,144 bytes)" in error("--config", f"{host}/big")
        assert "user name or password" in error("--config", host.replace("//", "//me:sesame@"))
        server.shutdown()
    assert "cannot be fetched ([Errno 111]" in error("--config", f"{host}/a/x.yaml")


def test_litgpts_settings_of_alpaca_and_the_settings_of_a_converted_adapter(tmp_path: Path) -> None:
    file, url = tmp_path / "hyperparameters.yaml", Alpaca.file_url
    arguments = {"download_dir": "data/alpaca2k", "file_url": url, "file_name": "a.json", "repo_id": "mhenrichsen/alpaca_2k_test"}
    file.write_text(yaml.safe_dump({"checkpoint_dir": "c", "data": {"class_path": "litgpt.data.Alpaca2k", "init_args": arguments}}))
    assert finetune(str(file))["data"] == Alpaca2k(file_name="a.json", download_dir=Path("data/alpaca2k"))
    file.write_text("checkpoint_dir: c\ndata: {class_path: litgpt.data.Alpaca, init_args: {file_url: x, file_name: ../a.json}}\n")
    assert "data.file_name is '../a.json'" in error(str(file))
    file.write_text("checkpoint_dir: c\ndata: JSON\nskip2lora_enabled: true\nskip2lora_warmup: true\nquantize: bnb.int8\n")
    given = finetune(str(file))
    assert (given["skip2lora_warmup_epochs"], given["quantize"]) == (1.0, "bnb.int8")


def test_warmup_as_a_fraction_replaces_the_default_number_of_steps() -> None:
    for words in ([], ["--lr_warmup_steps", "0"]):
        train = finetune("c", *words, "--lr_warmup_fraction", "0.1")["train"]
        assert (train.lr_warmup_fraction, train.lr_warmup_steps) == (0.1, None)


# LitGPT's own files: every key of its LoRA YAMLs, with values as they stand there.

UPSTREAM = """
checkpoint_dir: checkpoints/{checkpoint}
out_dir: out/finetune/lora-{name}
precision: bf16-true
quantize:
devices: 1
num_nodes: 1
lora_r: {r}
lora_alpha: 16
lora_dropout: 0.05
lora_query: true
lora_key: {every}
lora_value: true
lora_projection: {every}
lora_mlp: {every}
lora_head: {every}
data:
  class_path: litgpt.data.Alpaca2k
  init_args:
    mask_prompt: false
    val_split_fraction: 0.05
    prompt_style: alpaca
    ignore_index: -100
    seed: 42
    num_workers: 4
    download_dir: data/alpaca2k
train:
  save_interval: 200
  log_interval: 1
  global_batch_size: {batch}
  micro_batch_size: {micro}
  lr_warmup_steps: 10
  lr_warmup_fraction:
  epochs: {epochs}
  max_tokens:
  max_steps:
  max_time:
  max_seq_length: 512
  tie_embeddings:
  max_norm:
  min_lr: 6.0e-05
eval:
  interval: 100
  max_new_tokens: 100
  max_iters: 100
  initial_validation: false
  final_validation: true
  evaluate_example: first
log:
  project:
  run:
  group:
  teamspace:
  metadata:
  log_model: false
  save_logs: true
  checkpoint_name:
logger_name: csv
seed: 1337
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 0.0002
    weight_decay: 0.0
    betas:
      - 0.9
      - 0.95
"""
UPSTREAM_MODELS = {
    "llama2-7b": dict(checkpoint="meta-llama/Llama-2-7b-hf", r=32, every="false", batch=8, micro=2, epochs=4),
    "tiny-llama-1.1b": dict(
        checkpoint="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", r=32, every="true", batch=8, micro=8, epochs=3
    ),
    "phi-2": dict(checkpoint="microsoft/phi-2", r=8, every="true", batch=8, micro=4, epochs=1),
}


OWN = {
    "save_every_minutes",
    "keep_last",
    "keep_best",
    "skip_nonfinite",
    "group_by_length",
    "activation_checkpointing",
    "replay",
    "follow_ups",
    "word_dropout",
    "neftune_noise_alpha",
}
"""keys below train that upstream does not have"""


@pytest.mark.parametrize("name", UPSTREAM_MODELS)
def test_upstream_yaml(name: str, tmp_path: Path) -> None:
    model = UPSTREAM_MODELS[name]
    file = tmp_path / "lora.yaml"
    file.write_text(UPSTREAM.format(name=name, **model))
    given = finetune(str(file))
    assert given["checkpoint_dir"] == Path("checkpoints") / str(model["checkpoint"]) and given["lora_r"] == model["r"]
    assert given["data"] == Alpaca2k(val_split_fraction=0.05, prompt_style="alpaca", download_dir=Path("data/alpaca2k"))
    assert (given["train"].global_batch_size, given["train"].micro_batch_size) == (8, model["micro"])
    assert (given["train"].epochs, given["train"].lr_warmup_steps, given["train"].min_lr) == (model["epochs"], 10, 6e-5)
    assert given["optimizer"]["init_args"] == {"lr": 2e-4, "weight_decay": 0.0, "betas": [0.9, 0.95]}
    keys = yaml.safe_load(file.read_text())
    assert vars(TrainArgs()).keys() - keys["train"].keys() == OWN
    assert vars(EvalArgs()).keys() - keys["eval"].keys() == {"patience", "target_loss"} and keys["log"].keys() == vars(LogArgs()).keys()
    assert keys["train"].keys() <= vars(TrainArgs()).keys() and keys["eval"].keys() <= vars(EvalArgs()).keys()


# Mistakes


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["checkpoint_dir is missing"]),
        (["c", "--trian.epochs", "3", "--max_stps", "4", "--lora_rr=3"], ["train.epochs", "mean max_steps", "mean lora_r"]),
        (["c", "--train.epochs", "abc"], ["--train.epochs: 'abc' is not an integer or null"]),
        (["c", "--epochs", "1.5"], ["--epochs: '1.5'"]),
        (["c", "--lora_r", "many"], ["--lora_r: 'many' is not an integer"]),
        (["c", "--lora_query", "maybe"], ["--lora_query: 'maybe' is not true or false"]),
        (["c", "--quantize", "int4"], ["--quantize: 'int4' is not one of bnb.nf4, "]),
        (["c", "--skip2lora_norm", "layer"], ["'layer' is not one of rms, none"]),
        (["c", "--data", "Jsn"], ["--data: there is no 'Jsn' (did you mean JSON?)", "PythonDocs"]),
        (["c", "--data", "litgpt.data.Jsn"], ["did you mean JSON?"]),
        (["c", "--data", "litgpt.nothing.JSON"], ["there is no 'litgpt.nothing.JSON'"]),
        (["c", "--data", "litgpt.errors.UserError"], ["there is no 'litgpt.errors.UserError'"]),
        (["c", "--data.json_path", "x"], ["--data.json_path needs --data with one of Alpaca"]),
        (["c", "--data", "JSON", "--data.jsn_path", "x"], ["JSON has no 'jsn_path' (did you mean json_path?)"]),
        (["c", "--data", "JSON", "--data.max_seq_length", "9"], ["JSON has no 'max_seq_length' (did you mean train.max_seq_length?)"]),
        (["c", "--data", "JSON", "--data.seed", "x"], ["--data.seed: 'x' is not an integer"]),
        (["c", "--data", "5"], ["there is no '5'"]),
        (["c", "--train", "5"], ["--train needs keys below it"]),
        (["c", "--max_steps"], ["--max_steps needs a value"]),
        (["c", "--max_steps", "--overwrite"], ["--max_steps needs a value"]),
        (["c", "--config"], ["--config needs a value"]),
        (["c", "-x"], ["'-x' is not understood"]),
        (["c", "0", "1"], ["'0' stands alone", "'[0, 1, 2]'"]),
        (["c", "pyproject.toml"], ["'pyproject.toml' stands alone", "do you mean --data pyproject.toml?"]),
        (["c", "--out", "x"], ["--out is not a known key (did you mean out_dir?)"]),
        (["c", "--dataset", "x.jsonl"], ["did you mean data?"]),
        (["c", "--train.beta1", "0.9"], ["did you mean optimizer.betas?"]),
        (["c", "--checkpoint_dir", "d"], ["checkpoint_dir is given twice, as 'c' and as --checkpoint_dir 'd'"]),
        (["c", "--max_new_tokens", "5"], ["did you mean eval.max_new_tokens?"]),
        (["c", "--data", "my.jsnol"], ["'my.jsnol' is no file or folder here, and no class: 'my' cannot be imported"]),
        (["c", "--config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["c", "--epochs", "0"], ["train.epochs is 0: a whole number of at least 1 is needed"]),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], parts: list[str]) -> None:
    message = error(*words)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 3


def test_a_model_without_its_key() -> None:
    with pytest.raises(UsageError, match="'pyproject.toml' stands alone.*do you mean --checkpoint_dir pyproject.toml?"):
        parse("litgpt data", load("data"), ["my.jsonl", "pyproject.toml"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["f.yaml is empty"]),
        ("[1, 2]", ["f.yaml holds a list"]),
        ("checkpoint_dir: c\ntrain: [1\nlora_r: 2\n", ["f.yaml, line 3", "not valid YAML"]),
        ("checkpoint_dir: !!python/object/apply:os.system [id]", ["f.yaml, line 1", "os.system"]),
        ("trian:\n  epochs: 3\n", ["f.yaml: trian is not a known key (did you mean train?)"]),
        ("train: {epoch: 3}\neval: {intervall: 2}\nfoo: 1", ["train.epochs?", "eval.interval?", "f.yaml: foo is not a known key"]),
        ("max_steps: 3", ["f.yaml: max_steps is not a known key (did you mean train.max_steps?)"]),
        ("config: x.yaml", ["config is not a known key"]),
        ("1: 2", ["f.yaml: 1 is not a known key"]),
        ("train:\n  epochs: abc", ["f.yaml: train.epochs: 'abc' is not an integer or null"]),
        ("train:", ["f.yaml: train needs keys below it, such as train.save_interval"]),
        ("train: [1]", ["f.yaml: train needs keys below it"]),
        ("lora_query: 1", ["f.yaml: lora_query: 1 is not true or false"]),
        ("checkpoint_dir: 5", ["f.yaml: checkpoint_dir: 5 is not a path"]),
        ("data: {json_path: x}", ["f.yaml: data takes a class_path and the mapping init_args"]),
        ("data: {class_path: JSON, init_args: {jsn_path: x}}", ["f.yaml: data.init_args.jsn_path: JSON has no 'jsn_path'"]),
        ("data: {class_path: JSON, init_args: {seed: x}}", ["f.yaml: data.init_args.seed: 'x' is not an integer"]),
        ("data: {class_path: JSON, init_args: [x]}", ["f.yaml: data takes a class_path and the mapping init_args"]),
        ("data: {init_args: {seed: 1}}", ["f.yaml: data.init_args.seed needs --data with one of"]),
        ("optimizer: 3", ["f.yaml: optimizer: expected the name of a class, not 3"]),
        ("skip2lora_positions: {a: 1}", ["f.yaml: skip2lora_positions: {'a': 1} is not"]),
        ("train: {global_batch_size: 8, micro_batch_size: 3}", ["train.global_batch_size (8)", "train.micro_batch_size (3)"]),
    ],
)
def test_mistakes_in_a_file(text: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text(text)
    message = error("f.yaml", "--checkpoint_dir", "c")
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 3


def test_all_mistakes_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown keys and wrong values of files and command line, each with its place."""
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text("lora_rr: 4\nlora_r: many\ntrain: {epochs: 0.5}\n")
    lines = error("f.yaml", "--lora_alpha", "x", "--sed", "1").splitlines()
    assert [line.strip() for line in lines] == [
        "f.yaml: lora_rr is not a known key (did you mean lora_r?)",
        "f.yaml: lora_r: 'many' is not an integer",
        "f.yaml: train.epochs: 0.5 is not an integer or null",
        "--lora_alpha: 'x' is not an integer",
        "--sed is not a known key (did you mean seed?)",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml, line 1: not UTF-8 text" in error(str(tmp_path / "binary.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml cannot be read: it is a folder, not a file" in error(str(tmp_path / "folder.yaml"))


def test_a_mistake_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune_lora", "c", "--epochs", "abc"]) == 2
    assert capsys.readouterr() == ("", "Error: --epochs: 'abc' is not an integer or null\n")


# Classes by name


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that module `trap_module`, importable, writes when it is imported or its class is made."""
    sprung = tmp_path / "sprung"
    (tmp_path / "trap_module.py").write_text(f"open({str(sprung)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    return sprung


@pytest.mark.parametrize(
    "target", ["trap_module.Trap", "os.system", "subprocess.Popen", "builtins.eval", "litgpt_evil.X", "torch.optimX.Y"]
)
@pytest.mark.parametrize(
    "place",
    [
        "data: {{class_path: {0}, init_args: {{args: id}}}}",
        "data: {0}",
        "optimizer: {{class_path: {0}}}",
        "optimizer: {0}",
        "log: {{metadata: {{x: [{{class_path: {0}}}]}}}}",
        "data: {{class_path: JSON, init_args: {{json_path: {{class_path: {0}}}}}}}",
    ],
)
def test_foreign_classes_are_refused_before_any_import(target: str, place: str, trap: Path, tmp_path: Path) -> None:
    text = place.format(target)
    file = tmp_path / "attack.yaml"
    file.write_text(f"checkpoint_dir: c\n{text}\n")
    key = text.partition(":")[0]
    assert "is not allowed" in error(str(file))
    if key != "log":
        if text != f"data: {target}":  # the user's own class, by hand
            assert "is not allowed" in error("c", f"--{key}", text.partition(": ")[2])
        assert "is not allowed" in error("c", f"--{key}.class_path", target)
    assert "is not allowed" in error("c", "--data.help", target)
    assert not trap.exists() and "trap_module" not in sys.modules


# Secrets


def test_the_access_token_is_never_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    secret = "hf_sesame"
    with pytest.raises(SystemExit):
        main(["finetune_lora", "c", "--access_token", secret, "--max_steps", "3", "--print_config"])
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed)
    assert shown["access_token"] == "***" and shown["train"]["max_steps"] == 3 and shown["checkpoint_dir"] == "c"
    (tmp_path / "f.yaml").write_text(f"access_token: [{secret}]\n")
    for words in (["--trian", "1"], ["--lora_r", "x"], ["x"], [str(tmp_path / "f.yaml")], ["--data", "trap.X"]):
        assert main(["finetune_lora", "c", "--access_token", secret, *words]) == 2
        assert main(["generate", "c", "--access_token", secret, *words]) == 2
    output = "".join(capsys.readouterr())
    assert secret not in printed + output and output.count("Error") == 10


# How a process ends


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["serve", "base"], "uvicorn", "serve"),
        (["serve", "base"], "fastapi", "serve"),
        (["evaluate", "base", "--tasks", "hellaswag"], "lm_eval", "eval"),
        (["data", "rows.parquet"], "pyarrow", "data"),
        (["data", "org/name"], "datasets", "data"),
        (["generate", "base", "--prompt", "hi", "--quantize", "bnb.nf4"], "bitsandbytes", "quantize"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    words: list[str],
    package: str,
    extra: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == package or name in ("litgpt.serve.app", "litgpt.integrations.harness")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").touch()
    assert main([str(base) if word == "base" else word for word in words]) == 1
    assert f'needs a package that is not installed ({package}): pip install "litgpt[{extra}]"' in capsys.readouterr().err
    assert extra in (importlib.metadata.metadata("litgpt").get_all("Provides-Extra") or [])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(outcome: BaseException | None) -> int:
        def command(checkpoint_dir: str) -> None:
            if outcome:
                raise outcome

        monkeypatch.setattr("litgpt.__main__.load", lambda name: command)
        return main(["finetune_lora", "c"])

    assert run(None) == 0
    assert run(UserError("no file x")) == 1
    assert capsys.readouterr().err == "Error: no file x\n"
    assert run(KeyboardInterrupt()) == 130
    for bug in (ValueError("a bug"), KeyError("a bug")):
        with pytest.raises(type(bug)):
            run(bug)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cleans_up(number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def command(checkpoint_dir: str) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    monkeypatch.setattr("litgpt.__main__.load", lambda name: command)
    before = signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit) as end:
        main(["finetune_lora", "c"])
    assert end.value.code == code and cleaned and signal.signal(number, before) is signal.SIG_DFL


def test_a_signal_does_not_lose_the_message_of_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(checkpoint_dir: str) -> None:
        raise UserError("the cause")

    def report(error: BaseException) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        return original(error)

    original = program._report
    monkeypatch.setattr(program, "_report", report)
    monkeypatch.setattr(program, "load", lambda name: command)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert main(["finetune_lora", "c"]) == 1 and capsys.readouterr().err == "Error: the cause\n"
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, "143"), (signal.SIGHUP, "129")])
def test_a_signal_that_comes_twice_does_not_disturb_the_cleaning_up(
    number: signal.Signals, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed terminal sends two SIGHUPs, from the kernel and from the shell; `timeout` sends SIGTERM to the process and to its group."""
    cleaned = []

    def command(checkpoint_dir: str) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)
            cleaned.append(True)

    monkeypatch.setattr(program, "load", lambda name: command)
    before = signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit, match=code):
        main(["finetune_lora", "c"])
    assert cleaned and signal.signal(number, before) is signal.SIG_DFL


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(checkpoint_dir: str) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr("litgpt.__main__.load", lambda name: command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert main(["finetune_lora", "c"]) == 0 and signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_process_of_its_own() -> None:
    """Once for real: the module runs as a program, and its exit code and output reach the shell."""
    command = [sys.executable, "-m", "litgpt", "finetune_lora", "checkpoints/base", "--no_such_key", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout) == (2, "") and re.match(r"Error: .*--no_such_key", done.stderr)


def test_json_is_yaml(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(json.dumps({"checkpoint_dir": "c", "train": {"min_lr": 1e-07}}))
    assert finetune(str(file))["train"].min_lr == 1e-7


def test_help_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, same in (
        (["help"], ["--help"]),
        (["help", "merge_lora"], ["merge_lora", "--help"]),
        (["--help", "data"], ["data", "--help"]),
    ):
        shown = []
        for argv in (words, same):
            with suppress(SystemExit):
                assert main(argv) == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] != ""


def test_other_names_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert OTHER_NAMES.keys() <= COMMANDS.keys()
    words = [word for names in OTHER_NAMES.values() for word in names.split()]
    assert len({*words}) == len(words) and not {*words} & COMMANDS.keys()
    for word, meant in (
        ("train", "finetune"),
        ("upload", "push"),
        ("Merge", "merge_lora"),
        ("finetun", "finetune"),
        ("evalute", "evaluate"),
    ):
        assert main([word]) == 2
        assert f"there is no command {word!r}. Did you mean {meant!r}?" in capsys.readouterr().err
    assert main(["generate", "c", "Who's there?"]) == 2 and """do you mean --prompt 'Who'"'"'s there?'?""" in capsys.readouterr().err
    assert main(["qqq"]) == 2 and "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(("launcher", "place"), [("TORCHELASTIC_RUN_ID", "LOCAL_RANK"), ("SLURM_JOB_ID", "SLURM_LOCALID")])
def test_a_mistake_that_all_processes_of_a_run_make_is_told_by_the_first(
    launcher: str, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(seconds: float) -> None:
        raise SystemExit(143)  # torchrun sends SIGTERM

    monkeypatch.setattr("litgpt.train.launch.Group.has_met", False)
    monkeypatch.setattr(program, "time", SimpleNamespace(sleep=ended))
    monkeypatch.setenv(launcher, "1")
    for index in (0, 1):
        monkeypatch.setenv(place, str(index))
        for words, code in ((["finetune_lora", "missing", "--bogus", "1"], 2), (["pretrain", "--data", "JSON"], 1)):
            with pytest.raises(SystemExit) if launcher == "TORCHELASTIC_RUN_ID" and index else nullcontext():
                assert main(words) == code
            assert capsys.readouterr().err.count("Error: ") == 1 - index
        assert main(["validate", "missing"]) == 1 and "Error: " in capsys.readouterr().err, "several tasks may validate several folders"
    monkeypatch.setattr("litgpt.train.launch.Group.has_met", True)
    assert main(["finetune_lora", "--bogus", "1"]) == 2 and "Error: " in capsys.readouterr().err
