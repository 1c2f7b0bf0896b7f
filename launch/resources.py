"""Where the files that ship with the package are: recipes, accelerate and DeepSpeed configurations, Slurm."""

from pathlib import Path
from typing import Literal

from launch.errors import ConfigError

Kind = Literal["recipes", "accelerate_configs", "ds_configs", "slurm"]


def resource_folder(kind: Kind) -> Path:
    """`launch/share/<kind>` in an installed wheel, `<kind>` beside the packages in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "share" / kind
    return installed if installed.is_dir() else here.parent / kind


def resource_names(kind: Kind) -> list[str]:
    """Names of the files of one kind, sorted."""
    folder = resource_folder(kind)
    return sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def resource(kind: Kind, name: str) -> Path:
    """Absolute path of one shipped file. Raises ConfigError with the names there are when it is missing."""
    path = resource_folder(kind) / name
    if not path.is_file():
        raise ConfigError(
            f"{kind}/{name}: no such file; there are {', '.join(resource_names(kind)) or 'none'}"
        )
    return path
