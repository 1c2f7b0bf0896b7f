"""The gate for files that somebody else wrote: nothing blocks, nothing is unbounded, everything wrong is one line."""

import fcntl
import os
import re
import signal
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError
from launch.untrusted_files import (
    UntrustedFileError,
    open_plain,
    parse_json,
    parse_yaml,
    path_inside,
    plain_size,
    printable,
    printable_lines,
    read_bytes,
    read_json,
    read_mapping,
    read_tail,
    read_text,
    read_yaml,
    reason_of,
)
from tests.helpers.untrusted import openings

PAST_THE_GATE = {
    "atomic_files.py:sync": "brings to the disk, and reads nothing",
    "checkpoints/adapter_file.py:damaged_file": "safetensors opens by name; plain_size looks first",
    "inputs/caches.py:embedded_version": "files of the installed package",
    "console.py:write_to_nowhere": "/dev/null",
    "inputs/data_report.py:_label_notes": "pyarrow opens by name; plain_size looks first",
    "doctor/node.py:_write": "writes a file of its own, and removes it",
    "doctor/on_slurm.py:look_at_nodes": "files of the installed package",
    "doctor/probe.py:_measure": "what its own processes have printed",
    "hardware.py:_uuid_in": "a file of the kernel's",
    "inputs/dataset_index.py:_read_split": "reads the bytes that came through the gate",
    "inputs/text_tables.py:_keys": "keys of lines that came through the gate; `raw` judges what is in them",
    "inputs/new_recipe.py:_look_at": "pyarrow opens by name; plain_size looks first",
    "launcher_variables.py:_is_inherited": "a file of the kernel's",
    "local/read_ahead.py:_read": "reads weights and looks at none; is_file looks first",
    "slurm/attempts.py:_open_to_add": "adds a line of our own, and follows no link",
    "run/merged_model.py:weights_are_whole": "safetensors opens by name; plain_size looks first",
    "checkpoints/publish.py:_bring_to_disk": "what this process or its ranks just wrote",
    "checkpoints/publish.py:publish": "parses what it has just dumped",
    "report/write.py:_source": "files of the installed package",
    "export/loadable.py:_tensor_names": "safetensors opens by name; plain_size looks first",
    "cli/tables.py:plan_json": "parses what it has just dumped",
    "run/local_log.py:add_to_log": "adds a line of our own, and follows no link",
    "slurm/submit.py:plan_submission": "files of the installed package",
}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _socket, _device, Path.mkdir])
@pytest.mark.parametrize("read", [read_text, read_tail, open_plain, plain_size, read_json, read_yaml])
def test_what_is_no_plain_file_is_one_line_at_once(
    make: Callable[[Path], Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "marker"
    make(path)
    with pytest.raises(UntrustedFileError, match="marker: is no plain file") as caught:
        read(path, 10) if read is read_tail else read(path)
    assert isinstance(caught.value, ConfigError)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.reason == reason_of(caught.value)


def test_a_file_above_its_bound_is_not_read(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        UntrustedFileError, match="too large \\(1,099,511,627,776 bytes, at most 100 are read\\)"
    ):
        read_bytes(sparse, 100)
    with pytest.raises(UntrustedFileError, match="too large"):
        read_bytes("/proc/self/environ", 3)  # whose size is 0
    assert read_tail(sparse, 5) == b"\0" * 5
    assert plain_size(sparse) == 2**40
    (tmp_path / "whole").write_bytes(b"12345")
    assert read_bytes(tmp_path / "whole", 5) == b"12345"
    assert read_bytes("/proc/self/environ", 2**20) == Path("/proc/self/environ").read_bytes()


def test_a_small_file_takes_no_memory_for_its_bound(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"12345")
    tracemalloc.start()
    read_bytes(tmp_path / "small", 2**30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_link_is_followed_unless_it_may_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("ab")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "ab"
    with pytest.raises(UntrustedFileError, match="link: is no plain file \\(a link\\)"):
        open_plain(tmp_path / "link", follow_symlinks=False)


def test_what_the_disk_says_stays_an_oserror(tmp_path: Path) -> None:
    for read in (read_text, plain_size, open_plain, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    _pipe(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(UntrustedFileError):
            open_plain(tmp_path / "pipe")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "marker").write_bytes(b"ab\xff")
    with pytest.raises(UntrustedFileError, match="is no UTF-8 text \\(invalid start byte at byte 2\\)"):
        read_text(tmp_path / "marker")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested too deeply"),
        ("1" * 5000, "an integer of more than 4,300 digits"),
        ("9" * 100, "an integer is too large (333 bits, at most 256)"),
        ("{", "line 1, column 2"),
        ("", "line 1, column 1"),
    ],
)
def test_json_that_would_break_its_reader_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_json(text)
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(UntrustedFileError, match=r"file\.json: is not valid JSON") as error:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(error.value)


def test_json_that_others_write_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '{"model_max_length": 1000000000000000019884624838656, "a": [1.5, null]}'
    )
    assert read_mapping(tmp_path / "a.json") == {
        "model_max_length": 1000000000000000019884624838656,
        "a": [1.5, None],
    }
    assert parse_json("[" * 64 + "]" * 64)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UntrustedFileError, match=r"a\.json: is no mapping \(list\)"):
        read_mapping(tmp_path / "a.json")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 50,000 values, aliases counted"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "[" * 200_000, "nested too deeply"),
        ("a: " + "{a: " * 3000, "nested too deeply"),
        ("\n".join("  " * n + "a:" for n in range(300)), "nested too deeply"),
        ("- " * 3000, "nested too deeply"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 90)), "nested too deeply"),
        ("a: &a [*a]", "line 1, column 8: the alias *a is inside of what it stands for"),
        ("a: &a {b: [*a]}", "the alias *a is inside of what it stands for"),
        ("a: *b", "undefined alias"),
        ("a: 1" + "0" * 5000, "an integer of more than 4,300 digits"),
        ("a: 0x" + "f" * 5000, "an integer is too large (20,000 bits, at most 256)"),
        ("a: 1\na: 2", "line 2, column 1: key 'a' appears twice"),
        ("a: {b: 1, b: 2}", "key 'b' appears twice"),
        ("? [a]\n: 1", "a key is not a word"),
        ("a: [", "line 1, column 5"),
        ("a: !!bool maybe", "a value is not of its type"),
        ("a: !!timestamp x", "a value is not of its type"),
        ("a: !!int ''", "a value is not of its type"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: \x1b[2J", "special characters are not allowed"),
    ],
)
def test_yaml_that_would_hang_or_break_its_reader_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse_yaml(text)
    assert printable(str(caught.value)) == str(caught.value)
    assert time.monotonic() - began < 5
    if len(text) < 100_000:
        (tmp_path / "site.yaml").write_text(text)
        with pytest.raises(UntrustedFileError, match=r"site\.yaml: is not valid YAML"):
            read_yaml(tmp_path / "site.yaml")


def test_yaml_that_people_write_is_read() -> None:
    assert parse_yaml("") is None
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: [*x, *x]") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": [{"b": 1}] * 2,
    }
    assert parse_yaml("name: 2026-11-28\nother: 2026-99-99") == {"name": "2026-11-28", "other": "2026-99-99"}
    assert parse_yaml("a: 2e-4\nb: 1.5e-3\nc: yes\nd: ~\ne: [1, 2]\nf: 'x'") == {
        **{"a": "2e-4", "b": 1.5e-3, "c": True, "d": None, "e": [1, 2], "f": "x"}
    }
    assert parse_yaml("[" * 64 + "]" * 64)
    merged = "x: &x {a: 1, b: 2}\ny:\n  z: &z {<<: *x, a: 3}\nw: {<<: *z, b: 4}"  # w is made before z
    assert parse_yaml(merged)["w"] == {"a": 3, "b": 4}


def test_a_file_that_another_program_holds_a_lease_on_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("a: 1")
    descriptor = os.open(file, os.O_RDWR)
    before = signal.signal(signal.SIGIO, lambda *_: fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK))
    try:  # as the server of a shared disk does for its clients
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert read_yaml(file) == {"a": 1}
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def test_a_path_that_a_file_gives_stays_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    (run / "out").symlink_to("/etc")
    assert path_inside(run, "logs/1.out") == run / "logs" / "1.out"
    assert path_inside(tmp_path / "link", str(run / "logs")) == run / "logs"
    assert path_inside(run, "logs/../x") == run / "x"
    for name in ("/etc/shadow", "../run2/x", "logs/../../x", "out/shadow", "a\0b", str(run) + "2/x"):
        with pytest.raises(UntrustedFileError, match="run: names a file"):
            path_inside(run, name)


def test_the_launcher_reads_nothing_past_the_gate() -> None:
    """What is new here belongs through `launch.untrusted_files`, or has a reason not to."""
    assert openings("launch") == PAST_THE_GATE.keys()


def test_what_reads_past_the_gate_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "def one(p): return p.read_text()\n"
        "def two(p): return json.loads(p)\n"
        "def three(p):\n    with open(p) as f: pass\n"
        "def four(p):\n    with p.open('ab+') as f: pass\n"
        "def five(p): return [os.open(q, 0) for q in p]\n"
        "def fine(p):\n    with p.open('w') as f: f.write(read_text(p))\n"
        "    with p.open(mode='ab') as f, open(p, 'x') as g: pass\n"
    )
    names = {f"a.py:{name}" for name in ("one", "two", "three", "four", "five")}
    assert openings(str(tmp_path)) == names


def test_nothing_that_moves_a_terminal_is_printed_as_it_is() -> None:
    assert printable("a\x1b[2J\u202eb\nc\ud800 \x9b\t") == "a\\x1b[2J\\u202eb\\nc\\ud800 \\x9b\\t"
    assert printable("Größe 图 é [old]") == "Größe 图 é [old]"
    assert printable_lines("a\x07\nb\rc") == "a\\x07\nb\\rc"
