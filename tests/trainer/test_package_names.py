"""`trainer.package_names`: which distribution a package is of."""

from __future__ import annotations

from importlib import metadata

import pytest

from trainer import package_names
from trainer.package_names import PackageNames


def test_a_package_that_is_called_as_its_distribution_is_found_without_a_look_at_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scan() -> None:
        raise AssertionError("all installed files were looked up")

    monkeypatch.setattr(package_names, "_all_packages", scan)
    assert PackageNames()["trl"] == ["trl"]
    (name,) = PackageNames()["huggingface_hub"]
    assert metadata.version(name) == metadata.version("huggingface-hub")


def test_any_other_package_is_found_as_before() -> None:
    names = PackageNames()
    assert names["PIL"] == ["pillow"]
    assert names.get("no_such_package", []) == []
    with pytest.raises(KeyError):
        names["no_such_package"]
    assert len(names) == len(list(names)) > 50


def test_the_trainers_libraries_ask_so() -> None:
    assert metadata.packages_distributions is PackageNames
