"""Versions of what is installed, without importing it, and what `samestep --version` says."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "deepspeed")


def installed_version(package: str, absent: str = "not installed") -> str:
    """The version of an installed package, or `absent`: DeepSpeed is optional, a login node may lack all."""
    try:
        return version(package)
    except PackageNotFoundError:
        return absent


def version_line() -> str:
    """samestep's version, and those of the packages that decide what a run computes, in one line."""
    libraries = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    return f"samestep {installed_version('samestep')} ({libraries})"
