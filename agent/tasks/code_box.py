"""The program in the two boxes of the hidden-test checker: calls and values travel as JSON text.

Sent to a sandbox as source, so it imports nothing of this project. In one box it runs the
candidate (`load_candidate`, `answer_call`), in the other the tests (`load_tests`, `run_tests`),
where the tested functions are stand-ins that know only the replies they were given. A value
becomes JSON as itself, or, where JSON has no such type, as an object with one tag: ``tuple``,
``set``, ``frozenset``, ``dict`` (a list of pairs), ``complex``, ``bytes``, ``type`` (a built-in
one); arguments may also be ``name`` and ``call``, objects that exist only beside the candidate.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout

MAX_CALLS = 300
"""Different calls that the tests of one task may make."""
UNFIT = ("StopIteration", "StopAsyncIteration", "ExceptionGroup")
"""Exceptions that are not passed on to the tests."""
Code = dict[str, object]


class Unsupported(TypeError):
    """A value of a type that does not travel; its text is the type's name."""


class Stop(BaseException):
    """Ends the tests: nothing that follows could count."""


class Elsewhere:
    """What stands, among the tests, for an object that exists beside the candidate."""

    def __init__(self, code: Code) -> None:
        self.code = code


def encode(value: object) -> object:
    """Return what `json.dumps` can write; subclasses of plain types become plain.

    Raises
    ------
    Unsupported
        If it is, or holds, anything else.

    Examples
    --------
    >>> encode({"a": (1, 2.5)})
    {'dict': [['a', {'tuple': [1, 2.5]}]]}
    """
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]  # a scalar
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    return encode_rare(value)


def encode_rare(value: object) -> object:
    """Return what `encode` does for a value that is neither common nor a collection."""
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, Elsewhere):
        return value.code
    name = getattr(value, "__name__", "")
    if isinstance(value, type) and vars(builtins).get(name) is value:
        return {"type": name}
    raise Unsupported(type(value).__name__)


def decode(value: object, names: Mapping[str, Callable[..., object]] | None = None) -> object:
    """Return the value that was encoded; ``names`` are the objects beside the candidate.

    Examples
    --------
    >>> decode({"dict": [["a", {"tuple": [1, 2.5]}]]})
    {'a': (1, 2.5)}
    """
    if isinstance(value, list):
        return [decode(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    if tag == "bytes":
        return bytes.fromhex(body)
    if tag == "type":
        return {n: kind for n, kind in vars(builtins).items() if isinstance(kind, type)}[body]
    if names is not None and tag == "name":
        return names[body]
    if names is not None and tag == "call":
        name, arguments, options = body
        keywords = {key: decode(item, names) for key, item in options.items()}
        return names[name](*[decode(item, names) for item in arguments], **keywords)
    items = [decode(item, names) for item in body]
    if tag == "dict":
        return dict(items)  # type: ignore[arg-type]
    if tag == "complex":
        return complex(*items)  # type: ignore[call-overload]
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](items)


def call_code(name: str, arguments: tuple[object, ...], options: dict[str, object]) -> Code:
    """Return a call as it travels."""
    keywords = {key: encode(item) for key, item in options.items()}
    return {"call": [name, [encode(item) for item in arguments], keywords]}


class Candidate:
    """The box of the candidate: its module, and nothing about the tests."""

    def __init__(self, sources: str) -> None:
        self.module = types.ModuleType("solution")
        sys.modules["solution"] = self.module
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            for source in json.loads(sources):
                exec(compile(source, "solution.py", "exec"), vars(self.module))  # noqa: S102

    def reply(self, call: str, mark: str) -> None:
        """Make one call and print, after ``mark``, its value or the classes of what it raised."""
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            try:
                value = decode(json.loads(call), vars(self.module))
                text = json.dumps({"value": encode(value)})
            except Unsupported as problem:
                text = json.dumps({"unsupported": str(problem)})
            except BaseException as error:
                text = json.dumps({"raised": [kind.__name__ for kind in type(error).__mro__]})
        print(mark + text)  # noqa: T201


class Judge:
    """The box of the tests: all about them, and nothing of the candidate."""

    def __init__(self, hidden: str) -> None:
        self.hidden = json.loads(hidden)
        self.replies: dict[str, dict[str, object]] = {}
        self.rehearsal = False
        self.needed: list[str] = []
        """Calls whose replies are not known."""
        self.unknown = 0
        """How often such calls were made; a loop may wait for a value that never comes."""
        self.spoiled = False
        """Whether a reply was used that nothing can be right with."""
        self.odd = ""
        """Type of an argument that does not travel."""

    def run(self, replies: str, mark: str, *, rehearsal: bool = False) -> None:
        """Run the tests on these replies and print, after ``mark``, how they ended.

        In a rehearsal assertions are not insisted on and unknown values are stand-ins: it finds
        out most of the calls at once. Its result counts for nothing else.
        """
        self.replies, self.rehearsal = json.loads(replies), rehearsal
        names: dict[str, object] = {"__name__": "tests"}
        ended = "passed"
        try:
            exec(self.hidden["setup"], names)  # noqa: S102
            names |= {name: self._function(name) for name in self.hidden["functions"]}
            names |= {name: self._constructor(name) for name in self.hidden["constructors"]}
            names |= {name: Elsewhere({"name": name}) for name in self.hidden["objects"]}
            tree = ast.parse(self.hidden["tests"])
            if rehearsal:
                tree = ast.fix_missing_locations(Forgiving().visit(tree))
            exec(compile(tree, "tests.py", "exec"), names)  # noqa: S102
        except BaseException as error:
            ended = type(error).__name__
        if ended == "passed" and (self.needed or self.spoiled or self.odd):
            ended = "stopped"
        result = {"ended": ended, "needed": self.needed, "odd": self.odd}
        print(mark + json.dumps(result))  # noqa: T201

    def _function(self, name: str) -> Callable[..., object]:
        """Return the stand-in of a tested function."""

        def function(*arguments: object, **options: object) -> object:
            try:
                call = json.dumps(call_code(name, arguments, options))
            except Unsupported as problem:
                self.odd = str(problem)
                raise Stop from problem
            return self._value(call)

        return function

    def _constructor(self, name: str) -> Callable[..., object]:
        """Return the stand-in of a class that exists beside the candidate."""
        return lambda *arguments, **options: Elsewhere(call_code(name, arguments, options))

    def _value(self, call: str) -> object:
        """Return, or raise, what the candidate gave for a call."""
        reply = self.replies.get(call)
        if reply is None:
            if call not in self.needed:
                self.needed.append(call)
            self.unknown += 1
            if self.rehearsal and self.unknown < MAX_CALLS:
                return object()
            raise Stop
        if "raised" in reply:
            raise self._exception(reply["raised"])
        try:
            return decode(reply["value"])
        except Exception as error:  # a call that failed, or an unhashable member of a set
            self.spoiled = True
            raise Stop from error

    def _exception(self, names: object) -> BaseException:
        """Return the nearest built-in exception that a test may expect.

        StopIteration and its like would end a loop of the tests without an error.
        """
        for name in names if isinstance(names, list) else ():
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception) and name not in UNFIT:
                return kind.__new__(kind, "raised by the candidate")
        self.spoiled = True
        return Stop()


class Forgiving(ast.NodeTransformer):
    """Turns each assertion into an evaluation whose errors are passed over."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Replace ``assert x`` by ``try: x`` with a bare ``except: pass``."""
        handler = ast.ExceptHandler(type=None, name=None, body=[ast.Pass()])
        body: list[ast.stmt] = [ast.Expr(node.test)]
        return ast.Try(body=body, handlers=[handler], orelse=[], finalbody=[])
