"""Arbitrary content for every file and text that comes from elsewhere: a UserError or a sound result, in bounded time and memory.

The examples are the same in every run; `make slow` tries many more of them.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from litgpt.__main__ import load
from litgpt.activations.store import Layout, Rows, open_store
from litgpt.adapters.blocks import resolve_blocks
from litgpt.atomic import read_manifest
from litgpt.cli import parse
from litgpt.config import Config
from litgpt.convert.hf import open_weights
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.data.sources import read_records
from litgpt.errors import UserError
from litgpt.files import parse_yaml
from litgpt.keys import Keys
from litgpt.prompts import ChatTemplate
from litgpt.templates import MAX_SIZE
from litgpt.tokenizer import Tokenizer
from tests.helpers import places, worlds
from tests.helpers.places import World, bounded

SECONDS = 30
"""for one example: what a template may take, with room for a slow machine"""


def examples(fast: int, slow: int) -> Any:
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def fuzz(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """`check` may raise a UserError and nothing else, within bounds."""

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        with bounded(SECONDS, 2**30):
            try:
                check(example)
            except UserError as error:
                assert str(error)

    run()


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8), below, max_size=4), max_leaves=12
    )


NUMBERS = st.integers(-5, 400) | st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=12)
JSON = nested(SCALARS)


def spoilt(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The mapping with some values exchanged, and some keys left out or added."""
    change = st.dictionaries(st.sampled_from(sorted(good)) | st.text(max_size=8), JSON | st.just(...), max_size=3)
    return change.map(lambda changes: {key: value for key, value in {**good, **changes}.items() if value is not ...})


def bitten(content: bytes, places: int = 6) -> st.SearchStrategy[bytes]:
    """The bytes with a few of them exchanged, or cut off."""

    def bite(changes: tuple[list[tuple[int, bytes]], int]) -> bytes:
        changed = bytearray(content)
        for at, new in changes[0]:
            changed[at : at + len(new)] = new
        return bytes(changed[: changes[1]])

    at = st.tuples(st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=8))
    return st.tuples(st.lists(at, max_size=places), st.integers(0, len(content)) | st.just(len(content))).map(bite)


# GGUF

GGUF_VALUES = st.booleans() | st.integers(-(2**31), 2**32 - 1) | st.floats(width=32) | st.text(max_size=8)
GGUF_LISTS = (
    st.lists(st.integers(0, 2**32 - 1), max_size=5) | st.lists(st.text(max_size=4), max_size=5) | st.lists(st.booleans(), max_size=3)
)


@examples(12, 500)
def test_gguf(count: int, world: World, tmp_path: Path) -> None:
    metadata, shapes = worlds.gguf_metadata(world.base), worlds.gguf_tensors()
    keys = [key for key in metadata if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")]
    header = world.gguf.read_bytes()[: world.gguf.read_bytes().index(b"output_norm.weight")]
    rest = world.gguf.read_bytes()[len(header) :]
    values = st.dictionaries(st.sampled_from(sorted(keys)) | st.text(max_size=8), GGUF_VALUES | GGUF_LISTS, max_size=3)
    sizes = st.dictionaries(st.sampled_from(sorted(shapes)), st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), max_size=2)
    described = st.tuples(values, sizes).map(lambda both: worlds.gguf_bytes({**metadata, **both[0]}, {**shapes, **both[1]}))
    raw = st.binary(max_size=200).map(lambda tail: b"GGUF" + struct.pack("<I", 3) + tail)
    file, target = tmp_path / "model.gguf", tmp_path / "lit"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        try:
            convert_to_litgpt(file, target)
        except UserError:
            assert not target.exists()
            raise
        Config.from_checkpoint(target)
        shutil.rmtree(target)

    fuzz(count, described | raw | bitten(header).map(lambda head: head + rest), check)


# safetensors and index files

ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E5M2", "F4", "x"]) | SCALARS,
        "shape": st.lists(NUMBERS, max_size=5) | JSON,
        "data_offsets": st.lists(NUMBERS, max_size=3) | JSON,
    }
)


@examples(50, 3000)
def test_safetensors_header(count: int, tmp_path: Path) -> None:
    described = st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRY | JSON, max_size=4).map(
        lambda facts: json.dumps(facts).encode()
    )
    header = described | st.binary(max_size=80) | st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"9" * 9000])
    length = st.none() | NUMBERS.filter(lambda number: 0 <= number < 2**64)
    file = tmp_path / "model.safetensors"

    def check(example: tuple[bytes, int | None, bytes]) -> None:
        head, claimed, data = example
        file.write_bytes(struct.pack("<Q", len(head) if claimed is None else claimed) + head + data)
        for tensor in open_weights(tmp_path).values():
            if tensor.shape and max(tensor.shape) < 1000:
                tensor.load()

    fuzz(count, st.tuples(header, length, st.binary(max_size=64)), check)


@examples(50, 3000)
def test_index_files(count: int, tmp_path: Path) -> None:
    """Nothing but files inside the folder may be opened; there is none, so nothing may be read at all."""
    folder = tmp_path / "below" / "model"
    folder.mkdir(parents=True)
    for outside in (tmp_path / "a.safetensors", tmp_path / "below" / "a.safetensors"):
        outside.write_bytes(b"")
    names = st.sampled_from(
        ["../a.safetensors", "../../a.safetensors", str(tmp_path / "a.safetensors"), "./a.safetensors", "a/../a.safetensors"]
    )
    weight_map = st.dictionaries(
        st.text(max_size=8), names | st.text(max_size=20).map(lambda text: text + ".safetensors") | SCALARS, max_size=4
    )
    content = (st.fixed_dictionaries({"weight_map": weight_map | JSON}) | JSON).map(json.dumps) | st.text(max_size=50)

    def check(text: str) -> None:
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(UserError) as caught:
            open_weights(folder)
        assert "index.json" in str(caught.value) or str(folder) in str(caught.value)

    fuzz(count, content, check)


# Data

RECORD = st.dictionaries(
    st.sampled_from(["instruction", "input", "output", "prompt", "completion", "messages", "conversations", "history", "tools", "system"])
    | st.text(max_size=5),
    st.text(max_size=9)
    | JSON
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | SCALARS, "content": SCALARS})),
    max_size=4,
)


@examples(50, 3000)
def test_json_data(count: int, tmp_path: Path) -> None:
    def check(example: tuple[str, str | bytes]) -> None:
        suffix, content = example
        file = tmp_path / f"data{suffix}"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        for record in read_records(file):
            texts = [message["content"] for message in record.messages]
            assert texts and all(isinstance(text, str) for text in texts)
            "".join(texts).encode()

    records = st.lists(RECORD | JSON, max_size=4)
    content = (
        (records | JSON).map(json.dumps)
        | records.map(lambda entries: "\n".join(map(json.dumps, entries)))
        | st.text(max_size=60)
        | st.binary(max_size=60)
    )
    fuzz(count, st.tuples(st.sampled_from([".json", ".jsonl", ".csv", ".json.gz"]), content), check)


# Settings


@examples(100, 10000)
def test_block_indices(count: int) -> None:
    words = st.sampled_from(
        ["all", "last:", "every:", "last:2", "every:-1", "last:2:2", "transformer.h.", "transformer.h.1", "transformer.h.²", "auto", "٣"]
    )
    texts = st.text(max_size=8) | st.tuples(words, st.text(max_size=3) | NUMBERS.map(str)).map("".join)
    spec = texts | SCALARS | st.lists(texts | SCALARS, max_size=4) | JSON

    def check(example: tuple[Any, int, int, int]) -> None:
        given_spec, n_layer, first, last = example
        blocks = resolve_blocks(given_spec, n_layer, range(min(first, n_layer), min(last, n_layer)), "key")
        assert blocks and list(blocks) == sorted(set(blocks)) and all(0 <= block < n_layer for block in blocks)

    fuzz(count, st.tuples(spec, st.integers(1, 8), st.integers(0, 8), st.integers(0, 8)), check)


@examples(40, 1500)
def test_yaml_config(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file says, `parse` gives arguments or one message; it makes no class but those of litgpt."""
    monkeypatch.chdir(tmp_path)
    setup = load("finetune_lora")
    keys = sorted(Keys(setup).types)
    nest = st.dictionaries(st.sampled_from([key.partition(".")[2] or key for key in keys]) | st.text(max_size=6), JSON, max_size=3)
    special = st.sampled_from(
        [{"class_path": "JSON", "init_args": {"json_path": "x"}}, {"class_path": "os.system"}, "torch.load", {"init_args": 3}]
    )
    mapping = st.dictionaries(
        st.sampled_from([*keys, "train", "eval", "log", "data", "optimizer"]) | st.text(max_size=6), JSON | nest | special, max_size=4
    )
    content = mapping.map(json.dumps) | st.text(max_size=60)

    def check(text: str) -> None:
        (tmp_path / "f.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        given_ = parse("litgpt finetune", setup, ["f.yaml", "--checkpoint_dir", "c"])
        assert type(given_["data"]).__module__.startswith(("litgpt.", "builtins"))

    fuzz(count, content, check)


# fmt: off
YAML_PIECES = [
    "a: ", "- ", "&a ", "*a", "<<: ", "[", "]", "{", "}", ", ", ": ", "? ", "|\n", ">\n", "'", '"', "#", "\n", "  ", "!!int ",
    "!!python/name:os.system ", "!!binary ", "---\n", "1e3", "2024-13-01", ".nan", "\t", "%YAML 1.2\n", "x",
]
# fmt: on


@examples(100, 8000)
def test_yaml_text(count: int) -> None:
    text = st.lists(st.sampled_from(YAML_PIECES), max_size=25).map("".join) | st.text(max_size=60)
    fuzz(count, text, lambda content: parse_yaml(content, "f.yaml"))


# Checkpoints


@examples(40, 1500)
def test_model_config(count: int, world: World, tmp_path: Path) -> None:
    import yaml

    good = yaml.safe_load((world.base / "model_config.yaml").read_text())

    def check(values: dict[str, Any]) -> None:
        (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(values))
        Config.from_checkpoint(tmp_path)

    fuzz(count, spoilt(good), check)


@examples(50, 3000)
def test_hugging_face_config(count: int) -> None:
    fuzz(count, spoilt(worlds.HF_CONFIG), lambda values: Config.from_hf(values) and None)


@examples(60, 2000)
def test_tokenizer_files(count: int, world: World, tmp_path: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    good = {name: json.loads((world.base / name).read_text()) for name in names}
    text = (world.base / "tokenizer.json").read_bytes()
    parts = st.fixed_dictionaries(
        {"tokenizer_config.json": spoilt(good["tokenizer_config.json"]), "generation_config.json": spoilt(good["generation_config.json"])}
    )
    model = spoilt(good["tokenizer.json"]["model"]).map(lambda model: {**good["tokenizer.json"], "model": model})
    whole = (spoilt(good["tokenizer.json"]) | model).map(lambda content: json.dumps(content).encode()) | bitten(text) | st.just(text)

    def check(example: tuple[bytes, dict[str, Any]]) -> None:
        (tmp_path / "tokenizer.json").write_bytes(example[0])
        for name, content in example[1].items():
            (tmp_path / name).write_text(json.dumps(content))
        tokenizer = Tokenizer(tmp_path)
        tokenizer.decode(tokenizer.ids("hello there\n"))
        if tokenizer.chat_template is not None:
            ChatTemplate.from_tokenizer(tokenizer)

    fuzz(count, st.tuples(whole, parts), check)


@examples(60, 4000)
def test_an_index_of_a_cache(count: int, tmp_path: Path) -> None:
    """A sample is read if the index notes its rows, else computed again, whatever the bytes of the index."""
    layout = Layout({0: 1, 1: 1}, 0, (1, 1), torch.float32)
    values = torch.tensor([1.5, 2.5])[:, None, None]
    written: list[int] = []

    def fill(store: Rows, batches: Iterator[list[int]], done: int) -> None:
        for batch in batches:
            store[layout.slices[batch[0]]] = values[batch]
            written.extend(batch)

    open_store(tmp_path / "key", layout, [[0], [1]], fill, str)
    index = tmp_path / "key/index.bin"
    good = index.read_bytes()
    entries = [good[8:16], good[16:]]

    def check(content: bytes) -> None:
        index.write_bytes(content)
        written.clear()
        store = open_store(tmp_path / "key", layout, [[0], [1]], fill, str)
        assert all(torch.equal(store[layout.slices[i]], values[[i]]) for i in (0, 1)) and index.read_bytes()[8:24] == good[8:]
        assert {0, 1} - set(written) <= {i for i in (0, 1) if content[8 * i + 8 : 8 * i + 16] == entries[i]}

    fuzz(count, st.binary(max_size=40) | st.permutations([*entries, bytes(8)]).map(b"".join) | st.just(good), check)


@examples(60, 4000)
def test_manifest(count: int, tmp_path: Path) -> None:
    """Nothing that a folder's manifest says raises."""
    manifest = {"litgpt_manifest": 1, "files": {"a": {"bytes": 1, "sha256": "x"}}}
    content = (spoilt(manifest) | JSON).map(json.dumps) | st.text(max_size=40) | st.sampled_from(["[" * 100_000, "9" * 5000])

    def check(text: str) -> None:
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        files = read_manifest(tmp_path)
        assert files is None or all("/" not in name[:1] and ".." not in name.split("/") for name in files)

    fuzz(count, content, check)


# Chat templates

# fmt: off
ATOMS = [
    "messages", "messages[0]", "messages[0].content", "x", "ns.x", "loop", "range(9)", "range(99999)", "'ab'", "'{0.__class__}'", "3",
    "9999", "-1", "[x, x]", "{'a': x}", "''.__class__", "self", "cycler", "namespace", "f", "f(x)", "none", "'%9d'",
]
# fmt: on
# fmt: off
SUFFIXES = [
    "", "|list", "|string", "|join(x)", "|tojson", "|tojson(indent=9)", "|replace('a', x)", "|indent(99)", "|map('string')", "|sum",
    "|first", "|length", "|format(x)", "|batch(9)", ".__init__", ".items()", ".format(x)", ".join(x)", ".replace('', x)", "[::2]", "[0]",
    ".split('')", "|groupby('role')", "|sort", "|dictsort", "(x)", "|attr('x')", "|map('attr', 'x')",
]
# fmt: on
OPERATORS = [" + ", " * ", " ~ ", " ** ", " % ", " == ", " in ", " // ", " and ", " < "]
EXPRESSION = st.recursive(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from(SUFFIXES)).map("".join),
    lambda below: (
        st.tuples(below, st.sampled_from(OPERATORS), below).map(lambda parts: f"({''.join(parts)})")
        | st.tuples(below, st.sampled_from(SUFFIXES)).map(lambda parts: f"({parts[0]}){parts[1]}")
    ),
    max_leaves=5,
)
# fmt: off
STATEMENTS = [
    "{{{{ {0} }}}}", "{{% set x = {0} %}}", "{{% set ns.x = {0} %}}", "{{% for x in {0} %}}{{{{ x }}}}{{% endfor %}}",
    "{{% for i in range(40) %}}{{% set ns.x = {0} %}}{{% endfor %}}{{{{ ns.x }}}}", "{{% set x %}}{{{{ {0} }}}}{{{{ x }}}}{{% endset %}}",
    "{{% macro f(x) %}}{{{{ {0} }}}}{{% endmacro %}}", "{{% if {0} %}}a{{% else %}}b{{% endif %}}",
    "{{% call(y) f({0}) %}}{{{{ y }}}}{{% endcall %}}",
]
# fmt: on
TEMPLATE = st.lists(st.tuples(st.sampled_from(STATEMENTS), EXPRESSION).map(lambda parts: parts[0].format(parts[1])), min_size=1, max_size=5)


@examples(60, 3000)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_chat_templates(count: int) -> None:
    pieces = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        " for ",
        " in ",
        "if ",
        "endif",
        "endfor",
        "macro ",
        "set ",
        "x",
        "|",
        "(",
        ")",
        "'",
        "-",
        ".",
        "~",
        "\n",
    ]
    raw = st.lists(st.sampled_from(pieces), max_size=20).map("".join) | st.text(max_size=40)
    messages = [{"role": "user", "content": "Hello {0}!"}, {"role": "assistant", "content": "Good day." * 20}]

    def check(source: str) -> None:
        text = ChatTemplate("{% set ns = namespace(x='ab') %}{% set x = 'abc' %}" + source).render(messages)
        own = text.replace("<class 'jinja2.", "").replace("<class 'dict'>", "")  # of the globals that a template may use
        assert len(text) <= MAX_SIZE and "<class" not in own and "<built-in" not in own and "<module" not in own

    fuzz(count, TEMPLATE.map("".join) | raw, check)


def test_the_harness_notices(tmp_path: Path) -> None:
    """An exception of another kind, a hang and a huge allocation fail a test."""

    def hang(example: Any) -> None:
        while True:
            pass

    with pytest.raises(ZeroDivisionError):
        fuzz(3, st.just(0), lambda zero: 1 // zero)
    with pytest.raises(MemoryError):
        fuzz(3, st.just(0), lambda zero: bytearray(2**40) and None)
    with pytest.raises(places.OutOfTimeError), bounded(0.2):
        hang(None)
