"""Compiled modules in the cache folder: where an image keeps none, and in no folder of others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.local import bytecode
from launch.local.bytecode import bytecode_variables, keep_own_bytecode

NEVER = {"PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def torch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "torch"
    folder.mkdir()
    monkeypatch.setattr(bytecode, "_torch_folder", lambda: folder)
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    return folder


def test_an_image_that_forbids_bytecode_gets_a_private_folder_in_the_cache(torch_folder: Path) -> None:
    variables = bytecode_variables(NEVER)
    folder = Path(variables["PYTHONPYCACHEPREFIX"])
    assert variables["PYTHONDONTWRITEBYTECODE"] == ""
    assert folder.parent == torch_folder.parent / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert bytecode_variables(NEVER) == variables


def test_other_versions_of_packages_get_another_folder(
    torch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder_with(record: str) -> str:
        bytecode._packages_digest.cache_clear()
        (packages := torch_folder.parent / record / "site-packages").mkdir(parents=True)
        (packages / f"{record}.dist-info").mkdir()
        monkeypatch.setattr(sys, "path", [str(packages)])
        return bytecode_variables(NEVER)["PYTHONPYCACHEPREFIX"]

    assert len({folder_with(record) for record in ("trl-1.16.0", "trl-1.17.0")}) == 2
    bytecode._packages_digest.cache_clear()


def test_python_is_left_alone_where_it_keeps_bytecode_itself(torch_folder: Path) -> None:
    assert bytecode_variables({}) == {}  # the folder of torch can be written
    assert bytecode_variables(NEVER | {"PYTHONPYCACHEPREFIX": "/elsewhere"}) == {}
    compiled = torch_folder / "__pycache__"
    compiled.mkdir()
    (compiled / f"version.{sys.implementation.cache_tag}.pyc").touch()
    assert bytecode_variables(NEVER) == {}


def test_no_bytecode_is_read_from_a_folder_that_others_can_write(torch_folder: Path) -> None:
    folder = Path(bytecode_variables(NEVER)["PYTHONPYCACHEPREFIX"])
    folder.chmod(0o770)
    assert bytecode_variables(NEVER) == {}
    folder.rmdir()
    folder.symlink_to(torch_folder)
    assert bytecode_variables(NEVER) == {}


def test_without_a_home_for_the_cache_no_bytecode_is_kept(
    torch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", "~nobody-of-that-name/cache")
    assert bytecode_variables(NEVER) == {}


def test_a_command_keeps_its_own_modules_there_too(
    torch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    keep_own_bytecode()
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == (None, True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    keep_own_bytecode()
    assert sys.pycache_prefix == bytecode_variables(NEVER)["PYTHONPYCACHEPREFIX"]
    assert not sys.dont_write_bytecode
