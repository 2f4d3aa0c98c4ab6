"""The execution oracle: what a run itself tells of every call, without a model's opinion.

A call ``failed``, or it succeeded and its result was ``unused``, or it succeeded and was used
(``ok``). Nothing here looks at whether the call was the right one to make.

A result counts as used if one of these holds (the numbers of the rule are those of the code):

1. One of its *values* stands in a later turn's text, in a later call's arguments or in the answer.
   Values are numbers (sign dropped, ``9.0`` = ``9``, ``1,234`` = ``1234``; a number with decimals
   also appears where it is rounded), quoted texts of two characters or more, and identifiers
   (words with a digit, an underscore or a capital inside). Letter case is ignored.
2. One of its *new words* does: words of three letters or more that stood neither in the problem
   nor in any turn or result before. Common function words do not count.
3. The call ran Python code that bound a name which a later piece of code reads before binding it
   anew. So a cell that prints nothing can be used.
4. The tool is one whose result is the state it leaves (`STATE_TOOLS`).

Limits: a number may reappear by chance or because it stood in the problem, so ``ok`` is lenient;
``unused`` is strict, but misses paraphrase ("a dozen" for 12, "25 %" for 0.25, "valid" for True)
and conclusions drawn from what a result does not show. Whether names are read is decided cell by
cell, without following functions or branches.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from enum import StrEnum

from trajectory.records import JsonValue, Step, ToolCall, Trajectory

STATE_TOOLS = frozenset({"blocks", "countdown"})
"""Tools whose successful call is its own use: what they change is what is judged in the end."""

_NUMBER = re.compile(
    r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
)
_QUOTED = re.compile(r"""(?<!\w)(?:"([^"\n]{2,80})"|'([^'\n]{2,80})')(?!\w)""")
_WORD = re.compile(r"\w*[^\W\d_]\w*")
_INNER_CAPITAL = re.compile(r"[a-z][A-Z]")
_NOTICE = re.compile(r"\s*\(no [^()]*\)\s*")
"""What tools say instead of an empty result; its words are no values."""
_MOST_DIGITS = 25
"""Longer numbers are not rounded: the default precision of decimals is 28 digits."""
_COMMON = (
    "the and for are was were with this that these those from not has have had you your its but "
    "all any can will would there then than now out into per each our their his her she they been "
    "being does did done result results output value values answer none null"
)
_FUNCTION_WORDS = frozenset(_COMMON.split())


class CallVerdict(StrEnum):
    """What became of a call."""

    FAILED = "failed"
    """Its observation is an error."""
    UNUSED = "unused"
    """It succeeded, and its result never appears later."""
    OK = "ok"
    """It succeeded, and its result was used."""


VALUES = {CallVerdict.FAILED: -1, CallVerdict.UNUSED: 0, CallVerdict.OK: 1}
"""The verdict as a ternary value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOracle:
    """What the oracle says of one step."""

    step: int
    """1..S."""
    calls: tuple[CallVerdict | None, ...]
    """Per call; None where a cut-off run had no turn left to use the result in."""
    verdict: CallVerdict | None
    """``failed`` if any call failed, else ``ok`` if any was used, else ``unused``; None for a
    step without calls, or if nothing is known of any of them."""

    @property
    def value(self) -> int | None:
        """The verdict as -1, 0 or +1."""
        return None if self.verdict is None else VALUES[self.verdict]


def execution_oracle(
    trajectory: Trajectory, *, state_tools: frozenset[str] = STATE_TOOLS
) -> tuple[StepOracle, ...]:
    """Judge every call of a trajectory by its observation and by what follows.

    Parameters
    ----------
    trajectory : Trajectory
        With S steps.
    state_tools : frozenset of str, default=STATE_TOOLS
        Tools whose result is the state they leave (rule 4 of the module).

    Returns
    -------
    tuple of StepOracle, length S

    Examples
    --------
    >>> from trajectory.records import Observation, StopReason, Task
    >>> def call(expression, result, error=None):
    ...     return Step(
    ...         text="...", calls=(ToolCall(name="calculator", arguments=expression),),
    ...         observations=(Observation(content=result, error=error),),
    ...     )
    >>> run = Trajectory(
    ...     trajectory_id="a", stop=StopReason.ANSWERED, outcome=1.0, answer="12",
    ...     task=Task(task_id="t", domain="math", prompt="3 * 4?", answer="12"),
    ...     steps=(call("3 *", "syntax", "SyntaxError"), call("3 + 4", "7"), call("3 * 4", "12.0"),
    ...            Step(text="It is 12.")),
    ... )
    >>> [step.value for step in execution_oracle(run)]
    [-1, 0, 1, None]
    """
    steps = trajectory.steps
    turns = [_turn_text(step) for step in steps]
    known = {word for word, _ in _words(trajectory.task.prompt)}
    found = []
    for index, step in enumerate(steps):
        later = "\n".join([*turns[index + 1 :], trajectory.answer or ""])
        known |= {word for word, _ in _words(turns[index])}
        # A limit or a broken machine may end a run right after a call: unused says nothing then.
        open_end = index + 1 == len(steps) and not trajectory.stop.judged
        calls = tuple(
            None
            if open_end and step.observations[i].error is None
            else _verdict(steps, index, i, later=later, known=known, state_tools=state_tools)
            for i in range(len(step.calls))
        )
        for observation in step.observations:
            known |= {word for word, _ in _words(observation.content)}
        found.append(StepOracle(step=index + 1, calls=calls, verdict=_of_step(calls)))
    return tuple(found)


def _of_step(calls: Sequence[CallVerdict | None]) -> CallVerdict | None:
    """Combine the verdicts of a step's calls."""
    for verdict in (CallVerdict.FAILED, CallVerdict.OK, CallVerdict.UNUSED):
        if verdict in calls:
            return verdict
    return None


def _verdict(
    steps: Sequence[Step],
    index: int,
    call_index: int,
    *,
    later: str,
    known: set[str],
    state_tools: frozenset[str],
) -> CallVerdict:
    """Judge one call."""
    call = steps[index].calls[call_index]
    observation = steps[index].observations[call_index]
    if observation.error is not None:
        return CallVerdict.FAILED
    used = (
        call.name in state_tools
        or appears(observation.content, later, known=known)
        or _names_read(call, _calls_after(steps, index, call_index))
    )
    return CallVerdict.OK if used else CallVerdict.UNUSED


def appears(result: str, later: str, *, known: set[str] | frozenset[str] = frozenset()) -> bool:
    """Tell whether something of a result stands in a later text (rules 1 and 2 of the module).

    Parameters
    ----------
    result : str
        Content of an observation.
    later : str
        Everything the agent wrote afterwards.
    known : set of str
        Words, in lower case, that stood somewhere before the result.

    Examples
    --------
    >>> appears("total 9.0", "so 9 bolts"), appears("9.0", "so 90 bolts"), appears("", "9")
    (True, False, False)
    >>> appears("0.6666666666666666", "about 0.67"), appears("city: Oslo", "It is Oslo")
    (True, True)
    """
    if _NOTICE.fullmatch(result):
        return False
    if {n for text in _NUMBER.findall(result) for n in _roundings(text)} & {
        _decimal(text) for text in _NUMBER.findall(later)
    }:
        return True
    words_later = {word for word, _ in _words(later)}
    if any(
        word in words_later and (is_identifier or _is_new(word, known))
        for word, is_identifier in _words(result)
    ):
        return True
    quoted = (double or single for double, single in _QUOTED.findall(result))
    return any(_stands_in(text, later) for text in quoted)


def _is_new(word: str, known: set[str] | frozenset[str]) -> bool:
    """Tell whether a plain word counts as a result's own."""
    return len(word) >= 3 and word not in known and word not in _FUNCTION_WORDS


def _words(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the words of a text in lower case, and whether each is an identifier."""
    for word in _WORD.findall(text):
        inner = word.strip("_")
        marked = "_" in inner or any(c.isdigit() for c in word)
        yield word.casefold(), len(inner) >= 2 and (marked or bool(_INNER_CAPITAL.search(word)))


def _stands_in(quoted: str, later: str) -> bool:
    """Tell whether a quoted text stands in a later text as whole words."""
    body = re.escape(quoted.strip().casefold())
    return bool(body) and bool(re.search(rf"(?<!\w){body}(?!\w)", later.casefold()))


def _decimal(text: str) -> Decimal:
    """Read a number of `_NUMBER`."""
    return Decimal(text.replace(",", ""))


def _roundings(text: str) -> set[Decimal]:
    """Return a number and what it is rounded to at fewer decimals."""
    number = _decimal(text)
    fraction = text.partition(".")[2]
    if not fraction.isdigit() or len(text) > _MOST_DIGITS:
        return {number}
    return {number} | {
        number.quantize(Decimal(1).scaleb(-places), rounding=how)
        for places in range(len(fraction))
        for how in (ROUND_HALF_UP, ROUND_HALF_EVEN)
    }


def _turn_text(step: Step) -> str:
    """Return what the agent wrote in a step, arguments with their escapes resolved."""
    return "\n".join([step.text, *(_arguments_text(call) for call in step.calls)])


def _arguments_text(call: ToolCall) -> str:
    """Return the values in a call's arguments as text."""
    value = _arguments(call)
    return call.arguments if value is None else "\n".join(_leaves(value))


def _arguments(call: ToolCall) -> JsonValue:
    """Read a call's arguments; None if they are not JSON."""
    try:
        value: JsonValue = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return None
    return value


def _leaves(value: JsonValue) -> Iterator[str]:
    """Yield keys and scalar values as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield str(value)


def _calls_after(steps: Sequence[Step], index: int, call_index: int) -> Iterator[ToolCall]:
    """Yield the calls made after a call, those of its own turn included."""
    yield from steps[index].calls[call_index + 1 :]
    for step in steps[index + 1 :]:
        yield from step.calls


def _names_read(call: ToolCall, later: Iterator[ToolCall]) -> bool:
    """Tell whether later code reads a name that this call's code bound (rule 3 of the module)."""
    live = {name for statement in _code(call) for name in _bound(statement)}
    for following in later:
        for statement in _code(following):
            if not live:
                return False
            if live & _read(statement):
                return True
            if isinstance(statement, _SURE):
                live -= _bound(statement)
    return False


_SURE = (
    *(ast.Assign, ast.Import, ast.ImportFrom),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
)
"""Statements that bind their names whenever they run; a branch or a loop may not."""
_OWN_SCOPE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _code(call: ToolCall) -> list[ast.stmt]:
    """Parse the code of a Python call; none for other calls and code that does not parse."""
    arguments = _arguments(call) if call.name == "python" else None
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the agent's code, such as invalid escapes
        try:
            return ast.parse(code).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds outside functions."""
    names: set[str] = set()
    stack: list[ast.AST] = [statement]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, _OWN_SCOPE):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        stack.extend(ast.iter_child_nodes(node))
    return names


def _read(statement: ast.stmt) -> set[str]:
    """Return the names that a statement reads, ``x += 1`` included."""
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names
