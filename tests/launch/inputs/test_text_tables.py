"""CSV files that other programs wrote: what is wrong with one is said in the words of a spreadsheet's user."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.inputs.text_tables import TextTable
from launch.untrusted_files import UntrustedFileError


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"picture;question;answer\na.png;why?;so\n",
            "separates its columns by ';', not by commas; save it with",
        ),
        (b"image\tquery\tlabel\na.png\twhy?\tso\n", "separates its columns by '\\t', not by commas"),
        (
            "image,query,label\na.png,größer?,so\n".encode("latin-1"),
            "is no UTF-8 text (.*); save it as UTF-8",
        ),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said_with_what_to_do(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(content)
    with pytest.raises(UntrustedFileError, match=words.replace("(.*)", r"\(.*\)").replace("\\t", r"\\t")):
        TextTable([file])
