"""The Dockerfile names what is in the repository, and installs the tested versions."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_image_is_built_of_files_that_are_here_in_the_tested_versions() -> None:
    text = (ROOT / "Dockerfile").read_text()
    ignored = {line.strip("*/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    copied = [name for names in re.findall(r"^COPY (.*) \./$", text, re.MULTILINE) for name in names.split()]
    assert {"pyproject.toml", "constraints.txt"} <= {*copied}
    for name in copied:
        assert (ROOT / name).is_file(), name
        assert name not in ignored
    packages = (
        (ROOT / "pyproject.toml").read_text().partition("[tool.hatch.build.targets.wheel.force-include]")[2]
    )
    needed = re.findall(r"^(\w+) = \"launch/share", packages, re.MULTILINE)
    (made,) = re.findall(r"mkdir (launch trainer .*) \\$", text, re.MULTILINE)
    assert {*made.split()} == {"launch", "trainer", *needed}
    assert not ignored & {"launch", "trainer", *needed}
    assert "-c constraints.txt" in text
    (cuda,) = re.findall(r"^ARG CUDA=(\d+\.\d+)", text, re.MULTILINE)
    assert f"\ncuda-toolkit=={cuda}." in (ROOT / "constraints.txt").read_text()
