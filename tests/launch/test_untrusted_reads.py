"""Nothing in the trainer reads a file past `launch.untrusted_files`, and no library is let run what a file brings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

READERS = {
    "open", "read_text", "read_bytes", "load_file", "safe_open", "deserialize", "read_table", "ParquetFile",
    "torch.load", "json.load", "pickle.load", "pickle.loads", "yaml.load", "yaml.safe_load", "np.load", "os.open",
    "Image.open", "zipfile.ZipFile",
}  # fmt: skip
"""Calls that read a file by its name; methods by their last name alone."""
BY_NAME = {name for name in READERS if "." not in name}

ALLOWED = {
    # Adds lines of our own, and follows no link.
    ("trainer/attempt_log.py", "open", "os.open"),
    ("trainer/attempt_log.py", "open_attempt_log", "LOG.open"),
    # The gate has looked at the file before.
    ("trainer/formats/validated.py", "read_tensors", "load_file"),
    ("trainer/formats/torch_files.py", "load_torch", "torch.load"),
    ("trainer/formats/torch_files.py", "refuse_expanding", "zipfile.ZipFile"),
    ("trainer/model/layers.py", "_files_of_layers", "safe_open"),
    ("trainer/model/layers.py", "_fill", "safe_open"),
    # The system's own files, in folders that nobody else writes.
    ("trainer/vision_cache/place.py", "_memory_bytes", "read_text"),
    # A file of the user's own, opened to be locked and written.
    ("trainer/vision_cache/store.py", "_locked", "os.open"),
    # What this process has just written.
    ("trainer/data/index_writer.py", "publish_index", "read_bytes"),
    # What a data worker of this process sent through its own pipe.
    ("trainer/data/worker_transport.py", "unpickle", "pickle.loads"),
    # What `samestep prepare` made of the embedded charts in its own cache.
    ("trainer/embedded/pretrain_data.py", "read_lessons", "read_table"),
    ("trainer/embedded/questions.py", "question_kinds", "read_text"),
}


def calls(source: str) -> Iterator[tuple[str, str, ast.Call]]:
    """(function around it, name, call) of every call."""

    def walk(node: ast.AST, around: str) -> Iterator[tuple[str, str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else around
            if isinstance(child, ast.Call):
                yield inside, ast.unparse(child.func), child
            yield from walk(child, inside)

    yield from walk(ast.parse(source), "")


def reads(name: str, call: ast.Call) -> bool:
    last = name.rpartition(".")[2]
    if name in ("read_text", "read_bytes"):  # the gate's own, not a path's
        return False
    if name not in READERS and last not in BY_NAME:
        return False
    if last == "open":
        mode = next((word.value for word in call.keywords if word.arg == "mode"), None)
        modes = [*call.args[:2], *([mode] if mode else [])]
        words = [
            each.value for each in modes if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        if any(set(word) <= set("rwaxb+") and set(word) & set("wax+") for word in words):
            return False
    return not (call.args and ast.unparse(call.args[0]).startswith("io.BytesIO("))


def files() -> list[Path]:
    return sorted(Path("trainer").rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(p):\n    return p.read_text()", [("f", "p.read_text")]),
        ("open(p)", [("", "open")]),
        ("def f(p):\n    with p.open('rb') as g:\n        pass", [("f", "p.open")]),
        ("p.open('w')\nopen(p, 'ab')\np.open(mode='x')", []),
        ("torch.load(p)\nplanner.load(p)", [("", "torch.load")]),
        ("Image.open(io.BytesIO(b))\nImage.open(p)", [("", "Image.open")]),
    ],
)
def test_the_search_finds_what_reads(source: str, found: list[tuple[str, str]]) -> None:
    assert [(around, name) for around, name, call in calls(source) if reads(name, call)] == found


def test_nothing_in_the_trainer_reads_a_file_past_the_gate() -> None:
    found = [
        (str(file), around, name, call.lineno)
        for file in files()
        for around, name, call in calls(file.read_text())
        if reads(name, call)
    ]
    assert len(files()) > 60
    past = [
        f"{file}:{line}: {name} in {around}"
        for file, around, name, line in found
        if not {(file, around, name), (file, around, name.rpartition(".")[2])} & ALLOWED
    ]
    assert not past, "\n".join(["read through launch.untrusted_files:", *past])
    seen = {(file, around, one) for file, around, name, _ in found for one in (name, name.rpartition(".")[2])}
    assert not ALLOWED - seen, "no longer there"


def test_every_loading_of_a_model_refuses_code_of_its_folder() -> None:
    loads = [
        (f"{file}:{call.lineno}", {word.arg: ast.unparse(word.value) for word in call.keywords})
        for file in files()
        for _, name, call in calls(file.read_text())
        if name.endswith(".from_pretrained") and not name.startswith("PeftModel")  # which has no code to load
    ]
    assert len(loads) >= 5
    assert not [where for where, given in loads if given.get("trust_remote_code") != "False"]


def test_no_child_of_the_launcher_can_read_the_terminal() -> None:
    starts = [
        (f"{file}:{call.lineno}", {word.arg: ast.unparse(word.value) for word in call.keywords})
        for file in sorted(Path("launch").rglob("*.py"))
        for _, name, call in calls(file.read_text())
        if name in ("subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.call")
    ]
    assert len(starts) >= 4
    assert not [where for where, given in starts if given.get("stdin") != "subprocess.DEVNULL"]
