"""One batch for the base and its Skip2-LoRA adapters: each answer as its own model gives it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt.api import LLM
from litgpt.errors import UserError
from litgpt.generate.engine import Row
from litgpt.generate.sampling import Sampling
from litgpt.serve.models import Models, SharedBatch, own_name
from tests.helpers import tiny
from tests.serve.conftest import Folders

HOW = {"precision": "32-true", "device": "cpu"}


def alone(folder: Path, prompt: list[int], new: int) -> list[int]:
    return list(tiny.generate(LLM.load(folder, **HOW).model, torch.tensor(prompt), len(prompt) + new, temperature=0.0))  # type: ignore[arg-type]


def test_every_answer_of_a_mixed_batch_is_its_models_own(folders: Folders) -> None:
    """Two requests for each name at once, of different lengths, joining at different steps."""
    models = Models(folders.base, folders.adapters, **HOW)
    assert list(models) == ["tiny", *folders.adapters]
    rows = {}
    for i, name in enumerate([*models, *models]):
        rows[Row(tiny.ids(1, 4 + 3 * i, 320, seed=i)[0].tolist(), Sampling(temperature=0.0), head=models[name].head)] = models[name]
    waiting, shared = list(rows), 0
    while waiting or any(model.batch.rows for model in models.values()):
        for row in waiting[:2]:
            rows[row].batch.add(row)
            waiting.remove(row)
        for batch in {model.batch for model in models.values()}:
            shared = max(shared, len({row.head for row in batch.rows}))
            for row, logits in batch.step():
                row.draw(logits)
                if len(row.tokens) == row.start + 8:
                    batch.remove(row)
    assert shared == 4  # the base and three adapters in one step
    paths = {"tiny": folders.base, **folders.adapters}
    for row, model in rows.items():
        assert row.tokens[row.start :] == alone(paths[model.name], row.tokens[: row.start], 8), model.name
    assert len({tuple(row.tokens[-8:]) for row in rows}) == len(rows)


def test_a_request_converts_nothing(folders: Folders, tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """A folder in Hugging Face's format named on the command line is converted; named by a request it is not."""
    tiny.hf_llama().save_pretrained(write_tiny_tokenizer(tmp_path / "hf"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"hf must be converted first.*`litgpt convert_to_litgpt "):
        Models(folders.base, {}, **HOW).open("hf", tmp_path / "hf")
    assert sorted(tmp_path.rglob("*")) == before
    assert list(Models(folders.base, {"hf": tmp_path / "hf"}, **HOW)) == ["tiny", "hf"]


def test_who_shares_what(folders: Folders) -> None:
    models = Models(folders.base, folders.adapters, **HOW)
    base = models["tiny"]
    assert {name for name, model in models.items() if model.batch is base.batch} == {"tiny", "skip", "other", "norm"}
    assert isinstance(base.batch, SharedBatch) and models["tail"].batch is not models["lora"].batch
    assert {model.parent for model in models.values()} == {None, "tiny"}
    own, adapted = (
        [*layer.parameters(), *layer.buffers()] for layer in (base.llm.model.blocks[0].mlp, models["lora"].llm.model.blocks[0].mlp)
    )
    assert own and {*map(id, own)} <= {*map(id, adapted)}


def test_quantised_base(folders: Folders) -> None:
    models = Models(folders.base, {name: folders.adapters[name] for name in ("skip", "lora")}, quantize="int8", **HOW)
    for name, model in models.items():
        path = folders.adapters.get(name, folders.base)
        llm, prompt = LLM.load(path, quantize="int8", **HOW), tiny.ids(1, 7, 320)[0].tolist()  # type: ignore[arg-type]
        row = Row(list(prompt), Sampling(temperature=0.0), head=model.head)
        model.batch.add(row)
        row.draw(model.batch.step()[0][1])
        model.batch.remove(row)
        assert row.tokens[7:] == list(tiny.generate(llm.model, torch.tensor(prompt), 8, temperature=0.0))


def test_an_adapters_folder_brings_its_base(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(folders.adapters["skip"], {"more": folders.adapters["lora"]}, **HOW)
    assert list(models) == ["skip", "tiny", "more"] and models["skip"].parent == "tiny"
    assert own_name(Path("out/mine/final")) == own_name(Path("out/mine/step-000100")) == own_name(Path("out/mine")) == "mine"
    monkeypatch.chdir(folders.adapters["skip"])
    assert list(Models(".", {}, **HOW)) == ["skip", "tiny"]
    assert own_name(Path("final")) == "skip"


def test_a_model_of_its_own_weights(folders: Folders) -> None:
    models = Models(folders.base, {"copy": folders.base}, **HOW)
    assert models["copy"].batch is not models["tiny"].batch and models["copy"].parent is None


def test_refusals(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tiny' is the name of a model that is served already"):
        Models(folders.base, {"tiny": folders.adapters["skip"]}, **HOW)
    with pytest.raises(UserError, match="nowhere does not exist"):
        Models(folders.base, {"x": tmp_path / "nowhere"}, **HOW)
