"""Exact evaluation of arithmetic expressions, bounded in time and memory."""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import Literal

MAX_CHARS = 1000
"""Longest expression."""
MAX_DIGITS = 1000
"""Digits a numerator or denominator may reach on the way."""
MAX_RESULT_DIGITS = 100
"""Digits of a result that are written out."""
SIGNIFICANT_DIGITS = 12
"""Digits of a result that has no short exact decimal."""

Problem = Literal["syntax", "division_by_zero", "too_large"]


class CalculationError(Exception):
    """An expression that has no value; ``problem`` names the class."""

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem: Problem = problem


def evaluate(expression: str) -> Fraction:
    """Return the exact value of an expression of ``+ - * / // % **``, parentheses and decimals.

    A root that is not rational (``2**0.5``) is rounded to double precision.

    Raises
    ------
    CalculationError
        If it is no such expression, divides by zero, or grows beyond the bounds.

    Examples
    --------
    >>> evaluate("0.1 + 0.2")
    Fraction(3, 10)
    """
    text = expression.strip()
    if len(text) > MAX_CHARS:
        raise CalculationError("too_large", f"the expression is longer than {MAX_CHARS} characters")
    if not text.isascii() or "\n" in text:
        raise CalculationError("syntax", "write one line with plain ASCII operators + - * / ** ( )")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as 12and: an error just the same
            tree = ast.parse(text, mode="eval")
        return _value(tree.body, text)
    except SyntaxError as error:
        raise CalculationError("syntax", f"not an arithmetic expression: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise CalculationError("too_large", "the expression is nested too deeply") from error
    except ValueError as error:  # NUL bytes
        raise CalculationError("syntax", f"not an arithmetic expression: {error}") from error


def format_number(value: Fraction) -> str:
    """Write a value as an integer, an exact decimal, or to 12 significant digits.

    Raises
    ------
    CalculationError
        If it is an integer of more than 100 digits.

    Examples
    --------
    >>> [format_number(Fraction(n, d)) for n, d in ((6, 2), (-1, 8), (2, 3), (10**30, 7))]
    ['3', '-0.125', '0.666666666667', '1.42857142857e+29']
    """
    if abs(value.numerator) >= 10**MAX_RESULT_DIGITS and value.denominator == 1:
        raise CalculationError("too_large", f"the result has over {MAX_RESULT_DIGITS} digits")
    if value.denominator == 1:
        return str(value.numerator)
    places = _decimal_places(value.denominator)
    if places is not None and abs(value.numerator) * 10**places < 10**30 * value.denominator:
        scaled = abs(value.numerator) * 10**places // value.denominator
        whole, decimals = divmod(scaled, 10**places)
        return f"{'-' * (value < 0)}{whole}.{decimals:0{places}d}"
    context = Context(prec=SIGNIFICANT_DIGITS)
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    quotient = quotient.normalize(context)
    plain = -7 < quotient.adjusted() < 21
    return f"{quotient:f}" if plain else f"{quotient:e}"


def _decimal_places(denominator: int) -> int | None:
    """Return how many decimals ``1/denominator`` has; None if it does not terminate within 30."""
    places = 0
    while denominator > 1 and places < 30:
        shared = math.gcd(denominator, 10)
        if shared == 1:
            return None
        denominator //= shared
        places += 1
    return places if denominator == 1 else None


def _value(node: ast.expr, text: str) -> Fraction:
    """Evaluate a node of the allow-list."""
    if isinstance(node, ast.Constant):
        return _literal(node, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand, text)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in _OPERATIONS:
            try:
                return _bounded(Fraction(_OPERATIONS[type(node.op)](left, right)))
            except ZeroDivisionError as error:
                raise CalculationError("division_by_zero", "division by zero") from error
    hint = ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        hint = "; write ** for powers"
    elif isinstance(node, ast.Tuple):
        hint = "; write numbers without thousands separators"
    part = (ast.get_source_segment(text, node) or text)[:60]
    raise CalculationError(
        "syntax", f"{part!r} is not arithmetic: only numbers, + - * / // % ** and ( ){hint}"
    )


def _literal(node: ast.Constant, text: str) -> Fraction:
    """Read a number exactly as written, not through a float."""
    source = text[node.col_offset : node.end_col_offset]
    match = re.fullmatch(r"(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE]([+-]?\d+))?", source)
    if match is None:
        raise CalculationError("syntax", f"{source[:60]!r} is not a decimal number")
    if match[2] is not None and abs(int(match[2])) > MAX_DIGITS:
        raise CalculationError("too_large", f"the exponent of {source[:60]!r} is too large")
    return _bounded(Fraction(source.replace("_", "")))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Raise to a power whose size is checked before it is computed."""
    if base == 0 and exponent < 0:
        raise CalculationError("division_by_zero", "zero to a negative power")
    if base in (0, 1):
        return Fraction(1) if exponent == 0 else base
    digits = math.log10(max(abs(base.numerator), base.denominator))
    if abs(exponent) * Fraction(digits) > MAX_DIGITS:
        raise CalculationError("too_large", f"the power has over {MAX_DIGITS} digits")
    if exponent.denominator == 1:
        return base**exponent.numerator
    if base < 0:
        raise CalculationError("syntax", "a root of a negative number is not a real number")
    try:
        root = Fraction(float(base) ** float(exponent))
    except OverflowError as error:
        raise CalculationError("too_large", "the root is too large") from error
    near = root.limit_denominator(10**6)
    longest = max(_size(near) * exponent.denominator, digits * abs(exponent.numerator))
    exact = longest <= MAX_DIGITS and near**exponent.denominator == base**exponent.numerator
    return near if exact else root


def _size(value: Fraction) -> float:
    """Return the digits of the longer of numerator and denominator."""
    return math.log10(max(abs(value.numerator), value.denominator))


def _bounded(value: Fraction) -> Fraction:
    """Return ``value`` unless it has grown too long."""
    if _size(value) > MAX_DIGITS:
        raise CalculationError("too_large", f"a number has over {MAX_DIGITS} digits")
    return value


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
