"""Whole-file replacement: the old one or the new one, never a mixture."""

import os
import socket
import subprocess
import sys

import pytest

from trajectory import atomic
from trajectory.atomic import atomic_folder, atomic_path
from trajectory.errors import InputError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_on_success(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


def test_the_old_file_stays_on_failure(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:  # a file system without renameat2
        monkeypatch.setattr(atomic, "_exchange", lambda new, old: False)
    path = tmp_path / "checkpoint"
    for name in ("old.bin", "new.bin"):
        with atomic_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert names(path / "sub") == ["new.bin"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "checkpoint").write_text("x")
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "checkpoint"):
        pass
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_folder_stays_on_failure(tmp_path):
    path = tmp_path / "checkpoint"
    with atomic_folder(path) as temporary:
        (temporary / "w.bin").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        (temporary / "w.bin").write_text("half")
        raise KeyboardInterrupt
    assert (path / "w.bin").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_folder_comes_back_if_the_second_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "w.bin").write_text("old")
    monkeypatch.setattr(atomic, "_exchange", lambda new, old: False)
    rename = os.rename

    def failing(source, target):
        if target == path and source.name.endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_folder(path):
        pass
    assert (path / "w.bin").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_leftovers_of_a_killed_writer_are_removed_and_those_of_a_live_one_kept(tmp_path):
    path = tmp_path / "a.txt"
    code = (
        "import os, signal, sys; from trajectory.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    live = tmp_path / f".a.txt.{socket.gethostname()}-{os.getppid()}-x.tmp"
    live.touch()
    assert len(names(tmp_path)) == 2
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == [live.name, "a.txt"]


def test_file_names_with_pattern_characters_work(tmp_path):
    path = tmp_path / "a[1]*.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"
