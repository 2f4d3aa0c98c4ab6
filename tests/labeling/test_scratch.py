"""Scratch folders: a killed process's is removed by the next, a living one's never."""

import os
import subprocess
import sys
import tempfile

import pytest

from labeling.scratch import Scratch

HOLD = """
import sys
from labeling.scratch import Scratch
scratch = Scratch("job-")
print(scratch.path.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(folder, repository):
    """Another process that holds a folder, not a young one any more."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=repository,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    path = folder / process.stdout.readline().strip()
    os.utime(path, (0, 0))
    yield process, path
    process.kill()
    process.communicate()


def test_a_folder_is_there_until_it_is_closed(folder):
    scratch = Scratch("job-")
    assert scratch.path.parent == folder
    (scratch.path / "file").write_text("x")
    scratch.close()
    scratch.close()
    assert list(folder.iterdir()) == []


def test_the_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(folder, other):
    process, path = other
    Scratch("job-").close()
    assert path.is_dir()
    process.kill()
    process.wait()
    Scratch("job-").close()
    assert not path.exists()


def test_young_folders_and_others_stay(folder):
    (folder / "job-young").mkdir()
    (folder / "mine").mkdir()
    os.utime(folder / "mine", (0, 0))
    Scratch("job-").close()
    assert sorted(path.name for path in folder.iterdir()) == ["job-young", "mine"]
