"""Which distribution an importable package is of, without a look at every installed file.

trl 1.16 calls `importlib.metadata.packages_distributions` while it is imported, transformers 5.23 where it cannot find
a package's version otherwise. It looks up the files of all distributions that do not list their packages: 0.4 to 0.9 s
for the sake of a few versions, of packages whose distributions have their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata

_all_packages = cache(metadata.packages_distributions)


class PackageNames(Mapping[str, list[str]]):
    """As the mapping of `packages_distributions`, of which most packages need no more than their own name."""

    def __getitem__(self, package: str) -> list[str]:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return _all_packages()[package]
        return [package]

    def __iter__(self) -> Iterator[str]:
        return iter(_all_packages())

    def __len__(self) -> int:
        return len(_all_packages())


def look_up_by_name() -> None:
    """Let libraries that are imported from here on ask by name first."""
    metadata.packages_distributions = PackageNames
