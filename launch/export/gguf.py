"""GGUF files of a merged model, written by llama.cpp's own converter."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from launch.atomic_files import refuse_readonly
from launch.console import echo
from launch.errors import ConfigError, RunError
from launch.run.directory import RunDirectory
from launch.subprocesses import wait_for

CONVERTER = "convert_hf_to_gguf.py"
FOLDER = "LLAMA_CPP"  # an environment variable: the folder of a checkout of llama.cpp


def convert(run: RunDirectory, output: Path) -> list[Path]:
    """Write `<run>.gguf` (the language model) and `mmproj-<run>.gguf` (the vision tower) into `output`.

    Each file has its name when it is whole. A file that is there already is kept.

    Raises:
        ConfigError: the converter is not installed (the command to type is in the message), or no place to write.
        RunError: the converter failed.
    """
    outputs = {output / f"{run.name}.gguf": [], output / f"mmproj-{run.name}.gguf": ["--mmproj"]}
    if not output.is_dir():
        raise ConfigError(f"--output: {output} is no folder; make it, or choose another")
    refuse_readonly(output, "the GGUF files")
    converter = find_converter()
    if converter is None:
        lines = [_typed(CONVERTER, run, file, flags) for file, flags in outputs.items()]
        raise ConfigError(
            [
                f"{CONVERTER}: llama.cpp's converter is not here; get it with `git clone "
                f"https://github.com/ggml-org/llama.cpp`, install its requirements, set {FOLDER} to that folder and "
                "repeat, or type there:",
                *(f"  python {line}" for line in lines),
            ]
        )
    for file, flags in outputs.items():
        if file.exists():
            echo(f"{file}: is there already, kept; remove it to have it written again")
            continue
        partial = file.with_name(f".{file.name}.partial")
        command = [sys.executable, str(converter), str(run.merged), "--outfile", str(partial), *flags]
        ended = wait_for(command)
        if ended.interrupted or ended.status or not partial.is_file():
            partial.unlink(missing_ok=True)
            if ended.interrupted:
                raise KeyboardInterrupt
            raise RunError(
                f"{converter}: did not write {file.name} (exit status {ended.status}); see its words above"
            )
        partial.rename(file)
    return [*outputs]


def find_converter() -> Path | None:
    """The converter in `$LLAMA_CPP`, or in the PATH."""
    if folder := os.environ.get(FOLDER):
        file = Path(folder).expanduser() / CONVERTER
        if not file.is_file():
            raise ConfigError(f"{FOLDER}: {folder} has no {CONVERTER}; set it to a checkout of llama.cpp")
        return file
    installed = shutil.which(CONVERTER)
    return Path(installed) if installed else None


def _typed(converter: str, run: RunDirectory, file: Path, flags: list[str]) -> str:
    return shlex.join([converter, str(run.merged), "--outfile", str(file), *flags])
