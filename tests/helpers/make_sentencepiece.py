"""Makes sentencepiece.json: what SentencePiece itself makes of texts, and the vocabularies. `pip install sentencepiece`, then

python tests/convert/make_sentencepiece.py tests/convert/sentencepiece.json
"""

import base64
import io
import json
import random
import sys
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

WORDS = """the quick brown fox jumps over the lazy dog while seven small cats sleep under the old oak tree near a river; nobody saw them
It isn't what they'd said: we'll see, I've 12 apples, 345 pears and 6789 plums (about 3.14 kg) for $20!
def add(a, b):\treturn a + b  # indented    code
Grüße aus Köln, naïve café, señor; Привет мир; 日本語のテキスト 東京; 한국어 문장""".splitlines()
TEXTS = [
    "the quick brown fox",
    "It isn't  what   they'd said: 12 345 6789",
    " leading",
    "trailing ",
    "  two",
    "a\tb\nc\n\n\nd",
    "naïve café 日本語 東京 한국어",
    "emoji 🎉 👩‍👩‍👧‍👦 ∑ \u00a0 x",
    "def add(a, b):\n    return a + b",
    "x" * 20,
    "theoldoaktree",
    "\ufb01ne \u212b",
    "<|user|>the dog<|end|> sleeps",
    "",
]
SHARED = {
    "model_type": "bpe",
    "vocab_size": 520,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 1.0,
    "num_threads": 1,
    "minloglevel": 2,
}
DEFINED = ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "\n\n\n", "<|user|>", "<|end|>"]
MODELS = {
    "llama": {"add_dummy_prefix": True, "unk_id": 0, "bos_id": 1, "eos_id": 2},
    "unigram": {"model_type": "unigram", "vocab_size": 390, "add_dummy_prefix": True, "bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2},
    "unigram rules": {
        "model_type": "unigram",
        "vocab_size": 137,
        "byte_fallback": False,
        "remove_extra_whitespaces": True,
    },
    "gemma": {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "user_defined_symbols": DEFINED},
}


def describe(settings: dict, lines: list[str]) -> dict:
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        if settings.get("remove_extra_whitespaces"):
            rules.write("FB01\t66 69\n212B\tC5\n")
            rules.flush()
            settings = {**settings, "normalization_rule_tsv": rules.name}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**SHARED, **settings})
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(sp.vocab_size())
    defined = settings.get("user_defined_symbols", [])
    pieces = [sp.id_to_piece(i) for i in numbers]
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 4 if pieces[i] in defined else 1 for i in numbers
    ]
    special = {"bos": sp.bos_id(), "eos": sp.eos_id(), "unk": sp.unk_id()}
    scores = [round(sp.get_score(i), 6) for i in numbers]
    content = {"pieces": pieces, "scores": scores, "types": kinds, **special, "ids": [sp.encode(text) for text in TEXTS]}
    if settings.get("remove_extra_whitespaces"):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
        content["charsmap"] = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    return content


if __name__ == "__main__":
    rng = random.Random(0)
    lines = [" ".join(rng.sample(words, len(words))) for words in (line.split(" ") for line in WORDS) for _ in range(60)]
    content = {"version": sentencepiece.__version__, "texts": TEXTS, "models": {name: describe(row, lines) for name, row in MODELS.items()}}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, separators=(",", ":"))
