"""What the tables spoil is good before: each command succeeds on it, so that a row fails for its own reason."""

from __future__ import annotations

from tests.helpers.places import Place, run


def test_every_command_succeeds_on_the_unspoilt_files(place: Place) -> None:
    base, data = place.base(), place.data()
    for words in (
        [
            "finetune_lora",
            base,
            "--data",
            "JSON",
            "--data.json_path",
            data,
            "--max_steps",
            1,
            "--out_dir",
            "out",
            "--eval.max_new_tokens",
            2,
        ],
        ["finetune_full", base, "--data", "JSON", "--data.json_path", data, "--max_steps", 1, "--out_dir", "full"],
        ["generate", base, "--max_new_tokens", 3],
        ["generate", place.adapter(), "--max_new_tokens", 3],
        ["merge_lora", place.adapter()],
        ["convert_to_litgpt", place.hf(), "--checkpoint_dir", "from_hf"],
        ["convert_to_litgpt", place.gguf(), "--checkpoint_dir", "from_gguf"],
        ["generate", "from_hf", "--max_new_tokens", 3],
        ["generate", "from_gguf", "--max_new_tokens", 3],
    ):
        ended = run(words)
        assert ended.code == 0, (words, ended.err)
