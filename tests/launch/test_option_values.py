"""Every option of every command is judged where it is accepted, on any machine, before anything is written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from launch.cli.main import app
from launch.cli.options import memory_size
from launch.option_values import MOST_PROCESSES, for_argparse, host, place, positive, whole
from tests.helpers.launcher import Launcher, samestep, stand_in

LONG = "x" * 300
COUNTS = ["", "x", "0", "-1", "1.5", "1e3", "nan", "9" * 5000, str(MOST_PROCESSES + 1)]
PATHS = ["", " ", "a\nb", "\x1b[31m", LONG, "a/" * 3000, "~no-such-user/here"]
TEXTS = ["", " ", "a\nb", "\x1b]0;x\x07"]
SIZES = ["", "banana", "-5GB", "0.0001GB", "0GB", "nan", "inf", "24MB", "9" * 400, "24 GB x", "２４GB"]
HOSTILE: dict[str, list[str]] = {
    "RECIPE": [*PATHS, "no-such-recipe", "."],
    "RUN": [*PATHS, "no-such-run"],
    "SOURCE": [*PATHS, "no-such-run"],
    "TARGET": [*PATHS, "no-such-run", ".", "owner/name"],
    "--strategy": ["", "ddpp", "\n", LONG],
    "--nodes": COUNTS,
    "--gpus-per-node": COUNTS,
    "--gpu-memory": SIZES,
    "--price": ["", "x", "0", "-1", "nan", "inf", "1e999"],
    "--watts": ["", "x", "0", "-1", "nan", "inf", "1e999"],
    "--name": ["", ".", "..", "a/b", "a b", "a\n", LONG, "-x"],
    "--runs-dir": PATHS,
    "--set": ["", "x", "=", "=1", "lora.=1", "lora.r=\x00", "lora.r={", "name.x=1", f"{LONG}=1"],
    "IMAGE... [QUESTION]": ["lost.png", "Why?"],
    "--early-stop": ["", "-1", "x", "1.5"],
    "--allow": ["", "lora", "lora.rr", "\n"],
    "--from": [*PATHS, "no-such-checkpoint"],
    "--machine-rank": ["", "x", "-1", "1", "0.5"],
    "--main-process-ip": ["", " ", "a b", "http://x", "a\nb", "-x", LONG],
    "--main-process-port": ["", "x", "0", "-1", "65536", "99999999", "1e3"],
    "--split": ["", "val", "Test"],
    "--models": ["", ",", "bass", "base,,adapter", "checkpoint-", "base-prompt-x", LONG],
    "--prompt": [*PATHS, "no-such-file", "."],
    "--max-samples": ["", "0", "-1", "x", "1.5"],
    "--output": PATHS,
    "--base": ["", "quantized"],
    "--dtype": ["", "float16", "auto"],
    "--recipe": PATHS,
    "--adapter-config": PATHS,
    "--lora-alpha": ["", "x", "0", "-1", "nan", "inf", "1e999"],
    "--base-model": PATHS,
    "--site": [*PATHS, "no-such-site.yaml"],
    "--partition": TEXTS,
    "--account": TEXTS,
    "--qos": TEXTS,
    "--constraint": TEXTS,
    "--time": [*TEXTS, "soon", "1:00:00:00:00", "-1"],
    "--container": TEXTS,
    "--device": ["", "tpu", "CUDA"],
    "--signal-lead": ["", "0", "-1", "x", "65536"],
    "--max-crashes": ["", "0", "-1", "x", "1001"],
    "--then": ["push", "merge,x", "\n"],
    "--rank": ["", "-1", "x"],
    "FILE": PATHS,
    "--data": [*PATHS, "no-such-folder", "."],
    "--model": PATHS,
    "--gpus": ["", "x", "-1", "1.5", "9" * 5000],
    "--image": TEXTS,
    "--query": TEXTS,
    "--label": TEXTS,
    "--rows": ["", "x", "-1", "1001"],
    "--repo": ["", "x", "a/b/c", "a b/c", "../x", "a/" + "b" * 200],
    "--format": ["", "onnx", "VLLM"],
    "--steps": ["", "x", "0", "5:4", "-1", "1:", ":1", "1:2:3", "9" * 5000, LONG],
    "--random": ["", "0", "-1", "x", "1001"],
    "--step": ["", "x", "0", "-1", "1.5"],
    "--without": ["", "x", "-1", "1.5"],
    "--until": ["", "x", "0", "-1"],
    "--seed": ["", "-1", "x", "1.5"],
}
NEEDED = {
    "consolidate": ("--output", "adapter"),
    "blame": ("--step", "1"),
    "replay": ("--steps", "1"),
    "export": ("--format", "vllm"),
    "push": ("--repo", "me/it"),
}
ARGUMENT = {
    "recipe": "RECIPE",
    "run": "RUN",
    "runs": "RUN",
    "source": "SOURCE",
    "target": "TARGET",
    "file": "FILE",
    "left": "RUN",
    "right": "RUN",
    "words": "IMAGE... [QUESTION]",
}
GOOD = {
    "recipe": "embedded",
    "run": "mine",
    "runs": "mine",
    "source": ".",
    "target": "embedded",
    "file": "my.yaml",
    "left": "mine",
    "right": "mine",
    "words": "lost.png",
}


def _options() -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """(command, what its user sees, words before it, words after it) of what takes a value: options, arguments."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        for parameter in command.params:
            if parameter in arguments:
                place_of = arguments.index(parameter)
                others = [GOOD[one.name] for one in arguments]
                before = (*NEEDED.get(name, ()), "--", *others[:place_of])
                yield name, ARGUMENT[parameter.name], before, tuple(others[place_of + 1 :])
            elif not parameter.is_flag and not parameter.secondary_opts:
                option = max(parameter.opts, key=len)
                needed = NEEDED.get(name, ()) if option not in NEEDED.get(name, ()) else ()
                yield name, option, (*(GOOD[one.name] for one in arguments), *needed), ()


def test_no_option_is_left_out_of_the_table() -> None:
    assert {option for _, option, _, _ in _options()} == set(HOSTILE)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return stand_in(monkeypatch, tmp_path)


@pytest.mark.parametrize(("command", "option", "before", "after"), list(_options()), ids=str)
def test_a_value_that_cannot_be_is_refused_in_one_line_that_names_it(
    command: str,
    option: str,
    before: tuple[str, ...],
    after: tuple[str, ...],
    launcher: Launcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_option = option.startswith("--")
    for value in HOSTILE[option]:
        if value == "no-such-run" and command == "diff":  # it names the run that is missing first
            continue
        assert samestep(command, *before, f"{option}={value}" if is_option else value, *after) == 2, value
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, (value, said)
        assert said.strip().isprintable(), (value, said)
        assert len(said) < 1000, value
        names = (
            option,
            *option.replace("[", "").replace("]", "").split("... "),
            value[:50],
            value.partition("=")[0][:50],
        )
        assert any(name and name in said for name in names), (value, said)
    assert launcher.commands == []
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_is_taken_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert place("--output")("~/a b") == Path("/home/me/a b")
    assert place("--output")("実験\u30001") == Path("実験\u30001")  # a space as others write it
    assert place("--runs-dir")(Path("runs")) == Path("runs")  # type: ignore[arg-type]  # typer reads defaults too
    assert (whole("--nodes", 1)("16"), whole("--nodes", 1)(1)) == (16, 1)  # type: ignore[arg-type]
    assert positive("--lora-alpha")("1e-3") == 1e-3
    for name in ("10.0.0.1", "node-7.cluster", "n1", "fe80::1%eth0", "::1"):
        assert host("--main-process-ip")(name) == name
    for size in ("24GB", "24", " 24 GiB ", "1gb", "141.5G"):
        assert memory_size("--gpu-memory")(size) == size


def test_the_trainers_own_command_lines_judge_alike(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--output", type=for_argparse(place("--output")))
    parser.add_argument("--lora-alpha", type=for_argparse(positive("--lora-alpha")))
    for value in (*PATHS, "nan"):
        option = "--lora-alpha" if value == "nan" else "--output"
        with pytest.raises(SystemExit):
            parser.parse_args([f"{option}={value}"])
        assert f"argument {option}: " in capsys.readouterr().err
