"""Reading of text, JSON and YAML files from any source, within bounds. A problem is one UserError.

Only regular files are read (a pipe may never end). Sizes, depth and YAML aliases are bounded: ten lines of YAML can stand for 10^12 values.
"""

import errno
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.text import as_utf8

MOST_BYTES = 2**26  # of a JSON or text file
MOST_YAML = 2**18  # bytes of a YAML file, whose parser is slow
MOST_NAME = 255  # bytes of a file's name, on all common file systems
MOST_VALUES = 100_000  # in a YAML file, aliases expanded
FETCH_SECONDS = 60
MISSING = "does not exist: check the path"


def nearest(path: Path) -> Path:
    """Return the path, or the nearest of its parents that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def is_inside(name: str) -> bool:
    """Return True if a file of this name in a folder is below it."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def require_place(file: Path) -> None:
    """Raise UserError if no file can be written to this place. Call it before hours of work."""
    folder, kind = nearest(file.parent), other_kind(file)
    if kind or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = f"it is {kind}" if kind else f"{folder} is a file" if folder.is_file() else f"you may not write to {folder}"
        raise UserError(f"{file} cannot be written: {reason}. Name another place")


def expand_path(path: str | Path) -> Path:
    """Return a path that a user wrote, with `~` and `$VARIABLES` expanded. Raises UserError if one does not exist.

    An empty text is not a path: it would mean the current folder.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"{path!r} is not a path: a text or a Path is needed")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "\0" in expanded:
        raise UserError(f"{expanded[:60]!r}... is not a path: it has a NUL character")
    if any(len(os.fsencode(part)) > MOST_NAME for part in expanded.split("/")):
        raise UserError(f"{expanded[:60]!r}... is not a path: a name in it is too long, more than {MOST_NAME} bytes")
    unknown = re.match(r"~[^/]*", expanded) or re.search(r"\$([A-Za-z_]\w*|\{\w+\})", expanded)
    if unknown and not os.path.lexists(expanded):
        kind = "a user" if unknown[0].startswith("~") else "an environment variable"
        raise UserError(f"{path}: {unknown[0]} is not {kind}: write the path out")
    return Path(expanded)


def require_utf8(path: Path, users: str) -> None:
    """Raise UserError for a path that is not UTF-8 or that the system passed in another encoding. `users`: what needs it."""
    if as_utf8(str(path)) != str(path):
        raise UserError(f"{path}: its name is not UTF-8, which {users} need: rename it, or set PYTHONUTF8=1 if the locale is to blame")


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file. Raises OSError at once for anything else, and for a link if the file is to be written."""
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    kind = "a link, a pipe or a device"
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    raise OSError(errno.EINVAL, f"it is {kind}, not a file: put a file there", str(path))


def add_text(path: Path, text: str) -> None:
    """Add lines to a regular file, which is made if needed. If they cannot be written whole, OSError is raised and it stays as it was."""
    descriptor = open_regular(path.resolve(), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    size = os.fstat(descriptor).st_size
    content = as_utf8(text).encode()
    try:
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = b"\n" + content
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    finally:
        os.close(descriptor)


def read_text(path: str | Path, missing: str = MISSING, most: int | None = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file without its byte order mark. `missing` follows the path in the message if there is no such file."""
    return decode_text(read_bytes(path, missing, most), path)


def read_bytes(path: str | Path, missing: str = MISSING, most: int | None = MOST_BYTES, count: int = -1) -> bytes:
    """Return the content of a regular file, or its first `count` bytes."""
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise UserError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have: check what it holds")
            return file.read(size if size and count < 0 else count) or b""  # of a file in /proc, which has no size, what is there now
    except FileNotFoundError:
        raise UserError(f"{path} {missing}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def require_file(path: str | Path, missing: str = MISSING) -> None:
    """Raise UserError as `read_bytes` does, without reading the file."""
    read_bytes(path, missing, most=None, count=0)


def other_kind(path: Path) -> str:
    """Return the kind of a path that is not a file, such as "a folder"; empty for a file, and if nothing is there."""
    if path.is_file() or not os.path.lexists(path):
        return ""
    return "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "a link to nothing"


def kind_note(path: Path) -> str:
    """Return a note on what has the name of a missing file, to follow the name in a message."""
    kind = other_kind(path)
    return f" ({kind} has this name)" if kind else ""


def read_own(folder: str | Path, name: str) -> bytes | None:
    """Return the content of a regular file that belongs to a checkpoint folder, None if it has no such file.

    Raises UserError as `require_own` does.
    """
    path = Path(folder) / name
    if not os.path.lexists(path):
        return None
    require_own(path, Path(folder))
    return read_bytes(path)


def require_own(path: Path, folder: Path) -> None:
    """Raise UserError for a link out of the folder, which may point to a secret, unless the folder is a snapshot in the hub's cache."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"):
        raise UserError(f"{path} is a link to {target}, outside its folder: put a copy of the file there, if it is the model's")


def is_url(name: str) -> bool:
    """Return True for an http or https address."""
    return name.startswith(("https://", "http://"))


def fetch(url: str, most: int, seconds: float = FETCH_SECONDS) -> bytes:
    """Fetch a URL: at most `most` bytes, within `seconds`. Raises UserError."""
    import http.client
    import urllib.error
    import urllib.request

    if "@" in url.split("/")[2]:
        raise UserError("an address with a user name or password is not fetched: download the file, and name it")
    content, end = bytearray(), time.monotonic() + seconds
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer:
            while block := answer.read1(2**16):
                content += block
                if len(content) > most:
                    raise ValueError(f"it has more than {most:,} bytes")
                if time.monotonic() > end:
                    raise ValueError("it takes too long")
            if len(content) != int(answer.headers.get("Content-Length") or len(content)):
                raise ValueError("the connection ended too early")
            return bytes(content)
    except urllib.error.HTTPError as error:
        reason = f"HTTP status {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))[:200] or type(error).__name__
    raise UserError(f"{url} cannot be fetched ({reason}): check the address, or download the file and name it")


def decode_text(raw: bytes, path: str | Path) -> str:
    """Return the content of a UTF-8 file as text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte {raw[error.start]:#04x}): save the file as UTF-8") from None


def read_json(path: str | Path, missing: str = MISSING) -> dict[str, Any]:
    """Return the content of a file that holds one JSON object."""
    return parse_object(read_text(path, missing), path)


def json_in(path: str | Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; {} if there is no such file, or it holds something else."""
    with suppress(UserError):
        return read_json(path)
    return {}


def json_if_there(path: str | Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; {} if nothing has its name."""
    return read_json(path) if os.path.lexists(path) else {}


def parse_object(text: str, path: str | Path) -> dict[str, Any]:
    """Parse a file's text as a JSON object."""
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: it is not the file that its name says, copy it again")
    return content


def parse_json(text: str, where: str, line: int | None = None, hint: str = "", unique: bool = False) -> Any:
    """Parse JSON. In messages `where` is the file, `line` the text's line in it if it is not the first; `hint` follows the reason.

    `unique`: an object that has a key twice is an error.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            values = " and ".join(repr(value)[:40] for key, value in pairs if key == repeated)
            place = "" if line is None else f", line {line}"
            raise UserError(f"{where}{place}: an object has the key {repr(repeated)[:60]} twice ({values}): leave one of them out")
        return content

    try:
        return json.loads(text, object_pairs_hook=once if unique else None)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {line or error.lineno}, column {error.colno}: not valid JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"{where}, line {line or 1}: not usable JSON: nested too deeply") from None
    except ValueError:
        raise UserError(f"{where}, line {line or 1}: not usable JSON: it holds a number of thousands of digits") from None


def read_yaml(path: str | Path, missing: str = MISSING) -> Any:
    """Return the content of a YAML file as plain values."""
    return parse_yaml(read_text(path, missing, MOST_YAML), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document of plain values, in which no mapping repeats a key. `where` is its name in messages."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _count(root, {}) > MOST_VALUES:
            raise UserError(f"{where}: its aliases (*name) stand for more than {MOST_VALUES:,} values: write out what is needed")
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        problem = "only one document is read, but a second begins here" if problem == "but found another document" else problem
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{place}: not valid YAML: {problem or ' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: not usable YAML: nested too deeply") from None


def dump_yaml(content: Any, **style: Any) -> str:
    """Return plain values as YAML, mappings in their order unless `style`, as of `yaml.dump`, says otherwise."""
    return str(yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **{"sort_keys": False, **style}))


class _Loader(yaml.SafeLoader):
    """A loader that reads 2e-3 as a number, as YAML 1.2 does, and refuses repeated keys."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # from the parsers of dates, numbers and so on
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"{str(node.value)[:60]!r} is an invalid {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice, leave one out", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _count(node: yaml.Node, known: dict[int, float]) -> float:
    """Return the number of values below a YAML node; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        entries = node.value if isinstance(node.value, list) else []
        parts = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]
