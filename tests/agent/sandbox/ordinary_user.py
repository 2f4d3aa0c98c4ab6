"""Runs a Python command as an ordinary user, from root: ``python ordinary_user.py ARGUMENTS``.

Where the interpreter or the code lies in a folder that only root can enter, that folder is
replaced, for this command alone, by an empty one that shows just what is needed.
"""

import os
import subprocess
import sys
from pathlib import Path

from agent.sandbox.forkjail import namespaces

NOBODY = 65534
REPOSITORY = Path(__file__).resolve().parents[3]


def locked_folder(path: Path) -> Path | None:
    """Return the outermost folder above a path that others cannot enter."""
    folders = [*reversed(path.parents), path]
    return next((f for f in folders if not f.stat().st_mode & 0o001), None)


def open_up(paths: list[Path]) -> None:
    """Make folders reachable for everyone, in a mount namespace of this process."""
    private, bind, recursive = 1 << 18, 4096, 16384
    namespaces.unshare(namespaces.NEW_MOUNTS)
    namespaces.mount(None, "/", None, recursive | private)
    kept = []
    for number, path in enumerate(paths):
        place = Path("/run") / f"shown-{os.getpid()}-{number}"
        place.mkdir()
        namespaces.mount(str(path), str(place), None, bind | recursive)
        kept.append(place)
    for folder in {locked_folder(path) for path in paths} - {None}:
        namespaces.mount("tmpfs", str(folder), "tmpfs", 0, "mode=755,size=1m")
    for path, place in zip(paths, kept, strict=True):
        path.mkdir(parents=True, exist_ok=True)
        namespaces.mount(str(place), str(path), None, bind | recursive)


def main() -> None:
    """Become an ordinary user and run the command."""
    wanted = {Path(sys.base_prefix).resolve(), Path(sys.prefix), REPOSITORY}
    locked = sorted(path for path in wanted if locked_folder(path) is not None)
    if locked:
        open_up(locked)
    namespaces.become(NOBODY)
    os.chdir("/")
    os.environ["HOME"] = "/nonexistent"
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run ``python ARGUMENTS`` as an ordinary user and return what came of it."""
    command = [sys.executable, __file__] if os.getuid() == 0 else [sys.executable]
    return subprocess.run(
        [*command, *arguments], text=True, capture_output=True, check=False, **options
    )


if __name__ == "__main__":
    main()
