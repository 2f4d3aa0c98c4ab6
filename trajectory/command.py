"""Command lines made from configuration dataclasses.

``NAME COMMAND --flag value`` fills the command's dataclass (flags, defaults and help texts come
from its fields); ``--config FILE.yaml`` fills the same dataclass, and flags override the file.
Exit codes: 0 done, 1 the machine is at fault (disk full, no permission, out of memory, missing
optional package), 2 bad input, 3 a gate is not met, 130 interrupted, 143 terminated. These end in
one sentence on standard error; anything unexpected keeps its traceback. SIGTERM ends a command the
way Ctrl-C does: work is saved and the engine's processes end too.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from trajectory.errors import GateError, InputError

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "WANDB_SILENT": "true",
    # Threads of a matrix product wait for each other spinning; where another process has a core,
    # the default of some milliseconds makes training up to 20 times slower than one thread.
    "GOMP_SPINCOUNT": "2000",
}
_EXTRAS = {
    "vllm": "vllm",
    "wandb": "wandb",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    config_class: type[Any] | str
    """Configuration dataclass, or ``module:Name`` to import it only when the command runs."""
    function: Callable[[Any], object] | str
    """Called with the configuration, or ``module:name``."""
    help: str
    """One line."""


def main(name: str, commands: Mapping[str, Command]) -> None:
    """Run the command that ``sys.argv`` names; ends the process on any error.

    Parameters
    ----------
    name : str
        The program, for messages.
    commands : mapping of str to Command
        In the order of the help text.
    """
    quiet_libraries()
    terminations: list[int] = []
    try:
        with _terminating_like_ctrl_c(terminations):
            _run(name, commands, sys.argv[1:])
    except InputError as error:
        _fail(name, str(error), 2)
    except GateError as error:
        _fail(name, str(error), 3)
    except KeyboardInterrupt:
        how, code = ("terminated", 143) if terminations else ("interrupted", 130)
        _fail(name, f"{how}; run the same command again to resume", code)
    except Exception as error:
        sentence = _machine_fault(error)
        if sentence is None:
            raise
        _fail(name, sentence, 1)


@contextmanager
def _terminating_like_ctrl_c(terminations: list[int]) -> Iterator[None]:
    """Pass SIGTERM to whoever handles Ctrl-C at that moment, and note it in the list."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def forward(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child: end as it would have without this handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        terminations.append(number)
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    with _handling_ctrl_c():
        before = signal.signal(signal.SIGTERM, forward)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _handling_ctrl_c() -> Iterator[None]:
    """See that there is a handler of Ctrl-C, even where it is ignored, and keep ignoring it.

    A script's background ignores Ctrl-C, and there asyncio would make no handler of its own. So it
    is blocked instead of ignored, which it does not notice.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def quiet_libraries() -> None:
    """Turn the libraries' own progress bars and notices off, unless the user asked for them.

    Works through environment variables, so it must run before those libraries are imported and
    imports none of them.
    """
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)


def parse(prog: str, config_class: type[Any], arguments: Sequence[str], *, text: str = "") -> Any:
    """Build a configuration from command-line arguments and an optional ``--config`` file.

    Parameters
    ----------
    prog : str
        Program and command, for the help page.
    config_class : type
        Configuration dataclass; nested dataclass fields get their flags without a prefix.
    arguments : sequence of str
        What follows the command's name.
    text : str, default=""
        What the command does, for the help page.

    Returns
    -------
    config_class
        Checked by its own ``__post_init__``.

    Raises
    ------
    InputError
        If the file is missing or malformed, or a value is refused by the configuration's checks.
    SystemExit
        After ``--help`` (code 0), and on unknown, missing or malformed flags (code 2).
    """
    import tyro

    path, rest = _take_config_flag(arguments)
    default = tyro.MISSING_NONPROP if path is None else _read_config(path, config_class)
    note = "Every flag can also stand in a YAML file given as --config FILE; flags override it."
    messages = io.StringIO()
    try:
        with redirect_stderr(messages):
            return tyro.cli(
                config_class,
                prog=prog,
                description=f"{text}\n\n{note}".strip(),
                args=rest,
                default=default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as end:
        refusal = _refusal(end)
        if refusal is not None:
            messages.truncate(0)
            raise InputError(str(refusal)) from refusal
        raise
    finally:
        sys.stderr.write(messages.getvalue())


def _run(name: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> None:
    """Find the command, build its configuration and call it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(name, commands), file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    chosen, *rest = arguments
    if chosen not in commands:
        raise InputError(
            f"unknown command {chosen!r}{_suggestion(chosen, commands)}; the commands are "
            f"{', '.join(commands)}"
        )
    command = commands[chosen]
    config_class = resolve(command.config_class)
    config = parse(f"{name} {chosen}", config_class, rest, text=command.help)
    resolve(command.function)(config)


def _overview(name: str, commands: Mapping[str, Command]) -> str:
    """Render the help page of the program."""
    width = max(len(command) for command in commands)
    lines = [f"usage: {name} COMMAND [--flag value ...]", "", "commands:"]
    lines += [f"  {command:<{width}}  {commands[command].help}" for command in commands]
    return "\n".join([*lines, "", f"`{name} COMMAND --help` explains a command's flags."])


def resolve(target: Any) -> Any:
    """Import what a ``module:name`` text names; return anything else as it is.

    Examples
    --------
    >>> resolve("trajectory.seeds:derive_seed").__name__
    'derive_seed'
    """
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _refusal(end: BaseException) -> ValueError | None:
    """Find the ValueError of a configuration's own checks behind the end of the parser."""
    error: BaseException | None = end
    while error is not None:
        if isinstance(error, ValueError) and any(
            frame.f_code.co_name == "__post_init__"
            for frame, _ in traceback.walk_tb(error.__traceback__)
        ):
            return error
        error = error.__context__
    return None


def _take_config_flag(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split ``--config FILE`` off the arguments."""
    path: Path | None = None
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            rest.append(argument)
            continue
        if not equals:
            value = next(remaining, "")
        if not value or path is not None:
            raise InputError("--config takes one YAML file, and is given at most once")
        path = Path(value)
    return path, rest


def _read_config(path: Path, config_class: type[Any]) -> Any:
    """Read a YAML file as defaults for a configuration (unchecked: flags may still change it)."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"the configuration {path} is not YAML: {text}") from error
    if not isinstance(content, dict):
        raise InputError(f"the configuration {path} must be a mapping of flags to values")
    values = dict(_flatten(content, config_class))
    valid = dict(_leaves(config_class))
    for key, value in values.items():
        if key not in valid:
            raise InputError(
                f"{path}: unknown key {key!r}{_suggestion(key, valid)}; the keys are "
                f"{', '.join(valid)}"
            )
        values[key] = _convert(path, key, value, valid[key])
    return _fill(config_class, values, None)


def _flatten(content: Mapping[Any, Any], config_class: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values; a mapping under the name of a nested configuration is opened."""
    hints = typing.get_type_hints(config_class)
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, dict):
            yield from _flatten(value, hints[name])
        else:
            yield name, value


def _leaves(config_class: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and type of every setting, nested ones without a prefix, as the flags are."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name])
        else:
            yield field.name, hints[field.name]


def _convert(path: Path, key: str, value: Any, hint: Any) -> Any:
    """Turn a YAML value into the setting's type."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{path}: {key}: {error.errors()[0]['msg']}, not {value!r}") from error


def _fill(config_class: Any, values: Mapping[str, Any], base: Any) -> Any:
    """Make a configuration without its checks: values, else defaults, else marked missing."""
    import tyro

    hints = typing.get_type_hints(config_class)
    config = object.__new__(config_class)
    for field in dataclasses.fields(config_class):
        if base is not None:
            default = getattr(base, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = tyro.MISSING
        if dataclasses.is_dataclass(hints[field.name]):
            inner = None if default is tyro.MISSING else default
            value = _fill(hints[field.name], values, inner)
        else:
            value = values.get(field.name, default)
        object.__setattr__(config, field.name, value)
    return config


def _suggestion(name: str, valid: Iterable[str]) -> str:
    """Name the nearest valid choice, if one is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _machine_fault(error: BaseException) -> str | None:
    """Say in a sentence what the machine lacks; None if that is not what went wrong."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        extra = _EXTRAS.get(package)
        if extra is not None:
            return f"this needs the package {package}: pip install 'toolprm[{extra}]'"
        return None
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: lower the batch or context size, then run the same command again"
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            return (
                f"no space left on the disk{_where(cause)}: what was finished is kept; free some "
                "and run the same command again"
            )
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission{_where(cause)}"
        cause = cause.__cause__ or cause.__context__
    return None


def _where(error: BaseException) -> str:
    """Name the file an operating-system error is about."""
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""


def _fail(name: str, sentence: str, code: int) -> NoReturn:
    """Print one sentence and end the process."""
    print(f"{name}: {sentence}", file=sys.stderr)  # noqa: T201 - this is the output
    raise SystemExit(code)
