"""A planted change of one LoRA module's dropout seed is found: the step and the module."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import write_recipe
from tests.helpers.launcher import samestep

pytestmark = pytest.mark.long
PLANT = """
import sys
if any(word.endswith("/planted") for word in sys.orig_argv):
    from trainer.model import dropout
    plain = dropout.token_keys, dropout.row_keys
    step_of = {}
    def token_keys(seed, step, *rest):
        step_of["now"] = step
        return plain[0](seed, step, *rest)
    def row_keys(tokens, modules):
        keys = plain[1](tokens, modules).clone()
        if step_of["now"] >= 4:  # step 5
            keys[1] = keys[1] ^ 2
        return keys
    dropout.token_keys, dropout.row_keys = token_keys, row_keys
"""


def test_another_dropout_seed_of_one_module_is_found_at_its_step(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PLANT)
    recipe = write_recipe(world, tmp_path / "recipe.yaml", checkpoint={"every_steps": 2, "keep": 9})
    drive(1, [([str(recipe), "--runs-dir", str(tmp_path), "--name", "plain"], None)], tmp_path)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "site"), before])))
    options = ("--runs-dir", str(tmp_path), "--gpus-per-node", "1")
    assert samestep("run", str(recipe), *options, "--name", "planted") == 0
    capfd.readouterr()
    runs = (str(tmp_path / "plain"), str(tmp_path / "planted"))
    assert samestep("diff", *runs, "--deep", "--json") == 1
    printed = capfd.readouterr().out
    result = json.loads(printed[printed.index('{"comparison"') :])
    assert result["comparison"]["first"]["step"] == 5
    assert result["deep"]["step"] == 5
    assert result["deep"]["weights"] == 0.0
    assert result["deep"]["reproduced"] == [True, True]
    first = result["deep"]["first"]
    assert (first["during"], first["relative"] > 0.1) == ("forward", True)
    assert first["module"] == "model.language_model.layers.0.self_attn.v_proj.lora_dropout.default"
    assert samestep("diff", runs[0], runs[0], "--deep") == 0
    assert "equal to the bit, so there is no step to look into" in capfd.readouterr().out
