"""Records to JSON objects and back: generic over frozen dataclasses, strict about every field.

Supported field types: ``str int float bool None``, string enums, ``Literal``, ``tuple[X, ...]``,
``Mapping[str, X]``, ``X | None``, nested record classes, and `JsonValue` where a record says so.
A field with a default may be missing (files of an older minor version); an unknown field, a
missing required one or a wrong type is an error that names the place.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

from trajectory.records import JsonValue

RecordT = TypeVar("RecordT")

_Convert = Callable[[Any], Any]


def to_json(record: object) -> dict[str, JsonValue]:
    """Turn a record into a JSON object holding every field.

    Examples
    --------
    >>> from trajectory.records import ToolCall
    >>> to_json(ToolCall(name="calculator", arguments="{}"))
    {'name': 'calculator', 'arguments': '{}'}
    """
    cls: Any = type(record)
    encoded: dict[str, JsonValue] = _encoder(cls)(record)
    return encoded


def from_json(cls: type[RecordT], obj: object) -> RecordT:
    """Build a record from a JSON object.

    Raises
    ------
    ValueError
        If a field is unknown, missing or of the wrong type, or an invariant of the record fails;
        the message names the place, for example ``steps[2].calls[0].name``.

    Examples
    --------
    >>> from trajectory.records import ToolCall
    >>> from_json(ToolCall, {"name": "calculator", "arguments": "{}"})
    ToolCall(name='calculator', arguments='{}')
    """
    target: Any = cls
    record: RecordT = _decoder(target)(obj)
    return record


class _FieldError(ValueError):
    """A decoding error that collects the path to the field on its way up."""

    def __init__(self, message: str, path: str = "") -> None:
        self.message, self.path = message, path
        super().__init__(f"{path}: {message}" if path else message)

    def under(self, name: str) -> _FieldError:
        """Return the same error seen from one level further out."""
        joint = "" if not self.path or self.path.startswith("[") else "."
        return _FieldError(self.message, f"{name}{joint}{self.path}")


def _describe(value: object) -> str:
    """Say what a JSON value is, shortly."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _same(value: Any) -> Any:
    """Return a value that is its own JSON form."""
    return value


@cache
def _encoder(hint: Hashable) -> _Convert:
    """Compile the encoder of one type."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        columns = [(f.name, _encoder(hints[f.name])) for f in fields(hint)]
        return lambda record: {name: encode(getattr(record, name)) for name, encode in columns}
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        item = _encoder(args[0])
        return list if item is _same else lambda values: [item(v) for v in values]
    if origin in (typing.Union, types.UnionType) and not _is_json(hint):
        inner = _encoder(_optional(hint))
        return _same if inner is _same else lambda v: None if v is None else inner(v)
    if origin is not None and _is_mapping(origin):
        value = _encoder(args[1])
        return dict if value is _same else lambda m: {k: value(v) for k, v in m.items()}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return lambda v: v.value
    return _same


@cache
def _decoder(hint: Hashable) -> _Convert:
    """Compile the strict decoder of one type."""
    if is_dataclass(hint):
        return _record_decoder(hint)
    origin, args = get_origin(hint), get_args(hint)
    if _is_json(hint):
        return _same
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _tuple_decoder(args[0])
    if origin in (typing.Union, types.UnionType):
        inner = _decoder(_optional(hint))
        return lambda v: None if v is None else inner(v)
    if origin is Literal:
        return _choice_decoder(args)
    if origin is not None and _is_mapping(origin) and args[0] is str:
        return _mapping_decoder(args[1])
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_decoder(hint)
    if hint is float:
        return _decode_float
    if hint in (str, int, bool):
        return _plain_decoder(hint)
    raise TypeError(f"records cannot hold fields of type {hint}")


def _record_decoder(cls: Any) -> _Convert:
    """Compile the decoder of a record class."""
    hints = typing.get_type_hints(cls)
    decoders = {f.name: _decoder(hints[f.name]) for f in fields(cls)}
    required = {
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING
    }

    def decode(obj: Any) -> Any:
        if type(obj) is not dict:
            raise _FieldError(f"expected an object ({cls.__name__}), got {_describe(obj)}")
        values = {}
        for name, value in obj.items():
            convert = decoders.get(name)
            if convert is None:
                known = ", ".join(decoders)
                raise _FieldError(f"unknown field {name!r} of {cls.__name__} (its fields: {known})")
            try:
                values[name] = convert(value)
            except _FieldError as error:
                raise error.under(name) from None
        if not required <= values.keys():
            missing = ", ".join(sorted(required - values.keys()))
            raise _FieldError(f"missing field {missing} of {cls.__name__}")
        try:
            return cls(**values)
        except ValueError as error:
            raise _FieldError(str(error)) from error

    return decode


def _tuple_decoder(item: Any) -> _Convert:
    """Compile the decoder of ``tuple[item, ...]``; plain items are checked all at once."""
    convert = _decoder(item)
    plain = {item} if item in (str, int) else None

    def decode(values: Any) -> Any:
        if type(values) is not list:
            raise _FieldError(f"expected a list, got {_describe(values)}")
        if plain is not None and plain.issuperset(map(type, values)):
            return tuple(values)
        result = []
        for index, value in enumerate(values):
            try:
                result.append(convert(value))
            except _FieldError as error:
                raise error.under(f"[{index}]") from None
        return tuple(result)

    return decode


def _mapping_decoder(item: Any) -> _Convert:
    """Compile the decoder of ``Mapping[str, item]``."""
    convert = _decoder(item)

    def decode(obj: Any) -> Any:
        if type(obj) is not dict:
            raise _FieldError(f"expected an object, got {_describe(obj)}")
        if convert is _same:
            return obj
        result = {}
        for key, value in obj.items():
            try:
                result[key] = convert(value)
            except _FieldError as error:
                raise error.under(key) from None
        return result

    return decode


def _choice_decoder(choices: tuple[Any, ...]) -> _Convert:
    """Compile the decoder of ``Literal[choices]``."""

    def decode(value: Any) -> Any:
        if not any(value == c and type(value) is type(c) for c in choices):
            raise _FieldError(f"expected one of {', '.join(map(repr, choices))}, got {value!r}")
        return value

    return decode


def _enum_decoder(cls: type[StrEnum]) -> _Convert:
    """Compile the decoder of a string enum."""
    members = {member.value: member for member in cls}

    def decode(value: Any) -> Any:
        member = members.get(value) if type(value) is str else None
        if member is None:
            raise _FieldError(f"expected one of {', '.join(members)}, got {value!r}")
        return member

    return decode


def _plain_decoder(cls: type) -> _Convert:
    """Compile the decoder of ``str``, ``int`` or ``bool`` (a bool is no int)."""

    def decode(value: Any) -> Any:
        if type(value) is not cls:
            raise _FieldError(f"expected {cls.__name__}, got {_describe(value)}")
        return value

    return decode


def _decode_float(value: Any) -> float:
    """Decode a finite number; JSON written by others may say ``1`` for ``1.0``."""
    if type(value) is int:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise _FieldError(f"expected a finite number, got {_describe(value)}")
    return value


def _is_json(hint: Any) -> bool:
    """Tell whether a type is `JsonValue`, the only one with lists and objects in a union."""
    return any(get_origin(a) is list for a in get_args(hint))


def _optional(hint: Any) -> Any:
    """Return ``X`` of ``X | None``."""
    inner = [a for a in get_args(hint) if a is not type(None)]
    if len(inner) != 1:
        raise TypeError(f"records cannot hold fields of type {hint}")
    return inner[0]


def _is_mapping(origin: Any) -> bool:
    """Tell whether a generic origin is a mapping type."""
    return isinstance(origin, type) and issubclass(origin, Mapping)
