"""Where a package opens or parses files by itself, past `launch/untrusted_files.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_READERS = {"read_text", "read_bytes", "safe_open", "safe_load", "fdopen"}
_OF_MODULES = {
    ("json", "load"),
    ("json", "loads"),
    ("yaml", "load"),
    ("os", "open"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("torch", "load"),
    ("np", "load"),
    ("np", "fromfile"),
    ("Image", "open"),
    ("pq", "read_table"),
    ("pq", "ParquetFile"),
    ("zipfile", "ZipFile"),
}


def openings(package: str) -> set[str]:
    """`file.py:function` of every place in a package that reads a file, or parses a text, without the gate."""
    return {
        f"{file.relative_to(package)}:{function}"
        for file in sorted(Path(package).rglob("*.py"))
        if "share" not in file.parts and file.name != "untrusted_files.py"
        for function in _of(ast.parse(file.read_text(encoding="utf-8")), "<module>")
    }


def _of(node: ast.AST, function: str) -> Iterator[str]:
    for inner in ast.iter_child_nodes(node):
        name = inner.name if isinstance(inner, ast.FunctionDef) else function
        if isinstance(inner, ast.Call) and _reads(inner):
            yield function
        yield from _of(inner, name)


def _reads(call: ast.Call) -> bool:
    called = call.func
    if isinstance(called, ast.Name):  # `read_text(path)` is the gate's
        return called.id in ("safe_open", "safe_load", "fdopen") or (
            called.id == "open" and not _writes(call, 1)
        )
    if not isinstance(called, ast.Attribute):
        return False
    owner = called.value.id if isinstance(called.value, ast.Name) else ""
    if called.attr in _READERS or (owner, called.attr) in _OF_MODULES:
        return True
    return called.attr == "open" and not owner[:1].isupper() and not _writes(call, 0)


def _writes(call: ast.Call, place: int) -> bool:
    """The mode is a word without `r` and `+`."""
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[place : place + 1]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"
    return isinstance(mode, str) and not {"r", "+"} & {*mode}
