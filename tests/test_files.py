"""Foreign text, JSON and YAML: what is read, and one message for each problem."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from litgpt.errors import UserError
from litgpt.files import (
    MOST_VALUES,
    add_text,
    expand_path,
    open_regular,
    parse_yaml,
    read_json,
    read_own,
    read_text,
    read_yaml,
    require_place,
)

# six lines that stand for 10^6 values
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in ("ab", "bc", "cd", "de", "ef"))


def test_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("DATA", "/data")
    assert expand_path("~/x") == Path("/home/user/x") and expand_path(Path("$DATA/x")) == expand_path("${DATA}/x") == Path("/data/x")
    for name, said in (
        ("$UNSET_NAME/~x", r"\$UNSET_NAME is not an environment variable"),
        ("a/${UNSET}", "UNSET} is no"),
        ("~nobody.here/x", "~nobody.here is not a user"),
    ):
        with pytest.raises(UserError, match=said):
            expand_path(name)
    assert expand_path("a/~x/cost$-5") == Path("a/~x/cost$-5")
    monkeypatch.chdir(tmp_path)
    Path("$UNSET_NAME").mkdir()
    assert expand_path("$UNSET_NAME") == Path("$UNSET_NAME")  # a folder of the user's


@pytest.mark.parametrize("path", ["x" * 256, f"a/{'é' * 128}", "a\0b"])
def test_texts_that_no_file_system_takes_for_a_path(path: str) -> None:
    with pytest.raises(UserError, match="is not a path: (a name in it is too long|it has a NUL character)"):
        expand_path(path)
    assert expand_path(f"a/{'x' * 255}/b").parts[1] == "x" * 255


def test_a_result_takes_the_place_of_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name, kind in (
        ("pipe", "a pipe or a device"),
        ("/dev/null", "a pipe or a device"),
        ("link", "a link to nothing"),
        (".", "a folder"),
    ):
        with pytest.raises(UserError, match=f"cannot be written: it is {kind}. Name another place"):
            require_place(tmp_path / name)
    for name in ("file", "new", "folder/new"):
        require_place(tmp_path / name)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for flags in (os.O_RDONLY, os.O_WRONLY | os.O_APPEND):
        with pytest.raises(OSError, match=r"pipe or a device, not a file"):
            open_regular(tmp_path / "pipe", flags)
    with pytest.raises(OSError, match=r"it is a link"):
        open_regular(tmp_path / "link", os.O_WRONLY | os.O_CREAT)
    assert not (tmp_path / "file").exists()


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfn\xc3\xa9e")
    assert read_text(tmp_path / "a") == "née"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\n\xff", "line 2: not UTF-8 text (byte 0xff)"),
        (b"x" * 11, "has 11 bytes, more than the 10"),
    ],
)
def test_unreadable_text(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(tmp_path / "a", most=10)
    assert str(tmp_path / "a") in str(caught.value) and message in str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "pipe", "is a pipe"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=message):
            read_text(path)
    with pytest.raises(UserError, match="is missing: make it"):
        read_text(tmp_path / "none", "is missing: make it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds no JSON object"),
        ('{"a": 1,\n "b"}', "line 2, column 5: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
    ],
)
def test_broken_json(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_yaml_values(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 2e-3\nx: &x {a: [1, null]}\ny: {<<: *x, b: no}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": 2e-3, "x": {"a": [1, None]}, "y": {"a": [1, None], "b": False}}
    assert parse_yaml("", "f") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f, line 3: not valid YAML: the key 'a' twice"),
        ("a: [1", "f, line 1: not valid YAML"),
        ("a: 1\n---\nb: 2", "f, line 2: not valid YAML: only one document is read"),
        ("a: !!int x", "'x' is an invalid int"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("[" * 1000, "nested too deeply"),
        ("a: &a [*a]", f"more than {MOST_VALUES:,} values"),
        (BOMB, "aliases"),
    ],
)
def test_broken_yaml(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f")
    assert message in str(caught.value)


def test_a_folders_own_files(tmp_path: Path) -> None:
    """Regular files, links within the folder, and the blobs of the hub's cache; nothing else that a link may lead to."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (snapshot, blobs, tmp_path / "x"):
        folder.mkdir(parents=True)
    (blobs / "1").write_bytes(b"blob")
    (tmp_path / "x" / "key").write_bytes(b"secret")
    (snapshot / "file").write_bytes(b"file")
    for name, target in {"link": "file", "blob": "../../blobs/1", "out": "../../x/key", "both": "out", "up": "../../blobs/2"}.items():
        (snapshot / name).symlink_to(target)
    (blobs / "2").symlink_to("../x/key")
    assert [read_own(snapshot, name) for name in ("file", "link", "blob", "none")] == [b"file", b"file", b"blob", None]
    for name in ("out", "both", "up"):
        with pytest.raises(UserError, match=f"{name} is a link to .*x/key, outside its folder"):
            read_own(snapshot, name)
    (snapshot / "dangling").symlink_to("nothing")
    os.mkfifo(snapshot / "fifo")
    for name, message in (("dangling", "does not exist"), ("fifo", "a pipe or a device"), (".", "a folder")):
        with pytest.raises(UserError, match=message):
            read_own(snapshot, name)
    plain = tmp_path / "a" / "b"
    plain.mkdir(parents=True)
    (plain / "blob").symlink_to("../../blobs/1")
    with pytest.raises(UserError, match="outside its folder"):
        read_own(plain, "blob")


def test_lines_that_cannot_be_added_whole_leave_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    add_text(file, "one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            add_text(file, 1000 * "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "one\n"
