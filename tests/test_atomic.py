"""Files and folders that appear completely or not at all, also when the process is killed, and manifests of their contents."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt import atomic
from litgpt.errors import UserError

# --- Folders and files ---


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Inside torch.save, too, which raises a RuntimeError of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*/weights.pth'"), atomic.new_file(tmp_path / "weights.pth") as file:
            torch.save({"x": torch.zeros(2**14)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left_in(tmp_path) == []


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "final"
    with atomic.new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert folder.parent == target.parent and not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert left_in(target.parent) == ["final"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_new_folder_leaves_nothing_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic.new_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("half")
        raise error
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_holds_for_folders(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic.new_folder(tmp_path / "a" / "x") as folder:
            (folder / "file").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "x").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "a" / "x" / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("plant", [lambda path, victim: path.symlink_to(victim), lambda path, victim: os.mkfifo(path)])
def test_a_file_is_not_written_through_a_planted_name(
    plant: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the name were guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0123abcd")
    plant(tmp_path / ".new.json.litgpt-0123abcd.tmp", victim)
    with pytest.raises(FileExistsError):
        atomic.write_text(tmp_path / "new.json", "{}")
    assert victim.read_text() == "precious" and not (tmp_path / "new.json").exists()


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    """Each puts its whole content in place; what a killed one left is removed by the next."""
    (tmp_path / ".new.bin.litgpt-0000dead.tmp").write_bytes(b"half")
    with atomic.new_file(tmp_path / "new.bin") as first:
        first.write(b"first")
        with atomic.new_file(tmp_path / "new.bin") as second:
            second.write(b"the second")
        assert (tmp_path / "new.bin").read_bytes() == b"the second"
    assert (tmp_path / "new.bin").read_bytes() == b"first" and left_in(tmp_path) == ["new.bin"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_another_process_wrote_meanwhile_is_kept(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links here")))
    with (
        pytest.raises(UserError, match="model.gguf exists already: it was written in the meantime"),
        atomic.new_file(path, replace=False) as file,
    ):
        file.write(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["model.gguf"]
    with atomic.new_file(tmp_path / "new", replace=False) as file:
        file.write(b"ours")
    assert (tmp_path / "new").read_bytes() == b"ours" and sorted(os.listdir(tmp_path)) == ["model.gguf", "new"]
    with atomic.new_file(path) as file:
        file.write(b"ours")
    assert path.read_bytes() == b"ours"


def test_the_second_of_two_that_make_a_folder_is_told(tmp_path: Path) -> None:
    """What the first has made meanwhile stays, unless it may be replaced."""
    for overwrite, content in ((False, "fast"), (True, "slow")):
        told = contextlib.nullcontext() if overwrite else pytest.raises(UserError, match="final exists already")
        with told, atomic.new_folder(tmp_path / "final", overwrite) as slow:
            (slow / "a").write_text("slow")
            with atomic.new_folder(tmp_path / "final", overwrite) as fast:
                (fast / "a").write_text("fast")
        assert left_in(tmp_path) == ["final"] and (tmp_path / "final" / "a").read_text() == content


def test_a_scratch_folder_goes_with_its_process(tmp_path: Path) -> None:
    code = "import os; from pathlib import Path; from litgpt.atomic import scratch_folder\n"
    code += "with scratch_folder(Path(os.environ['PLACE'])): os.kill(os.getpid(), 9)"
    environment = {**os.environ, "PLACE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1]).returncode == -9
    (killed,) = tmp_path.iterdir()
    with atomic.scratch_folder(tmp_path) as folder:
        (folder / "x").touch()
        assert not killed.exists() and list(tmp_path.iterdir()) == [folder]
    assert left_in(tmp_path) == []


def test_new_folder_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(UserError, match="exists already") as caught, atomic.new_folder(target):
        raise AssertionError("not reached")
    assert str(target) in str(caught.value)
    with pytest.raises(RuntimeError), atomic.new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("half")
        raise RuntimeError
    assert left_in(target) == ["old"] and left_in(tmp_path) == ["final"]
    with atomic.new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert left_in(target) == ["manifest.json", "new"] and left_in(tmp_path) == ["final"]


def test_new_folder_takes_an_empty_one_and_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic.new_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("1")
    assert left_in(tmp_path / "empty") == ["a", "manifest.json"]
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=str(target)), atomic.new_folder(target):
            pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """While one file is written over and over, every read finds one of the whole contents."""
    file, texts = tmp_path / "a.yaml", ["a" * 300_000, "b" * 300_000]
    atomic.write_text(file, texts[0])
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(file.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        atomic.write_text(file, texts[i % 2])
        time.sleep(0.001)
    stop.set()
    reader.join()
    assert seen <= set(texts)
    assert left_in(tmp_path) == ["a.yaml"]


# --- Manifests ---


def filled(folder: Path) -> Path:
    """A folder with two files and a manifest."""
    with atomic.new_folder(folder) as new:
        (new / "a.bin").write_bytes(bytes(range(256)) * 100)
        (new / "sub").mkdir()
        (new / "sub" / "b.txt").write_text("text")
    return folder


def test_the_manifest_has_sizes_and_digests_as_sha256sum_gives_them(tmp_path: Path) -> None:
    folder = filled(tmp_path / "final")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: facts["bytes"] for name, facts in files.items()} == {"a.bin": 25600, "sub/b.txt": 4}
    for name, facts in files.items():
        assert facts["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert atomic.damages(folder) == atomic.damages(folder, contents=True) == []


@pytest.mark.parametrize("length", [0, 1, 100, 25599, 25601])
def test_another_size_shows_without_reading(length: int, tmp_path: Path) -> None:
    folder = filled(tmp_path / "final")
    os.truncate(folder / "a.bin", length)
    assert atomic.damages(folder) == [f"a.bin has {length:,} bytes, not 25,600"]
    assert atomic.damages(folder, ["sub/b.txt", "unlisted"]) == []


@pytest.mark.parametrize("offset", [0, 12345, 25599])
def test_a_flipped_bit_shows_when_contents_are_compared(offset: int, tmp_path: Path) -> None:
    folder = filled(tmp_path / "final")
    with (folder / "a.bin").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    assert atomic.damages(folder) == []
    assert atomic.damages(folder, contents=True) == ["a.bin is not what was written (its sha256 differs)"]


def test_all_damages_are_listed(tmp_path: Path) -> None:
    folder = filled(tmp_path / "final")
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("a.bin")
    shutil.rmtree(folder / "sub")
    assert atomic.damages(folder) == ["a.bin is missing", "sub/b.txt is missing"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps({"files": {"a.bin": {"bytes": 25600, "sha256": "x"}}}),
        json.dumps({"litgpt_manifest": 99, "files": {}}),
        json.dumps({"litgpt_manifest": 1, "files": []}),
        json.dumps({"litgpt_manifest": 1, "files": {"a.bin": 25600}}),
        json.dumps({"litgpt_manifest": 1, "files": {"../../etc/passwd": {"bytes": 1, "sha256": "x"}}}),
        json.dumps({"litgpt_manifest": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": "x"}}}),
        "[" * 100_000,
    ],
)
def test_a_broken_or_foreign_manifest_is_none(text: str, tmp_path: Path) -> None:
    """No training checkpoint then; a base checkpoint is still read, as upstream's has none."""
    folder = filled(tmp_path / "final")
    (folder / "manifest.json").write_text(text)
    assert atomic.read_manifest(folder) is None and atomic.damages(folder) == ["manifest.json is missing or broken"]
    atomic.require_whole(folder, "a.bin")


def test_files_can_be_added(tmp_path: Path) -> None:
    folder = filled(tmp_path / "final")
    (folder / "c.txt").write_text("more")
    (folder / "a.bin").write_text("changed")
    atomic.write_manifest(folder, ["c.txt"])
    assert set(atomic.read_manifest(folder) or ()) == {"a.bin", "sub/b.txt", "c.txt"}
    assert atomic.damages(folder) == ["a.bin has 7 bytes, not 25,600"], "what was there is not blessed anew"


# --- Flushing, and what killed processes leave ---


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_everything_is_flushed_before_the_rename_and_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel is asked: each file and folder by fsync, then the rename, then the folder above."""
    calls: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", lambda path, to: (calls.append(("rename", Path(to).name)), rename(path, to))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (calls.append(("replace", Path(to).name)), replace(path, to))[1])
    with atomic.new_folder(tmp_path / "final") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_text("unflushed")
    first = next(place for place, (_, name) in enumerate(calls) if name.startswith(".manifest.json.litgpt-"))
    assert ("fsync", "a.bin") in calls[:first]
    assert calls[first + 1 :] == [
        ("replace", "manifest.json"),
        ("fsync", "sub"),
        ("fsync", folder.name),
        ("rename", "final"),
        ("fsync", tmp_path.name),
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from litgpt import atomic
with atomic.new_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "new").write_text("half")
    if sys.argv[2] == "between":
        rename = Path.rename
        def killed(path, target):
            rename(path, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = killed
    else:
        print("ready", flush=True)
        sys.stdin.read()
"""


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    mine, foreign = tmp_path / ".mine.tmp", tmp_path / ".final.litgpt-notes.tmp"
    mine.mkdir()
    foreign.write_text("a file")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "final"), "wait"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    (temporary,) = [path for path in tmp_path.glob(".final.litgpt-*.tmp") if path.is_dir()]
    atomic.remove_leftovers(tmp_path)
    assert (temporary / "new").exists(), "its process lives"
    process.kill()
    process.communicate()
    atomic.remove_leftovers(tmp_path)
    assert left_in(tmp_path) == [".final.litgpt-notes.tmp", ".mine.tmp"]


def test_a_folder_put_aside_comes_back_if_its_successor_never_came(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with atomic.new_folder(target) as folder:
        (folder / "old").write_text("old")
    command = [sys.executable, "-c", KILLED, str(target), "between"]
    assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == -9
    assert not target.exists() and len(list(tmp_path.iterdir())) == 2
    atomic.remove_leftovers(tmp_path)
    assert left_in(tmp_path) == ["final"] and (target / "old").read_text() == "old"
    assert atomic.damages(target, contents=True) == []


def test_a_new_folder_clears_what_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / ".final.litgpt-0000dead.tmp").mkdir()
    (tmp_path / ".other.litgpt-0000dead.tmp").mkdir()
    filled(tmp_path / "final")
    assert left_in(tmp_path) == ["final"]


def test_a_removed_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path / "step-000001")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed before anything in it is removed
        atomic.remove_folder(folder)
    assert not folder.exists()
    atomic.remove_leftovers(tmp_path)
    assert left_in(tmp_path) == []


# --- Locks ---

HOLDER = """
import sys
from pathlib import Path
from litgpt import atomic
with atomic.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "place"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        atomic.lock(folder)
    waiting = threading.Thread(target=lambda: os.close(atomic.lock(folder, wait=True)), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    process.kill()
    process.communicate()
    waiting.join(30)
    assert not waiting.is_alive()
    with atomic.locked(folder), pytest.raises(BlockingIOError):
        atomic.lock(folder)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks"):
        atomic.lock(tmp_path)
    with atomic.locked(tmp_path / "place"):
        assert (tmp_path / "place").is_dir()
    with atomic.new_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
    assert left_in(tmp_path) == ["final", "place"]


def test_a_full_disk_names_the_folder_that_was_to_be_made(tmp_path: Path) -> None:
    """Not the temporary one, nor nothing, where a library's write fails without a name; an error about another file keeps its name."""
    for inner in (OSError(28, "No space left on device"), "temporary"):
        with pytest.raises(OSError, match="No space left on device") as caught, atomic.new_folder(tmp_path / "final") as folder:
            raise inner if isinstance(inner, OSError) else OSError(28, "No space left on device", str(folder / "a"))
        assert caught.value.filename == str(tmp_path / "final")
    with pytest.raises(FileNotFoundError) as missing, atomic.new_folder(tmp_path / "final"):
        (tmp_path / "source").read_text()
    assert missing.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("manifest", [True, False])
def test_a_new_folder_takes_over_what_others_put_in_and_nothing_of_its_own(manifest: bool, tmp_path: Path) -> None:
    """Without a complete manifest nobody knows what others put in."""
    folder = tmp_path / "run"
    for content in ("old", "new"):
        with atomic.new_folder(folder, overwrite=True, manifest=manifest) as made:
            (made / "weights").write_text(content)
            if content == "new":
                (made / "late").write_text(content)
            if not manifest:
                atomic.write_manifest(made, ["weights"])
        if content == "old":
            (folder / "late").write_text("mine")
            (folder / "notes").mkdir()
            (folder / "notes" / "a.txt").write_text("mine")
    assert ((folder / "weights").read_text(), (folder / "late").read_text()) == ("new", "new")
    assert (folder / "notes" / "a.txt").exists() == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_name_that_the_locale_lacks_is_written_as_utf8(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a.json", "out/" + "ü".encode().decode("ascii", "surrogateescape"))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "out/ü"
