"""Every answer, written as soon as it is given: `answers/<split>-<model>-<digest>/` in the run's folder.

A folder belongs to the facts in its `facts.json` (weights, system message, split, decoding), whose digest is in its
name, so answers of other weights never meet. Every rank appends to a file of its own: a killed evaluation loses the
batch under way and goes on, and nothing is ever replaced. A question is known by its text and its image.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write, naming
from launch.untrusted_files import TABLE, UNREADABLE, parse_json, read_tail, read_text

FACTS = "facts.json"


@dataclass(frozen=True)
class AnswerStore:
    """The answers of one variant. Creates nothing before the first answer."""

    folder: Path
    facts: Mapping[str, Any]

    @staticmethod
    def of(answers: Path, model: str, facts: Mapping[str, Any]) -> AnswerStore:
        """Return the store of these facts below a run's `answers`. `model`: base, adapter or merged, for who reads
        names.
        """
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return AnswerStore(answers / f"{facts['split']}-{model}-{digest}", facts)

    def read(self) -> dict[str, str]:
        """Return question -> answer of all ranks so far; a line that a kill cut short says nothing."""
        answers: dict[str, str] = {}
        for file in sorted(self.folder.glob("rank-*.jsonl")):
            try:
                lines = read_text(file, TABLE).splitlines()
            except UNREADABLE:
                continue  # asked again
            for line in lines:
                question, prediction = _parsed(line)
                if question is not None:
                    answers.setdefault(question, prediction)
        return answers

    def append(self, rank: int, answers: Iterable[tuple[str, str]]) -> None:
        """Add (question, answer) pairs of a rank.

        Raises:
            OSError: there is no writing them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / FACTS).exists():
            atomic_write(self.folder / FACTS, json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n")
        lines = [json.dumps({"question": question, "prediction": answer}) for question, answer in answers]
        file = self.folder / f"rank-{rank}.jsonl"
        with naming(file), file.open("ab") as handle:
            cut = handle.tell() > 0 and not _ends_with_newline(file)
            handle.write(("\n" if cut else "").encode() + "".join(f"{line}\n" for line in lines).encode())
            handle.flush()
            os.fsync(handle.fileno())


def question_id(prompt: str, image: str) -> str:
    """Return the id of a prompt and the digest of the image it is about."""
    return hashlib.sha256(f"{image}\0{prompt}".encode()).hexdigest()[:24]


def _ends_with_newline(file: Path) -> bool:
    return read_tail(file, 1) == b"\n"


def _parsed(line: str) -> tuple[str | None, str]:
    try:
        values = parse_json(line)
        question, prediction = values["question"], values["prediction"]
    except (ValueError, LookupError, TypeError):
        return None, ""
    is_answer = isinstance(question, str) and isinstance(prediction, str)
    return (question, prediction) if is_answer else (None, "")
