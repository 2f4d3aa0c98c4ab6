"""Generated word problems: a chain of dependent operations on one running quantity.

A problem is drawn from a seed alone and never changes: only ``random.Random.random`` is used,
whose sequence Python guarantees. Text and gold program come from the same draw, so the program is
right by construction. All wording lives here, so the vocabulary is closed (`wording`). Operations
carry the number of their day; irrelevant sentences do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from trajectory.records import JsonValue

Item = TypeVar("Item")
Drawn = tuple[str, tuple[int, ...], int]
"""Kind, operands and the value after it."""

MOST_OPERATIONS = 16
LARGEST_VALUE = 9999
"""No running value exceeds this, so that numbers stay short in tokens."""
NAMES = (
    ("Mia", "She"),
    ("Tom", "He"),
    ("Ana", "She"),
    ("Ben", "He"),
    ("Eva", "She"),
    ("Leo", "He"),
    ("Zoe", "She"),
    ("Max", "He"),
)
THINGS = ("apples", "coins", "books", "cards", "eggs", "pens")
VERBS: Mapping[str, tuple[str, ...]] = {
    "gain": ("buys", "finds", "wins"),
    "lose": ("sells", "loses", "drops"),
}
PACKS = ("boxes", "bags")
DISTRACTORS = ("{who} walks {n} miles", "{who} waits {n} minutes", "{who} is {n} years old")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of operation."""

    expression: str
    """Calculator expression; ``{x}`` is the running value, ``{a}`` and ``{b}`` the operands."""
    wrong_operator: str
    """The same with the operator most easily confused with the right one."""
    phrase: str
    """Sentence without day, thing and full stop."""
    difficulty: float
    """How easily it is misread, in [0, 1]; scales the slip rate of the weak demonstrator."""
    switches: bool = False
    """Whether the running quantity passes on to another person."""


KINDS: Mapping[str, Kind] = {
    "gain": Kind(
        expression="{x}+{a}", wrong_operator="{x}-{a}", phrase="{who} {verb} {a}", difficulty=0.0
    ),
    "lose": Kind(
        expression="{x}-{a}", wrong_operator="{x}+{a}", phrase="{who} {verb} {a}", difficulty=0.0
    ),
    "gain_packs": Kind(
        expression="{x}+{a}*{b}",
        wrong_operator="{x}+{a}+{b}",
        phrase="{who} {verb} {a} {pack} of {b}",
        difficulty=0.7,
    ),
    "lose_packs": Kind(
        expression="{x}-{a}*{b}",
        wrong_operator="{x}-{a}-{b}",
        phrase="{who} {verb} {a} {pack} of {b}",
        difficulty=0.9,
    ),
    "times": Kind(
        expression="{x}*{a}",
        wrong_operator="{x}+{a}",
        phrase="{other} has {a} times as many",
        difficulty=0.8,
        switches=True,
    ),
    "twice": Kind(
        expression="{x}*2",
        wrong_operator="{x}+2",
        phrase="{other} has twice as many",
        difficulty=0.9,
        switches=True,
    ),
    "half": Kind(
        expression="{x}/2",
        wrong_operator="{x}-2",
        phrase="{other} has half as many",
        difficulty=1.0,
        switches=True,
    ),
}
EASY = ("gain", "lose")
HARD = tuple(name for name in KINDS if name not in EASY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dials:
    """What makes a problem hard."""

    operations: tuple[int, int] = (2, 5)
    """Fewest and most dependent operations, within 2-16."""
    distractors: tuple[int, int] = (0, 1)
    """Fewest and most irrelevant sentences, within 0-4."""
    hard: float = 0.5
    """Mean share of operations of an easily misread kind, in [0, 1]; the share of a single problem
    is spread around it, so that some problems have none."""
    numbers: int = 9
    """Largest operand, within 5-999."""
    deceptive: float = 0.0
    """Share of problems with a shortcut: the wrong operator gives the right result there
    (2 + 2 for twice 2, 4 - 2 for half of 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation of a gold program."""

    kind: str
    operands: tuple[int, ...]
    """Numbers as the sentence gives them."""
    phrase: str
    """The sentence without thing and full stop: the thought that goes with the call."""
    value: int
    """Running value after it."""

    def expression(self, x: str | int, *, template: str | None = None) -> str:
        """Write the calculator expression that applies it to ``x``.

        Examples
        --------
        >>> op = Operation(kind="times", operands=(3,), phrase="Tom has 3 times as many", value=36)
        >>> op.expression(12), op.expression(12, template=KINDS["times"].wrong_operator)
        ('12*3', '12+3')
        """
        numbers = dict(zip("ab", self.operands, strict=False))
        return (template or KINDS[self.kind].expression).format(x=x, **numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A text and the program that solves it."""

    text: str
    start: int
    operations: tuple[Operation, ...]
    distractors: tuple[int, ...]
    """Numbers in the irrelevant sentences."""
    shortcut: int | None
    """Index of the operation whose wrong operator gives the right result; None if honest."""

    @property
    def values(self) -> tuple[int, ...]:
        """Running values before, between and after the operations; all different."""
        return (self.start, *(operation.value for operation in self.operations))

    def to_meta(self) -> dict[str, JsonValue]:
        """Return the gold program as JSON (all but the text)."""
        return {
            "start": self.start,
            "operations": [
                {
                    "kind": op.kind,
                    "operands": list(op.operands),
                    "phrase": op.phrase,
                    "value": op.value,
                }
                for op in self.operations
            ],
            "distractors": list(self.distractors),
            "shortcut": self.shortcut,
        }


def _pick(rng: Random, items: Sequence[Item]) -> Item:
    """Choose uniformly, by `Random.random` only."""
    return items[int(rng.random() * len(items))]


def _between(rng: Random, low: int, high: int) -> int:
    """Choose an integer of ``[low, high]`` uniformly."""
    return low + int(rng.random() * (high - low + 1))


def _apply(kind: str, x: int, operands: Sequence[int]) -> int | None:
    """Return the new running value, or None where it is not an exact integer."""
    a = operands[0] if operands else 2
    if kind == "half":
        return x // 2 if x % 2 == 0 else None
    size = a * operands[1] if len(operands) == 2 else a
    if kind in ("times", "twice"):
        return x * size
    return x + size if kind.startswith("gain") else x - size


def _operands(rng: Random, kind: str, numbers: int) -> tuple[int, ...]:
    """Draw the operands of one kind."""
    if kind in ("twice", "half"):
        return ()
    if kind == "times":
        return (_between(rng, 3, 5),)
    if kind.endswith("packs"):
        return (_between(rng, 2, 5), _between(rng, 3, max(5, min(9, numbers // 2))))
    return (_between(rng, 2, numbers),)


def _draw_operation(
    rng: Random, dials: Dials, *, hard: float, start: int, chain: Sequence[Drawn], may_switch: bool
) -> Drawn | None:
    """Draw an operation that keeps values short, different and free of accidental shortcuts."""
    values = [start, *(value for _, _, value in chain)]
    x = values[-1]
    for _ in range(50):
        kind = _pick(rng, HARD if rng.random() < hard else EASY)
        operands = _operands(rng, kind, dials.numbers)
        value = _apply(kind, x, operands)
        if (
            value is not None
            and 2 <= value <= min(LARGEST_VALUE, 50 * dials.numbers)
            and value not in values
            and (kind, x) not in (("twice", 2), ("half", 4))
            and (may_switch or not KINDS[kind].switches)
        ):
            return kind, operands, value
    return None


def _draw_shortcut(rng: Random, values: Sequence[int], *, leads: bool) -> Drawn | None:
    """Draw the operation that leads to 2 or 4, or the one where twice or half then misleads."""
    x = values[-1]
    if not leads:
        value = 4 if x == 2 else 2
        return None if value in values else ("twice" if x == 2 else "half", (), value)
    target = _pick(rng, (2, 4))
    return None if x <= target or target in values else ("lose", (x - target,), target)


def _draw_chain(
    rng: Random, dials: Dials, *, count: int, shortcut: int | None
) -> tuple[int, list[Drawn]] | None:
    """Draw a start value and ``count`` operations; None if the draw met a dead end."""
    hard = min(1.0, 2 * dials.hard * rng.random())
    start = _between(rng, 3, dials.numbers)
    chain: list[Drawn] = []
    for index in range(count):
        if shortcut is not None and index in (shortcut - 1, shortcut):
            values = [start, *(value for _, _, value in chain)]
            drawn = _draw_shortcut(rng, values, leads=index < shortcut)
        else:
            switches = sum(KINDS[kind].switches for kind, _, _ in chain)
            may_switch = switches < len(NAMES) - (1 if shortcut is None else 2)
            drawn = _draw_operation(
                rng, dials, hard=hard, start=start, chain=chain, may_switch=may_switch
            )
        if drawn is None:
            return None
        chain.append(drawn)
    return start, chain


def draw_problem(rng: Random, dials: Dials) -> Problem:
    """Draw one problem.

    Examples
    --------
    >>> problem = draw_problem(Random(1), Dials(operations=(2, 2), distractors=(0, 0)))
    >>> len(problem.operations), problem.text.endswith("?")
    (2, True)
    """
    count = _between(rng, *dials.operations)
    shortcut = _between(rng, 1, count - 1) if rng.random() < dials.deceptive else None
    while True:
        drawn = _draw_chain(rng, dials, count=count, shortcut=shortcut)
        if drawn is not None:
            return _tell(rng, dials, *drawn, shortcut)


def _tell(
    rng: Random,
    dials: Dials,
    start: int,
    chain: Sequence[Drawn],
    shortcut: int | None,
) -> Problem:
    """Put a chain of operations into words, with irrelevant sentences between them."""
    unused = list(NAMES)
    person = unused.pop(int(rng.random() * len(unused)))
    thing = _pick(rng, THINGS)
    pronouns = [person[1]]
    sentences = [f"{person[0]} has {start} {thing}."]
    operations = []
    for day, (kind, operands, value) in enumerate(chain, start=1):
        family = kind.removesuffix("_packs")
        switches = KINDS[kind].switches
        other = unused.pop(int(rng.random() * len(unused))) if switches else person
        words = KINDS[kind].phrase.format(
            who=person[1],
            other=other[0],
            verb=_pick(rng, VERBS[family]) if family in VERBS else "",
            pack=_pick(rng, PACKS),
            **dict(zip("ab", operands, strict=False)),
        )
        phrase = f"Day {day}: {words}"
        operations.append(Operation(kind=kind, operands=operands, phrase=phrase, value=value))
        person = other
        pronouns.append(person[1])
        sentences.append(f"{phrase}." if switches else f"{phrase} {thing}.")
    noise = []
    for _ in range(_between(rng, *dials.distractors)):
        place = _between(rng, 1, len(sentences))
        number = _between(rng, 2, dials.numbers)
        who = pronouns[place - 1]
        sentences.insert(place, _pick(rng, DISTRACTORS).format(who=who, n=number) + ".")
        pronouns.insert(place, who)
        noise.append(number)
    sentences.append(f"How many {thing} does {person[0]} have?")
    return Problem(
        text=" ".join(sentences),
        start=start,
        operations=tuple(operations),
        distractors=tuple(noise),
        shortcut=shortcut,
    )


def wording() -> Iterator[str]:
    """Yield sentences that together hold every word in every position it can take.

    The digit-level tokenizer of the embedded policy takes its whole-word tokens from these.
    """
    people = [name for name, _ in NAMES]
    for day in range(1, MOST_OPERATIONS + 1):
        yield f"Day {day}: She. Day {day}: He"
    for name in people:
        yield f"{name} has 7 apples."
        for thing in THINGS:
            yield f" {name} has 7 {thing}. How many {thing} does {name} have?"
        for kind in KINDS.values():
            if kind.switches:
                yield f" {kind.phrase.format(other=name, a=3)}."
    for who in ("She", "He"):
        for verb in (verb for verbs in VERBS.values() for verb in verbs):
            for pack in PACKS:
                yield f" {who} {verb} 7. {who} {verb} 3 {pack} of 4."
        for distractor in DISTRACTORS:
            yield f" {distractor.format(who=who, n=7)}."
