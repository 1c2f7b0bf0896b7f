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
        ("image,query,label\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (
            b"image, query, label\na.png, why?, so\n",
            "has spaces around the column name ' query'; take them out",
        ),
        (b",query,label\n0,why?,so\n", "a first column without a name; name it, or take it out"),
        (b'image,query,label\na.png,"why?,so\n', "is no CSV (.*); correct it$"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said_with_what_to_do(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(content)
    with pytest.raises(UntrustedFileError, match=words.replace("(.*)", r"\(.*\)").replace("\\t", r"\\t")):
        TextTable([file])


def test_a_row_is_found_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('q,l\r\n"two\r\nlines",1\r\n\r\nx,2\r\ny, "3"\r\n', newline="")
    (tmp_path / "b.csv").write_text("q,l\n" + "x" * 200_000 + ',1\n" ""quoted"" text",4\n')
    table = TextTable([tmp_path / "a.csv", tmp_path / "b.csv"])
    places = [(file.name, line) for file, line in map(table.place, range(len(table)))]
    assert places == [("a.csv", 2), ("a.csv", 5), ("a.csv", 6), ("b.csv", 2), ("b.csv", 3)]
    assert len(table.raw(3)["q"]) == 200_000  # more than csv's own limit of a cell
    assert table.raw(4) == {"q": ' "quoted" text', "l": "4"}
    with pytest.raises(ValueError, match="a cell begins with a space before its quote"):
        table.raw(2)


def test_a_file_that_is_too_large_says_how_to_cut_it(tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(
        UntrustedFileError, match=r"is too large \(2,147,483,648 bytes.* cut it into train-00000.jsonl"
    ):
        TextTable([tmp_path / "train.jsonl"])
