"""Whether two values of sympy are equal: exactly where both are exact, else to the digits of the decimal.
Imports sympy, so that only who reads answers imports it."""

from collections.abc import Sequence
from decimal import Decimal
from itertools import chain
from typing import Any

import sympy as sp
from latex2sympy2_extended.latex2sympy2 import is_expr_of_only_symbols
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

SAME = sp.Rational(1, 10**30)
"""Relative difference of two exact numbers that are the same; they are computed to 50 digits."""
NOISE = sp.Rational(1, 10**9)
"""Relative difference that a computer's arithmetic explains in a decimal, as in 18.000000000000004."""
SIX_DIGITS = sp.Rational(5, 10**6)
"""Relative uncertainty from which on a decimal stands for a fraction or root."""
POINTS = (
    (sp.Rational(7391, 5003), sp.Rational(2113, 3001)),
    (sp.Rational(-5279, 4001), sp.Rational(-1709, 6007)),
)
"""Where formulas are compared, positive and negative: the k-th symbol is first + k second."""
WHOLE = tuple((sp.Integer(first), sp.Integer(7)) for first in range(24, 36))
"""The same for formulas that round, whose variables are whole numbers: every remainder up to a dozen."""
PARSED = sp.Float(1)._prec
"""Precision of a decimal as the parser makes it, which does not say how many digits were written."""
NOWHERE = (sp.zoo, sp.nan)
BOUND = sp.Symbol("zeta", real=True)


def equal(gold: Any, answer: Any) -> bool:
    """Compares two values. The gold comes first: it says whether names count, and how many digits."""
    gold, answer = _without_names(gold, answer)
    if isinstance(gold, sp.MatrixBase) and isinstance(answer, sp.MatrixBase):
        return gold.shape == answer.shape and _all_equal(gold.flat(), answer.flat())
    one, other = _elements(gold, beside=answer), _elements(answer, beside=gold)
    if one is not None or other is not None:
        return _same_lists(gold, answer, one, other)
    if type(gold) is type(answer) and gold == answer:
        return True
    if _is_region(gold) or _is_region(answer):
        return _same_region(gold, answer)
    if not all(isinstance(each, sp.Expr) and not isinstance(each, sp.Symbol) for each in (gold, answer)):
        return _verify(gold, answer)
    return (_same_formula if gold.free_symbols | answer.free_symbols else same_number)(gold, answer)


def _verify(gold: Any, answer: Any) -> bool:
    return bool(verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True))


def _without_names(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Drops what stands left of an equals sign where it is the same, or stands on one side only."""
    if isinstance(gold, sp.Eq) and isinstance(answer, sp.Eq):
        gold, answer = _rename(gold), _rename(answer)
        return (gold.rhs, answer.rhs) if gold.lhs == answer.lhs else (gold, answer)
    if isinstance(answer, sp.Eq):
        return gold, answer.rhs
    return (gold.rhs if isinstance(gold, sp.Eq) and is_expr_of_only_symbols(gold.lhs) else gold), answer


def _rename(equation: Any) -> Any:
    """Calls the variable of f(x) = ... by the same name whatever it is."""
    left = equation.lhs
    if not isinstance(left, AppliedUndef) or not all(isinstance(each, sp.Symbol) for each in left.args):
        return equation
    names = {each: sp.Symbol(f"bound_{place}", real=True) for place, each in enumerate(left.args)}
    return sp.Eq(left.xreplace(names), equation.rhs.xreplace(names), evaluate=False)


# --- lists ---


def _elements(value: Any, *, beside: Any) -> list[Any] | None:
    """Returns the elements of a list, tuple or vector; of (a, b), too, where it cannot be an interval."""
    if isinstance(value, sp.FiniteSet):
        return list(getattr(value, "_unsorted_args", value.args))
    if isinstance(value, sp.Tuple):
        return list(value.args)
    if isinstance(value, sp.MatrixBase) and 1 in value.shape:
        return value.flat()
    if (
        isinstance(value, sp.Interval)
        and value.is_open
        and isinstance(beside, sp.FiniteSet | sp.Tuple | sp.MatrixBase)
    ):
        return [value.start, value.end]
    return None


def _same_lists(gold: Any, answer: Any, one: list[Any] | None, other: list[Any] | None) -> bool:
    """Compares lists, of which one may be a single value: without order if both are sets, in which what
    the gold repeats has to be repeated."""
    if one is None or other is None:
        alone = gold if one is None else answer
        return not _is_region(alone) and _all_equal(one or [gold], other or [answer])
    if not (isinstance(gold, sp.FiniteSet) and isinstance(answer, sp.FiniteSet)):
        return _all_equal(one, other)
    return all(any(equal(each, said) for each in one) for said in other) and all(
        sum(equal(each, said) for said in other) >= sum(equal(each, again) for again in one) for each in one
    )


def _all_equal(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    return len(golds) == len(answers) and all(map(equal, golds, answers))


# --- regions ---


def _is_region(value: Any) -> bool:
    return isinstance(value, sp.Set | sp.And | sp.Or | Relational) and not isinstance(
        value, sp.Eq | sp.FiniteSet
    )


def _same_region(gold: Any, answer: Any) -> bool:
    """Compares intervals, unions and inequalities of one variable, whichever way they are written."""
    one, other = _as_set(gold), _as_set(answer)
    if one is None or other is None:
        return _is_region(gold) and _is_region(answer) and _verify(gold, answer)
    symbols = chain(*(each.free_symbols for each in (gold, answer) if not isinstance(each, sp.Set)))
    if len(set(symbols) - {BOUND}) > 1:
        return False
    pieces: list[list[Any]] = [
        list(each.args) if isinstance(each, sp.Union) else [each] for each in (one, other)
    ]
    if not all(isinstance(piece, sp.Interval | sp.FiniteSet) for piece in chain(*pieces)):
        return one == other or one.symmetric_difference(other).is_empty is True
    golds, answers = (sorted(each, key=lambda piece: piece.inf.evalf()) for each in pieces)
    return len(golds) == len(answers) and all(map(_same_piece, golds, answers))


def _as_set(value: Any) -> Any:
    """Returns a set of numbers; None for what depends on other symbols or cannot be solved."""
    if isinstance(value, sp.Set):
        return value.doit() if not value.free_symbols else None
    try:
        return value.as_set() if _is_region(value) and len(value.free_symbols) == 1 else None
    except (NotImplementedError, ValueError, TypeError):
        return None


def _same_piece(gold: Any, answer: Any) -> bool:
    if not isinstance(gold, sp.Interval) or not isinstance(answer, sp.Interval):
        return isinstance(gold, sp.FiniteSet) and isinstance(answer, sp.FiniteSet) and equal(gold, answer)
    sides = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
    return bool(sides) and equal(gold.start, answer.start) and equal(gold.end, answer.end)


# --- numbers and formulas ---


def same_number(gold: Any, answer: Any) -> bool:
    """Compares two expressions without symbols."""
    one, other = exact(gold), exact(answer)
    doubt, answered = _uncertainty(gold), _uncertainty(answer)
    if one == other or (one.is_Rational and other.is_Rational and doubt == answered == 0):
        return one == other
    near = _relative_difference(one, other)
    if near is None:
        return sp.simplify(one - other) == 0
    if doubt == answered == 0:
        return bool(near < SAME)
    rounded = doubt if _was_rounded(gold) else answered if doubt == 0 and answered <= SIX_DIGITS else 0
    return bool(near <= max(rounded, NOISE))


def exact(value: Any) -> Any:
    """Evaluates what the parser left as it was written, decimals as fractions."""
    return value.xreplace({each: sp.Rational(str(each)) for each in value.atoms(sp.Float)}).doit()


def _relative_difference(one: Any, other: Any) -> Any:
    """Returns |one - other| / the larger; None if one of them is 0 or no number can be found."""
    first, second = one.evalf(50), other.evalf(50)
    if not (first.is_number and second.is_number and first.is_finite and second.is_finite):
        return None
    least, most = sorted((abs(first), abs(second)))
    return abs(first - second) / most if least > 0 else None


def _uncertainty(value: Any) -> Any:
    """Returns half a unit of the last digit, relative to the least certain decimal in a value; 0 if exact."""
    decimals = [each for each in value.atoms(sp.Float) if each != 0]
    return max((sp.Rational(10) ** -_places(each) / abs(2 * exact(each)) for each in decimals), default=0)


def _places(decimal: sp.Float) -> int:
    """Returns how many digits stand behind the point, zeros at the end too where they were written."""
    written = -int(Decimal(str(decimal)).as_tuple().exponent)
    return _digits(decimal)[1] if decimal._prec == PARSED else written


def _digits(decimal: sp.Float) -> tuple[int, int]:
    """Returns how many digits a decimal has, and how many of them behind the point."""
    _, digits, exponent = Decimal(str(decimal)).normalize().as_tuple()
    return len(digits), -int(exponent)


def _was_rounded(gold: Any) -> bool:
    """Returns whether a gold has a decimal of three digits or two places, or any beside a power of ten."""
    return gold.has(sp.Float) and (
        not isinstance(gold, sp.Float) or _digits(gold)[0] >= 3 or _digits(gold) == (2, 2)
    )


def _same_formula(gold: Any, answer: Any) -> bool:
    """Compares at points, positive and negative; by rules where that says nothing."""
    one, other = exact(gold), exact(answer)
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    said, inside = [], not one.has(sp.Abs) and not other.has(sp.Abs)
    for first, step in WHOLE if one.has(sp.floor, sp.ceiling) else POINTS:
        values = {symbol: first + place * step for place, symbol in enumerate(symbols)}
        left, right = one.subs(values).doit(), other.subs(values).doit()
        near = None if left.free_symbols or right.free_symbols else _relative_difference(left, right)
        real = near is not None and bool(left.is_real and right.is_real)
        if said and inside and not real:  # beyond where logarithms and roots are defined
            continue
        inside = inside and real
        said.append(bool(near < SAME) if near is not None else left == right and not left.has(*NOWHERE))
        if near is not None and not said[0]:
            return False
    return all(said) or (not one.has(*NOWHERE) and sp.simplify(one - other) == 0)
