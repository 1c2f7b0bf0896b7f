"""Upload of a run to the Hugging Face hub: its adapter, its merged model, or a checkpoint to go on from elsewhere.

    python -m launch.hub.push --run-dir RUN --repo owner/name [--checkpoint STEP]

The last line is what a training starts beside itself; `samestep push` calls `push_run`. The token is huggingface_hub's
own (HF_TOKEN, or that of `hf auth login`): it is never read here but to take it out of what is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from launch.checkpoints.adapter_file import is_whole
from launch.checkpoints.manifest import MANIFEST, read_manifest
from launch.console import echo
from launch.errors import ConfigError, RunError, SamestepError
from launch.hub.card import card_for_hub, describe_run
from launch.run.damaged_adapter import adapter_damage
from launch.run.directory import RunDirectory
from launch.run.merged_model import merge_behind
from launch.untrusted_files import printable

T = TypeVar("T")
LAST_CHECKPOINT = "last-checkpoint"
"""Where the hub keeps the newest checkpoint, as transformers' `hub_strategy="checkpoint"` calls it."""
_RECORDS = ("recipe.yaml", "plan.json", "metrics.jsonl", "evaluations.jsonl")
_PATIENCE_S = 600.0  # for a checkpoint that is being published beside the training


def push_run(run: RunDirectory, repo_id: str, *, merged: bool = False, private: bool = True) -> list[str]:
    """Upload the adapter with its processor, card and records; with `merged` also the merged model, into
    `<repo_id>-merged`. Returns the addresses. What the hub has already is not sent again.

    Raises:
        ConfigError: there is no whole adapter, no merged model of it, no token, or the hub refuses the repository.
        RunError: the hub does not answer.
    """
    problems = (
        []
        if is_whole(run.adapter)
        else [adapter_damage(run) or f"{run.adapter}: no adapter yet; `samestep run` writes it"]
    )
    if merged and not (run.merged / "config.json").is_file():
        problems.append(f"{run.merged}: no merged model yet; make it with `samestep merge {run.path}`")
    if merged and (behind := merge_behind(run, run.merged)):
        problems.append(behind)
    problems += [problem] if (problem := missing_token()) else []
    if problems:
        raise ConfigError(problems)
    files = _files_of(run.adapter)
    files |= {f"run/{name}": run.path / name for name in _RECORDS if (run.path / name).is_file()}
    files |= {f"run/{file.name}": file for file in sorted(run.path.glob("eval*.json"))}
    addresses = [_upload(run, repo_id, run.adapter, files, private)]
    if merged:
        addresses.append(_upload(run, f"{repo_id}-merged", run.merged, _files_of(run.merged), private))
    return addresses


def push_checkpoint(run: RunDirectory, repo_id: str, step: int, private: bool = True) -> str:
    """Upload a checkpoint as the repository's `last-checkpoint/`, replacing an older one. Returns the address.

    It is waited for where it is still being written. Raises as `push_run`.
    """
    folder = run.checkpoint(step)
    until = time.monotonic() + _PATIENCE_S
    while not (folder / MANIFEST).is_file():
        if time.monotonic() > until:
            raise ConfigError(
                f"{folder}: was not published within {_PATIENCE_S:.0f} s; see `samestep checkpoints`"
            )
        time.sleep(0.5)
    read_manifest(folder, verify=True)
    if problem := missing_token():
        raise ConfigError(problem)

    def upload() -> str:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=LAST_CHECKPOINT,
            delete_patterns="*",
            commit_message=f"{describe_run(run)}, checkpoint {step}",
        )
        return f"{api.endpoint}/{repo_id}/tree/main/{LAST_CHECKPOINT}"

    return _in_words(repo_id, upload)


def missing_token() -> str | None:
    """Why nothing can be uploaded from here, in a line; None where a token is there."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE: is set, so nothing can be uploaded; unset it, or leave the upload out"
    if not get_token():
        return "hub: no token is there; type `hf auth login`, or set HF_TOKEN to one that may write"
    return None


def _files_of(folder: Path) -> dict[str, Path]:
    """Every plain file of an adapter or merged model, by its path in the repository; the card is written anew."""
    return {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not file.is_symlink()
        and not file.name.startswith(".")
        and file.name != "README.md"
    }


def _upload(run: RunDirectory, repo_id: str, folder: Path, files: dict[str, Path], private: bool) -> str:
    """One commit: the repository has all of it or nothing."""
    card = card_for_hub(run, folder, repo_id)

    def upload() -> str:
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        api.create_commit(repo_id, operations, commit_message=describe_run(run))
        return f"{api.endpoint}/{repo_id}"

    return _in_words(repo_id, upload)


def _in_words(repo_id: str, upload: Callable[[], T]) -> T:
    """The errors of the client in a line of ours.

    Raises:
        ConfigError: the hub refuses. RunError: it does not answer, or fails.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return upload()
    except LocalTokenNotFoundError:
        raise ConfigError(
            f"--repo {repo_id}: no token is there; type `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        answer = f"{repo_id}: the hub answered {status} ({_without_token(str(error))})"
        if status in (400, 401, 403, 404, 409, 422):
            raise ConfigError(f"{answer}; the token must be allowed to write to it") from None
        raise RunError(f"{answer}; the same command tries again") from None
    except Exception as error:  # of httpx, httpx2 or hf_xet, by the version of huggingface_hub
        kind = type(error).__name__
        raise RunError(
            f"{repo_id}: the upload failed ({kind}: {_without_token(str(error))}); the same command tries again"
        ) from None


def _without_token(text: str) -> str:
    """The first line of a library's words, without the token, should it stand in them."""
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "***") if token else text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[0][:300]) if lines else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the child that a training starts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.hub.push", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--checkpoint", type=int)
    parser.add_argument("--public", action="store_true")
    options = parser.parse_args(arguments)
    run = RunDirectory(options.run_dir.absolute())
    try:
        if options.checkpoint is None:
            addresses = push_run(run, options.repo, private=not options.public)
        else:
            addresses = [push_checkpoint(run, options.repo, options.checkpoint, private=not options.public)]
    except SamestepError as error:
        echo(str(error), to_stderr=True)
        return error.exit_status
    for address in addresses:
        echo(f"uploaded: {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
