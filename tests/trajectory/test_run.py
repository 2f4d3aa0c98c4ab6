"""Run folders: manifest, lock, resumption and refusal."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest

from trajectory.errors import InputError
from trajectory.run import config_dict, open_run, read_manifest, sha256_of

CONFIG = {"rollouts": 8, "agent": {"tasks": "arithmetic", "tools": ["calculator"]}}


def finished_run(folder, **changes):
    with open_run(folder, kind="label", config=CONFIG | changes) as run:
        run.finish({"trajectories": 3})


def test_a_new_run_writes_its_manifest(tmp_path):
    with open_run(tmp_path / "run", kind="label", config=CONFIG) as run:
        manifest = read_manifest(run.path)
        assert not run.resumed
    assert (manifest.kind, manifest.status, manifest.config) == ("label", "running", CONFIG)
    assert manifest.packages["torch"]
    assert manifest.command[1:] == tuple(sys.argv[1:])


def test_a_finished_run_records_its_counts(tmp_path):
    finished_run(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest.status, manifest.counts) == ("finished", {"trajectories": 3})
    assert manifest.finished >= manifest.started


def test_the_same_configuration_resumes(tmp_path):
    finished_run(tmp_path)
    with open_run(tmp_path, kind="label", config=CONFIG) as run:
        assert run.resumed
        assert run.manifest.starts == 2


def test_a_moved_run_folder_resumes(tmp_path):
    finished_run(tmp_path / "a", out="a")
    (tmp_path / "a").rename(tmp_path / "b")
    with open_run(tmp_path / "b", kind="label", config=CONFIG | {"out": "b"}) as run:
        assert run.resumed


def test_settings_that_are_free_may_change_on_resumption_and_others_may_not(tmp_path):
    finished_run(tmp_path, runner={"workers": 1})
    now = CONFIG | {"runner": {"workers": 2}}
    with open_run(tmp_path, kind="label", config=now, free=("runner",)) as run:
        assert run.resumed
    assert read_manifest(tmp_path).config["runner"] == {"workers": 2}
    # A folder from before there was such a setting.
    with open_run(tmp_path, kind="label", config=CONFIG, free=("runner",)) as run:
        assert run.resumed
    with pytest.raises(InputError, match="rollouts was 8, now 4"):
        open_run(tmp_path, kind="label", config=now | {"rollouts": 4}, free=("runner",))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("train", CONFIG, "kind was 'label', now 'train'"),
        ("label", CONFIG | {"rollouts": 4}, "rollouts was 8, now 4"),
        ("label", CONFIG | {"seed": 1}, "seed was not set, now 1"),
        ("label", {"agent": CONFIG["agent"]}, "rollouts was 8, now not set"),
        (
            "label",
            CONFIG | {"agent": {"tasks": "math", "tools": ["calculator"]}},
            "agent.tasks was 'arithmetic', now 'math'",
        ),
    ],
)
def test_another_run_is_refused_naming_the_first_difference(tmp_path, kind, config, message):
    finished_run(tmp_path)
    with pytest.raises(InputError, match=f"belongs to another run: {message}"):
        open_run(tmp_path, kind=kind, config=config)
    assert read_manifest(tmp_path).status == "finished"


def test_a_changed_input_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("1\n")
    open_run(tmp_path / "run", kind="train", config={}, parents=[data]).close()
    data.write_text("2\n")
    with pytest.raises(InputError, match=r"input .*data\.jsonl was '"):
        open_run(tmp_path / "run", kind="train", config={}, parents=[data])


def test_an_input_that_is_no_path_is_recorded_without_a_hash(tmp_path):
    with open_run(tmp_path, kind="train", config={}, parents=["org/model"]) as run:
        (parent,) = run.manifest.parents
    assert (parent.path, parent.sha256) == ("org/model", "")


def test_a_folder_with_unknown_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds files but no manifest\.json \(thesis\.tex"):
        open_run(tmp_path, kind="label", config=CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "out", kind="label", config=CONFIG)


def test_a_second_live_writer_is_refused_and_the_first_goes_on(tmp_path):
    with open_run(tmp_path, kind="label", config=CONFIG) as run:
        with pytest.raises(InputError, match="another process is writing to"):
            open_run(tmp_path, kind="label", config=CONFIG)
        run.finish({})
    finished_run(tmp_path)


def test_a_killed_run_leaves_no_lock_and_resumes(tmp_path):
    code = (
        "import os, signal, sys; from trajectory.run import open_run\n"
        "run = open_run(sys.argv[1], kind='label', config={'a': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_manifest(tmp_path).status == "running"
    with open_run(tmp_path, kind="label", config={"a": 1}) as run:
        assert run.resumed


def test_a_run_killed_before_its_manifest_starts_anew(tmp_path):
    (tmp_path / ".lock").touch()
    with open_run(tmp_path, kind="label", config=CONFIG) as run:
        assert not run.resumed


def test_an_exception_marks_the_run_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, kind="label", config=CONFIG):
        raise KeyboardInterrupt
    assert read_manifest(tmp_path).status == "interrupted"
    finished_run(tmp_path)


def refused_run(folder, **changes):
    run = open_run(folder, kind="label", config=CONFIG | changes)
    with pytest.raises(InputError, match="no such model"), run:
        (folder / "trajectories.jsonl").touch()  # opened, and nothing written
        raise InputError("no such model")


def test_a_new_run_that_is_refused_leaves_nothing_so_the_corrected_command_works(tmp_path):
    refused_run(tmp_path / "deep" / "run", policy="wrong")
    assert not (tmp_path / "deep" / "run").exists()
    finished_run(tmp_path / "deep" / "run", policy="right")


def test_a_refused_run_leaves_a_folder_that_was_there_before(tmp_path):
    refused_run(tmp_path, policy="wrong")
    assert list(tmp_path.iterdir()) == []
    finished_run(tmp_path, policy="right")


def test_a_refused_run_keeps_its_manifest_beside_work_that_was_done(tmp_path):
    with pytest.raises(InputError), open_run(tmp_path, kind="label", config=CONFIG):
        (tmp_path / "trajectories.jsonl").write_text("{}\n")
        raise InputError("the tools stopped working")
    assert read_manifest(tmp_path).status == "interrupted"


def test_a_resumed_run_that_is_refused_keeps_its_manifest(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, kind="label", config=CONFIG):
        raise KeyboardInterrupt
    refused_run(tmp_path)
    assert read_manifest(tmp_path).starts == 2


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    lock, removals = fcntl.flock, []

    def remove_first(descriptor, operation):
        lock(descriptor, operation)
        if not removals:  # as a refused run does between the opening and the locking
            removals.append(os.unlink(tmp_path / ".lock"))

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with open_run(tmp_path, kind="label", config=CONFIG):
        assert removals
        with pytest.raises(InputError, match="another process is writing to"):
            open_run(tmp_path, kind="label", config=CONFIG)


def test_an_exception_after_finishing_leaves_it_finished(tmp_path):
    with pytest.raises(ValueError), open_run(tmp_path, kind="label", config=CONFIG) as run:
        run.finish({"n": 1})
        raise ValueError
    assert read_manifest(tmp_path).status == "finished"


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "2.1"}, "has schema 2.1, this version reads 1.0"),
        ({"mood": "good"}, "unknown field 'mood' of Manifest"),
        ({"status": "asleep"}, "status: expected one of 'running'"),
    ],
)
def test_a_manifest_of_another_format_is_refused(tmp_path, changes, message):
    finished_run(tmp_path)
    edit_manifest(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        open_run(tmp_path, kind="label", config=CONFIG)
    finished = [p.name for p in tmp_path.iterdir()]
    assert sorted(finished) == [".lock", "manifest.json"]


def test_a_folder_without_manifest_is_no_run_folder(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_manifest(tmp_path)


def test_the_hash_of_a_folder_follows_its_content_only(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"1")
    before = sha256_of(tmp_path)
    edit_manifest(tmp_path, starts=5)
    (tmp_path / "metrics.jsonl").touch()
    assert sha256_of(tmp_path) == before
    (tmp_path / "sub" / "w.bin").write_bytes(b"2")
    changed = sha256_of(tmp_path)
    (tmp_path / "sub" / "w.bin").rename(tmp_path / "sub" / "v.bin")
    assert len({before, changed, sha256_of(tmp_path)}) == 3


class Mode(StrEnum):
    FAST = "fast"


@dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    mode: Mode = Mode.FAST
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None
    extra: dict[str, Path] = field(default_factory=lambda: {"x": Path("y")})


def test_a_configuration_becomes_json_values():
    expected = {
        "out": "runs/x",
        "mode": "fast",
        "inner": {"sizes": [1, 2]},
        "limit": None,
        "extra": {"x": "y"},
    }
    found = config_dict(Config(out=Path("runs/x")))
    assert found == expected
    assert json.loads(json.dumps(found)) == expected


def test_a_configuration_with_odd_values_is_refused():
    @dataclass
    class Odd:
        value: object

    with pytest.raises(TypeError, match="a configuration cannot hold object"):
        config_dict(Odd(value=object()))


def test_the_commit_is_the_one_of_the_checkout(tmp_path, repository):
    git = ["git", "-C", str(repository)]
    tracked = subprocess.run(
        [*git, "ls-files", "--error-unmatch", "trajectory/provenance.py"],
        capture_output=True,
        check=False,
    )
    with open_run(tmp_path, kind="label", config={}) as run:
        commit = run.manifest.git_commit
    if tracked.returncode != 0:
        assert commit is None
        return
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit.removesuffix("-dirty") == head.stdout.strip()


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with open_run(tmp_path / "run", kind="label", config={}) as run:
        assert run.manifest.git_commit is None
