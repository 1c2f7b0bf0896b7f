"""Names of models and data sets: on the Hugging Face hub, or `embedded`."""

from pathlib import Path

EMBEDDED = "embedded"  # as a model or dataset: the tiny one that is built here, whatever folders there are


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, OWNER/NAME, and not that of a path; whether it exists is not asked."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def tried_folder(name: str) -> str:
    """Say where a name was looked for as a folder: a relative one from where the command is given."""
    folder = Path(name).expanduser()
    relative = "" if folder.is_absolute() else ", relative to the current folder"
    return f"{folder.absolute()}{relative}"
