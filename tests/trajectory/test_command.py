"""Command lines: flags, files, help, and how each kind of error ends."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from trajectory import command
from trajectory.command import Command, main, parse
from trajectory.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The acting agent."""

    tasks: str
    """What to solve."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates."""
    tools: tuple[str, ...] = ()
    """Tools on offer."""

    def __post_init__(self):
        if self.tasks == "none":
            raise InputError("the task set is empty")


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """What to do on failure."""

    tries: int = 3
    """Attempts."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Label trajectories."""

    agent: AgentConfig
    out: Path
    """Output folder."""
    rollouts: int = 8
    """Continuations per prefix, >= 1."""
    rate: float = 0.5
    """A rate."""
    limit: int | None = None
    """Most trajectories."""
    keep: bool = True
    """Keep everything."""
    retry: RetryConfig = field(default_factory=lambda: RetryConfig(tries=5))

    def __post_init__(self):
        if self.rollouts < 1:
            raise ValueError(f"--rollouts must be at least 1, not {self.rollouts}")


def read(*arguments):
    return parse("prm label", Config, list(arguments))


def with_file(tmp_path, text, *arguments):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read("--config", str(path), *arguments)


def test_flags_fill_the_configuration_nested_ones_without_prefix():
    found = read("--tasks", "math", "--out", "o", "--tools", "a", "b", "--no-keep", "--tries", "1")
    assert found == Config(
        agent=AgentConfig(tasks="math", tools=("a", "b")),
        out=Path("o"),
        keep=False,
        retry=RetryConfig(tries=1),
    )


def test_a_file_fills_the_same_configuration(tmp_path):
    text = "tasks: math\nout: o\nrate: 1e-4\nlimit: 3\ntools: [a, b]\n"
    assert with_file(tmp_path, text) == Config(
        agent=AgentConfig(tasks="math", tools=("a", "b")), out=Path("o"), rate=1e-4, limit=3
    )


def test_a_file_may_nest_and_use_dashes(tmp_path):
    text = "agent:\n  tasks: math\nout: o\nretry: {tries: 2}\n"
    found = with_file(tmp_path, text)
    assert (found.agent.tasks, found.retry.tries) == ("math", 2)


def test_flags_override_the_file(tmp_path):
    found = with_file(
        tmp_path, "tasks: math\nout: o\nrollouts: 0\nkeep: false\n", "--rollouts", "2", "--keep"
    )
    assert (found.rollouts, found.keep, found.agent.tasks) == (2, True, "math")


def test_defaults_hold_where_the_file_says_nothing(tmp_path):
    assert with_file(tmp_path, "tasks: math\nout: o\n").retry == RetryConfig(tries=5)


def test_a_flag_missing_in_both_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        with_file(tmp_path, "tasks: math\n")
    assert end.value.code == 2
    assert "--out PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "roluts: 3",
            r"unknown key 'roluts' \(did you mean 'rollouts'\?\); the keys are tasks, en",
        ),
        ("engine: foo", "engine: Input should be 'transformers' or 'vllm', not 'foo'"),
        ("rollouts: many", "rollouts: Input should be a valid integer.*, not 'many'"),
        ("tasks: [1", "is not YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("tasks: math\nout: o\nrollouts: 0", "^--rollouts must be at least 1, not 0$"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        with_file(tmp_path, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "cannot read the configuration none.yaml: No such file"),
        (["--config"], "--config takes one YAML file"),
        (["--config=a", "--config=b"], "at most once"),
        (["--tasks", "m", "--out", "o", "--rollouts", "0"], "^--rollouts must be at least 1"),
        (["--tasks", "none", "--out", "o"], "^the task set is empty$"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        read(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "foo"], "Expected one of"),
        (["--rolouts", "3"], "Perhaps you meant"),
        (["--rollouts", "x"], "invalid literal"),
    ],
)
def test_malformed_flags_explain_themselves(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        read("--tasks", "math", "--out", "o", *arguments)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_shows_every_flag_with_its_text(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--rollouts INT Continuations per prefix, >= 1. (default: 8)", "--config FILE"):
        assert part in text


def show(config):
    print(config.rollouts)


def raising(error):
    def function(config):
        raise error

    return function


COMMANDS = {
    "label": Command(Config, show, "Label trajectories."),
    "digest": Command("trajectory.run:Parent", "trajectory.run:sha256_of", "Imported late."),
}


def run_main(monkeypatch, capsys, *arguments, commands=None):
    """Run the program; return exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["prm", *arguments])
    code = 0
    try:
        main("prm", commands or COMMANDS)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_named_command_runs(monkeypatch, capsys):
    found = run_main(monkeypatch, capsys, "label", "--tasks", "m", "--out", "o", "--rollouts", "3")
    assert found == (0, "3\n", "")


def test_the_overview_lists_the_commands_without_importing_them(monkeypatch, capsys):
    commands = COMMANDS | {"train": Command("no.such:Module", "no.such:module", "Train a PRM.")}
    code, out, _ = run_main(monkeypatch, capsys, "--help", commands=commands)
    assert code == 0
    assert "  label   Label trajectories.\n  digest  Imported late.\n  train   Train a PRM." in out


def test_without_a_command_the_overview_is_an_error(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: prm COMMAND")


def test_an_unknown_command_gets_the_valid_list(monkeypatch, capsys):
    assert run_main(monkeypatch, capsys, "lable") == (
        2,
        "",
        "prm: unknown command 'lable' (did you mean 'label'?); the commands are label, digest\n",
    )


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("the file is empty"), 2, "prm: the file is empty\n"),
        (KeyboardInterrupt(), 130, "prm: interrupted; run the same command again to resume\n"),
        (OSError(errno.ENOSPC, "full", "w.bin"), 1, "no space left on the disk (w.bin)"),
        (
            chained(RuntimeError("write failed"), OSError(errno.ENOSPC, "full")),
            1,
            "no space left on the disk: what was finished is kept",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "no space left"),
        (PermissionError(errno.EACCES, "denied", "w.bin"), 1, "prm: no permission (w.bin)\n"),
        (MemoryError(), 1, "prm: out of memory: lower the batch"),
        (ModuleNotFoundError("x", name="vllm.engine"), 1, "pip install 'toolprm[vllm]'"),
    ],
)
def test_expected_errors_end_in_one_sentence(monkeypatch, capsys, error, code, message):
    commands = {"label": Command(Config, raising(error), "Label.")}
    found = run_main(monkeypatch, capsys, "label", "--tasks", "m", "--out", "o", commands=commands)
    assert found[0] == code
    assert message in found[2]
    assert found[2].count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ModuleNotFoundError("x", name="tpyo"), FileNotFoundError("x")]
)
def test_unexpected_errors_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["prm", "label", "--tasks", "m", "--out", "o"])
    with pytest.raises(type(error)):
        main("prm", {"label": Command(Config, raising(error), "Label.")})


WAITING = """
import asyncio, multiprocessing, signal, sys, time
from dataclasses import dataclass
from trajectory.command import Command, main

@dataclass(frozen=True)
class Config:
    kind: str

async def wait():
    try:
        print("ready", flush=True)
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0)  # what cleans up may wait, too
        print("saved", flush=True)

async def compute():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        await asyncio.sleep(0)

async def share():
    computing = asyncio.create_task(compute())
    try:
        await asyncio.Event().wait()
    finally:
        print("saved", flush=True)

def sleep(awake):
    awake.set()
    time.sleep(60)

def run(config):
    if config.kind == "async":
        asyncio.run(wait())
    if config.kind == "task":
        asyncio.run(share())
    if config.kind == "child":
        fork = multiprocessing.get_context("fork")
        awake = fork.Event()
        child = fork.Process(target=sleep, args=(awake,))
        child.start()
        awake.wait()
        child.terminate()
        child.join()
        print("child ended with", child.exitcode, flush=True)
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("saved", flush=True)

main("prm", {"run": Command(Config, run, "Run.")})
"""


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize("kind", ["async", "task", "plain"])
def test_sigterm_cleans_up_as_ctrl_c_does_even_where_that_is_ignored(kind, ctrl_c):
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.{_name(ctrl_c)})\n{WAITING}"
    process = _started(code, kind)
    assert process.stdout.readline() == "ready\n"
    if ctrl_c is signal.SIG_IGN:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == "saved\n"
    assert err == "prm: terminated; run the same command again to resume\n"
    assert process.returncode == 143


def test_a_forked_child_is_ended_by_sigterm_without_a_word():
    process = _started(WAITING, "child")
    assert process.stdout.readline() == f"child ended with {-signal.SIGTERM}\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "prm: interrupted; run the same command again to resume\n"
    assert process.returncode == 130


def _name(handler):
    """Spell a handler of Ctrl-C in the signal module."""
    return getattr(handler, "name", None) or handler.__name__


def _started(code, kind):
    """Start a program that waits to be ended."""
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", "--kind", kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_libraries_are_quiet_unless_the_user_asks():
    code = (
        "import os, sys; from trajectory.command import quiet_libraries; quiet_libraries()\n"
        "print('transformers' in sys.modules, 'torch' in sys.modules)\n"
        "from transformers.utils import logging\n"
        "print(logging.is_progress_bar_enabled(), os.environ['VLLM_LOGGING_LEVEL'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in command._QUIET}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "False False\nFalse INFO\n"
