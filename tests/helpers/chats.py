"""Chats of none to several images and one to three questions, as JSONL beside their images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.conftest import chart_png, recipe_values


def chat_row(number: int, images: list[str], questions: int) -> dict[str, Any]:
    """A chat that asks `questions` times; its images stand in the first and the last question."""
    messages: list[dict[str, Any]] = []
    first = images if questions == 1 else images[: len(images) // 2]
    for turn in range(questions):
        shown = first if turn == 0 else images[len(first) :] if turn == questions - 1 else []
        words = f"How high is bar {number + turn}" + "?" * (number % 5 + 1)
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": words}]
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": f"It is {number * 7 % 90 + turn} now"},
        ]
    return {"messages": messages, "images": images}


def write_chats(folder: Path, counts: dict[str, int]) -> Path:
    """`<split>.jsonl` and `images/`: rows of 0 to 3 images and 1 to 3 questions, in a drawn order."""
    (folder / "images").mkdir(parents=True)
    draw = random.Random(7)
    for split, count in counts.items():
        lines = []
        for number in range(count):
            names = [f"images/{split}-{number}-{place}.png" for place in range(draw.choice([0, 0, 1, 2, 3]))]
            for place, name in enumerate(names):
                (folder / name).write_bytes(chart_png(number * 10 + place))
            lines.append(json.dumps(chat_row(number, names, draw.choice([1, 2, 3]))))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def chats_recipe(world: Path, folder: Path, **data: Any) -> dict[str, Any]:
    """Values of a recipe on chats, every answer a target."""
    values = recipe_values(world)
    values["data"] = {
        "dataset": str(folder),
        "train": "train",
        "validation": "val",
        "test": None,
        "system_message": None,
        "loss": "all_answers",
        **data,
    }
    return values
