"""`litgpt convert_to_gguf`: a complete file or none, from full models only."""

from __future__ import annotations

import resource
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from litgpt.__main__ import main
from litgpt.checkpoint import load_model, load_weights
from litgpt.config import Config
from litgpt.convert.gguf import writer
from litgpt.convert.gguf.convert import convert_gguf
from litgpt.convert.gguf.export import convert_to_gguf
from litgpt.convert.merge import merge_lora
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tests.helpers import gguf_files, tiny


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path, mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already: name another file, or add --overwrite"):
        convert_to_gguf(mixture, target)
    with pytest.raises(UserError, match=r"x\.bin is not the name of a GGUF file"):
        convert_to_gguf(mixture, tmp_path / "x.bin")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most, message in ((100, "File too large"), (9000, "the disk is full, or a limit on the size of files is reached")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        code = main(["convert_to_gguf", str(mixture), str(target), "--overwrite"])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 1 and f"Error: {target}: {message}" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"] and target.read_bytes() == b"mine"
    convert_to_gguf(mixture, target, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_file_that_was_written_meanwhile_is_kept(tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.gguf"

    def meanwhile(*args: Any) -> Any:
        target.write_bytes(b"theirs")
        return stored(*args)

    stored = writer.stored
    monkeypatch.setattr(writer, "stored", meanwhile)
    with pytest.raises(UserError, match="x.gguf exists already: it was written in the meantime"):
        convert_to_gguf(mixture, target)
    assert target.read_bytes() == b"theirs" and [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_adapter_folders_are_refused_with_the_reason(tmp_path: Path, mixture: Path) -> None:
    for enabled, message in ((True, "Skip2-LoRA adapter, which reads the outputs of earlier blocks"), (False, "run `litgpt merge_lora")):
        folder = tmp_path / str(enabled)
        folder.mkdir()
        (folder / "lit_model.pth.lora").write_bytes(b"")
        (folder / "hyperparameters.yaml").write_text(f"checkpoint_dir: {mixture}\nskip2lora_enabled: {str(enabled).lower()}\n")
        with pytest.raises(UserError, match=message):
            convert_to_gguf(folder, tmp_path / "x.gguf")


@torch.inference_mode()
def test_merged_lora(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    lora = {"lora_r": 4, **tiny.ALL_LORA}
    built = tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **lora))
    folder = tiny.write_adapter(tmp_path / "adapter", base, built, **lora)
    with pytest.raises(UserError, match="run `litgpt merge_lora"):
        convert_to_gguf(folder, tmp_path / "x.gguf")
    merge_lora(folder)
    convert_to_gguf(folder, tmp_path / "x.gguf")
    convert_gguf(tmp_path / "x.gguf", tmp_path / "again")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).eval()
    ids = gguf_files.IDS % 320
    torch.testing.assert_close(load_model(tmp_path / "again", torch.float32)(ids), built(ids), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs(ids).logits, built(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_transformers_reads_our_smollm2_with_the_same_tokens_and_text(smollm2_dir: Path, tmp_path: Path) -> None:
    convert_to_gguf(smollm2_dir, tmp_path / "x.gguf", dtype="f32")
    tokenizer, theirs = Tokenizer(smollm2_dir), transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in ("Hello world, the year 2024 isn't", "<|im_start|>user\nhi 日本 🎉<|im_end|>\n"):
        assert theirs.encode(text) == tokenizer.ids(text)
    assert theirs.chat_template == tokenizer.chat_template
    ids = tokenizer.encode("The capital of France is")[None]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    model = GPT(Config.from_checkpoint(smollm2_dir))
    model.load_state_dict(load_weights(smollm2_dir / "lit_model.pth"))
    model.float()
    for _ in range(12):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    assert ids[0].tolist() == expected and tokenizer.decode(ids[0]).startswith("The capital of France is Paris")


def test_formats_of_llama_cpps_program(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program in its place gets the file in the weights' own format, and the wanted format's name."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"q4_k_m needs llama\.cpp's program llama-quantize on the PATH.*q4_0"):
        convert_to_gguf(mixture, tmp_path / "x.gguf", dtype="q4_k_m")
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n/bin/cat "$1" > "$2"; printf "%s" "$3" >> "$2"\n')
    program.chmod(0o755)
    convert_to_gguf(mixture, tmp_path / "x.gguf", dtype="q4_k_m")
    convert_to_gguf(mixture, tmp_path / "plain.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes() + b"Q4_K_M"
    assert f"Quantised to q4_k_m by {program}." in capsys.readouterr().out
    program.write_text("#!/bin/sh\necho unknown tensor >&2\nexit 3\n")
    with pytest.raises(UserError, match="cannot make q2_k.*unknown tensor"):
        convert_to_gguf(mixture, tmp_path / "y.gguf", dtype="q2_k")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Modelfile", "bin", "plain.Modelfile", "plain.gguf", "x.gguf"]


def test_the_commands_it_names_may_be_pasted(
    tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths with blanks are one word, and Ollama's names have none."""
    folder, settings = tmp_path / "my models", {"lora_r": 2, "lora_query": True}
    base = tiny.write_base(folder / "base", write_tiny_tokenizer)
    adapter = tiny.write_adapter(folder / "adapter", base, tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings)), **settings)
    for words, end in (
        (["convert_to_gguf", base, folder / "My model.v1 (new).gguf"], ["create", "my-model.v1-new", "-f", str(folder / "Modelfile")]),
        (["add_tokens", base, folder / "more", "--tokens", "<t>"], ["finetune_lora", str(folder / "more"), "--data", "FILE"]),
        (["convert_adapter", adapter, folder / "a.gguf"], ["-m", "base.gguf", "--lora", str(folder / "a.gguf")]),
    ):
        assert main([str(word) for word in words]) == 0
        named = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
        assert any(named[i : i + 4] == end for i in range(len(named))), named
