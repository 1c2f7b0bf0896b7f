"""Answers through CUDA graphs: the tokens of `model.generate` for one prompt at a time. Skips itself without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from launch.inputs.families import FAMILIES
from tests.helpers.distributed.recorded import write_recipe
from tests.helpers.plain_answers import ADAPTERS, AnsweredChats
from trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_captured_steps_give_the_answers_of_plain_calls(kind: str, world: Path, tmp_path: Path) -> None:
    chats = AnsweredChats(kind, world, tmp_path, "cuda")
    replica = chats.fast()
    replica.look_ahead(range(len(chats.rows)))
    chats.check(replica)
    assert replica._decoder.captured
    replica.features.stop()


def test_captured_steps_of_4_bit_weights_give_the_answers_of_plain_calls(world: Path, tmp_path: Path) -> None:
    chats = AnsweredChats("qwen2_vl", world, tmp_path, "cuda", nf4=True)
    chats.check(chats.fast())


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_capturing_changes_no_token_of_fused_kernels_in_bfloat16(
    kind: str, world: Path, tmp_path: Path
) -> None:
    chats = AnsweredChats(kind, world, tmp_path, "cuda", dtype="bfloat16")
    replica, rows = chats.fast(), range(len(chats.rows))
    answers = []
    for captured in (True, False):
        replica._decoder.captured = captured
        for adapter in ADAPTERS:
            with chats.active(adapter):
                answers.append(replica.answers(chats.prompts, rows))
    assert answers[:3] == answers[3:]
    assert answers[0] != answers[1] != answers[2]


def test_answers_are_scored_while_it_trains_and_change_nothing(world: Path, tmp_path: Path) -> None:
    """In bfloat16 on the weights that train, every second step, through graphs of its own each time."""
    half = {"model": {"dtype": "bfloat16"}, "quantization": {"bnb_4bit_compute_dtype": "bfloat16"}}
    adapters = []
    for count in (4, 0):
        recipe = write_recipe(
            world, tmp_path / f"{count}.yaml", "nf4", evaluation={"answers": count, "every_steps": 2}, **half
        )
        assert train.main([str(recipe), "--runs-dir", str(tmp_path), "--name", f"with-{count}"]) == 0
        (file,) = (tmp_path / f"with-{count}" / "adapter").glob("*.safetensors")
        adapters.append(hashlib.sha256(file.read_bytes()).hexdigest())
        lines = (tmp_path / f"with-{count}" / "evaluations.jsonl").read_text().splitlines()
        assert all(json.loads(line).get("answers", 0) == count for line in lines)
        assert len(lines) > 1
    assert adapters[0] == adapters[1]
