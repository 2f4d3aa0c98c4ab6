"""Every flag of `prm` and `policy` is pinned: a change of the surface is a change of a file.

After an intended change: UPDATE_GOLDEN=1 python -m pytest tests/test_cli_surface.py
"""

import dataclasses
import importlib
import os
import typing
from collections.abc import Iterator

import pytest

from trajectory.command import resolve

MAX_FIELDS = 20
PROGRAMS = ("prm", "policy")


def commands() -> list[tuple[str, typing.Any]]:
    """Name and row of every command."""
    tables = {program: importlib.import_module(f"{program}.cli").COMMANDS for program in PROGRAMS}
    return [
        (f"{program} {name}", command)
        for program, table in tables.items()
        for name, command in table.items()
    ]


def flags(config_class: type) -> Iterator[str]:
    """One line per flag: name, type, default; nested configurations have no prefix."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from flags(hint)
            continue
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        name = hint.__name__ if isinstance(hint, type) else str(hint)
        for package in ("typing.", "pathlib.", "collections.abc."):
            name = name.replace(package, "")
        yield f"  --{field.name.replace('_', '-')}  {name}  {default}"


def own_fields(config_class: type) -> int:
    """Number of settings, a nested configuration counting as one."""
    return len(dataclasses.fields(config_class))


def test_the_flags_are_the_recorded_ones(repository):
    path = repository / "tests" / "golden" / "cli_surface.txt"
    lines = []
    for name, command in commands():
        lines += [name, *flags(resolve(command.config_class)), ""]
    found = "\n".join(lines)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_resolves_and_is_documented(name, command):
    config_class = resolve(command.config_class)
    assert callable(resolve(command.function))
    assert command.help.endswith(".")
    assert own_fields(config_class) <= MAX_FIELDS
    leaves = [line.split()[0] for line in flags(config_class)]
    assert len(set(leaves)) == len(leaves), "two nested settings share a flag"
    assert "--config" not in leaves
