"""What `samestep --version` says: read from what is installed, importing none of it."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "deepspeed")


def version_line() -> str:
    """samestep's version, and those of the packages that decide what a run computes, in one line."""
    return f"samestep {_version_of('samestep')} ({', '.join(f'{name} {_version_of(name)}' for name in PACKAGES)})"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # DeepSpeed is optional; the login node of a cluster may lack them all
        return "not installed"
