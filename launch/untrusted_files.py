"""The gate for files that somebody else wrote (a user, another program, another run): all of them are read through it.

Nothing blocks (a pipe in the place of a marker), nothing is read without a bound, nothing parses for ever, and
whatever is wrong is one line that names the file. What the disk itself says (no such file, no permission, a stale
handle) stays an OSError: it may be gone at the next look.

YAML is read by PyYAML's safe loader with bounds of our own: neither it nor `ruamel.yaml` (0.18) bounds the nodes and
the depth of a document, and aliases that multiply would fill the memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from launch.errors import ConfigError

LINE, DOCUMENT, TABLE = 2**16, 2**22, 2**28
"""Bounds in bytes: for a marker or a name; for what a person wrote; for lines or entries that a program wrote."""
DEPTH = 64  # of mappings and lists inside each other
_NODES = 50_000  # values of a YAML text, each alias counted as all that it stands for
_INTEGER_BITS = 256  # transformers writes a tokenizer's missing limit as 10**30
_LEASE_S = 45.0  # that the holder of a lease gets, /proc/sys/fs/lease-break-time


class UntrustedFileError(ConfigError, ValueError):
    """A file that cannot be what it is taken for. `reason`: what is wrong with it, without its name."""

    def __init__(self, path: str | Path, reason: str = "", advice: str = "correct it, or remove it") -> None:
        self.reason = reason
        super().__init__(f"{printable(str(path))}: {reason}; {advice}")


UNREADABLE = (OSError, UntrustedFileError)
"""All that reading a file through this module may raise."""


# opening and reading ----------------------------------------------------------------------------


def open_plain(
    path: str | Path, limit: int | None = None, *, follow_symlinks: bool = True, buffering: int = -1
) -> BinaryIO:
    """Open a plain file for reading, of at most `limit` bytes. Never waits: neither for a pipe nor for a device.

    Raises:
        UntrustedFileError: it is no plain file, or larger.
        OSError: it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = open_at_once(name, flags | os.O_NOCTTY | (0 if follow_symlinks else os.O_NOFOLLOW))
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise UntrustedFileError(path, "is no plain file (a device or socket)") from None
            if error.errno == errno.ELOOP and not follow_symlinks:
                raise UntrustedFileError(path, "is no plain file (a link)") from None
            raise
        try:
            _refuse(path, os.fstat(descriptor), limit)
        except UntrustedFileError:
            os.close(descriptor)
            raise
        return descriptor

    return open(path, "rb", buffering, opener=opener)


def open_at_once(name: str | Path, flags: int, mode: int = 0o666) -> int:
    """As `os.open`, not waiting for whoever may write into a pipe. Whoever holds a lease on the file (the server of a
    shared disk, for its clients) has been told to give it back, and is waited for."""
    deadline = time.monotonic() + _LEASE_S
    while True:
        try:
            return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def plain_size(path: str | Path) -> int:
    """Bytes of a plain file, looked at before a library opens it by its name. Raises as `open_plain`."""
    status = Path(path).stat()
    _refuse(path, status, None)
    return status.st_size


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The whole of a plain file of at most `limit` bytes. Raises as `open_plain`."""
    with open_plain(path, limit) as file:
        # Python takes memory for all that it is told to read, whatever the file holds.
        size = min(os.fstat(file.fileno()).st_size, limit) + 1
        content = file.read(size)
        if len(content) == size:
            content += file.read(limit + 1 - size)
    if len(content) > limit:  # it grows, or is one whose size the kernel does not know
        raise UntrustedFileError(path, f"is too large (at most {limit:,} bytes are read)")
    return content


def read_tail(path: str | Path, size: int) -> bytes:
    """The last `size` bytes of a plain file. Raises as `open_plain`."""
    with open_plain(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size)


def read_text(path: str | Path, limit: int = DOCUMENT) -> str:
    """UTF-8 text. Raises as `open_plain`, and UntrustedFileError for other bytes."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise UntrustedFileError(path, f"is no UTF-8 text ({error.reason} at byte {error.start:,})") from None


def read_json(path: str | Path, limit: int = DOCUMENT) -> Any:
    """As `parse_json`, of a file. Raises as `read_text`, and UntrustedFileError for what is no such text."""
    text = read_text(path, limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UntrustedFileError(path, f"is not valid JSON ({error})") from None


def read_mapping(path: str | Path, limit: int = DOCUMENT) -> dict[str, Any]:
    """As `read_json`, of a file that holds a mapping."""
    values = read_json(path, limit)
    if not isinstance(values, dict):
        raise UntrustedFileError(path, f"is no mapping ({type(values).__name__})")
    return values


def read_yaml(path: str | Path, limit: int = DOCUMENT // 16) -> Any:
    """As `parse_yaml`, of a file. Raises as `read_text`, and UntrustedFileError for what is no such text."""
    text = read_text(path, limit)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UntrustedFileError(path, f"is not valid YAML ({error})") from None


def _refuse(path: str | Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise UntrustedFileError(path, f"is no plain file ({kind})")
    if limit is not None and status.st_size > limit:
        raise UntrustedFileError(path, f"is too large ({status.st_size:,} bytes, at most {limit:,} are read)")


# parsing ----------------------------------------------------------------------------------------


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """JSON of at most `DEPTH` levels and integers of at most 256 bits. ValueError says in a line what is wrong.

    `unique_keys`: a key that stands twice in an object is wrong, too; else the last one counts.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno:,}, column {error.colno:,}: {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError("no UTF-8 text") from None
    except _TwiceError:
        raise
    except ValueError:  # sys.int_info.default_max_str_digits
        raise ValueError(_ENDLESS) from None
    _judge(value)
    return value


class _TwiceError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(f"the key {next(key for key in keys if keys.count(key) > 1)!a} stands twice")
    return values


def parse_yaml(text: str) -> Any:
    """YAML of a bounded size, without equal keys in a mapping. ValueError says in a line what is wrong.

    Anchors may be used, but not to stand for themselves, nor for more than the text could spell out. Dates are text.
    """
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1:,}, column {mark.column + 1:,}: " if mark else ""
        raise ValueError(printable(f"{place}{error.problem or error.context}")) from None
    except yaml.YAMLError as error:
        raise ValueError(printable(" ".join(str(error).split()))) from None
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
    ) as error:  # `!!int a`, 5,000 digits
        problem = (
            _ENDLESS if "set_int_max_str_digits" in str(error) else f"a value is not of its type: {error}"
        )
        raise ValueError(printable(problem)) from None
    _judge(value)
    return value


_ENDLESS = "an integer of more than 4,300 digits"
_TOO_DEEP = f"nested too deeply (at most {DEPTH} levels)"


def _judge(value: object) -> None:
    """ValueError for what would break its reader later: a depth that ends in a RecursionError, an endless integer."""
    level = [value]
    for _ in range(DEPTH + 1):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list | tuple | set):
                inner += one
            elif isinstance(one, int) and one.bit_length() > _INTEGER_BITS:
                raise ValueError(
                    f"an integer is too large ({one.bit_length():,} bits, at most {_INTEGER_BITS})"
                )
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word, and bounds neither depth nor what aliases stand for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._weights: dict[str, int] = {}  # anchor -> nodes that it stands for, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        is_alias, anchor = isinstance(event, yaml.AliasEvent), getattr(event, "anchor", None)
        if is_alias and anchor in self.anchors and anchor not in self._weights:
            raise _refused(f"the alias *{anchor} is inside of what it stands for", event.start_mark)
        if is_alias:
            self._nodes += self._weights.get(str(anchor), 0)
        before, self._nodes, self._depth = self._nodes, self._nodes + 1, self._depth + 1
        if self._nodes > _NODES:
            raise _refused(f"more than {_NODES:,} values, aliases counted", event.start_mark)
        if self._depth > DEPTH + 1:
            raise _refused(_TOO_DEEP, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _refuse_misread(node)
        if anchor is not None and not is_alias:
            self._weights[anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Keys are judged as they are written: constructing merges others into them (`<<: *defaults`)."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key is not a word", key.start_mark)
            if key.value in seen:
                raise _refused(f"key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return node


# No key of ours takes a date: `name: 2026-11-28` is a name, and 2026-99-99 no error of Python's.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _refuse_misread(node: yaml.ScalarNode) -> None:
    """Refuse numbers that YAML 1.1 reads as others than they look (`010` is 8, `1:30` is 90), and half characters,
    which no file takes."""
    if node.tag.endswith((":int", ":float")) and re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", node.value):
        raise _refused(f"{node.value} is another number in YAML (octal, or base 60)", node.start_mark)
    if any("\ud800" <= char <= "\udfff" for char in node.value):
        raise _refused("half a character", node.start_mark)


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


# names and words --------------------------------------------------------------------------------


def path_inside(folder: str | Path, name: str | Path) -> Path:
    """Where a name that a file gives lies, links resolved, if that is in `folder`. UntrustedFileError if not."""
    try:
        root = os.path.realpath(folder)
        place = Path(os.path.realpath(Path(root, name)))
    except ValueError:  # a NUL
        raise UntrustedFileError(
            folder, f"names a file that cannot be ({printable(str(name))[:200]})"
        ) from None
    if not place.is_relative_to(root):
        raise UntrustedFileError(folder, f"names a file outside of it ({printable(str(name))[:200]})")
    return place


def printable(text: str) -> str:
    """One line that every terminal takes: line breaks, escape sequences, marks that turn the order of letters and
    bytes of no encoding are shown as `\\x1b`."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """As `printable`, of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def reason_of(error: Exception) -> str:
    """An error's words without the path, which is said already."""
    if isinstance(error, UntrustedFileError):
        return error.reason
    return printable(getattr(error, "strerror", None) or str(error))
