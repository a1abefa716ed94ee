"""`2 * adapter.rank`: expressions over config keys, in a small part of Python's grammar that can neither call nor grow.

Numbers, text in quotes, true, false, null, dotted keys, + - * / // % **, comparisons, and / or / not, min, max, round, int.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_LENGTH = 200
_MAX_INTEGER = 2**63 - 1
_MAX_DIGITS = 15
_SUPPORTED = "numbers, quoted text, config keys, + - * / // % **, comparisons, and, or, not, min, max, round, int"

_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS: Mapping[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_EQUALITIES: Mapping[type, Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_ORDERS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, tuple[Callable[..., Any], int, int]] = {
    "min": (min, 2, 10),
    "max": (max, 2, 10),
    "round": (round, 1, 2),
    "int": (int, 1, 1),
}
"""Function, least and most arguments; all of them numbers."""
_WORDS = {"true": True, "false": False, "null": None}


class ExpressionError(ValueError):
    """An expression that cannot be read, or has no value: the message says which part and why."""


@dataclass(frozen=True, slots=True)
class Expression:
    text: str
    tree: ast.expr
    names: tuple[str, ...]
    """Config keys that it refers to, in their order."""

    def value(self, value_of: Callable[[str], Any]) -> Any:
        """What it comes to: a number, text, boolean or null.

        Args:
            value_of: gives the value of a config key.

        Raises:
            ExpressionError: if it has no value, such as a division by zero or `auto` times two.
        """
        return _value(self.tree, value_of)


def parse_expression(text: str) -> Expression:
    """Read an expression; keys in it are not looked up.

    Raises:
        ExpressionError: if it is not one.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"has {len(text)} characters; an expression has at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"is no expression: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise ExpressionError("is no expression") from None
    return Expression(text, tree, tuple(dict.fromkeys(_names(tree))))


def _names(tree: ast.expr) -> list[str]:
    """The keys of an expression, each part of which is allowed."""
    match tree:
        case ast.Constant(value=bool() | str() | None):
            return []
        case ast.Constant(value=int(value)) if value <= _MAX_INTEGER:
            return []
        case ast.Constant(value=float(value)) if math.isfinite(value):
            return []
        case ast.Name(id=name):
            return [] if name in _WORDS else [name]
        case ast.Attribute():
            return [_key(tree)]
        case ast.BinOp(left, operation, right) if type(operation) in _ARITHMETIC:
            return _names(left) + _names(right)
        case ast.UnaryOp(operation, operand) if type(operation) in _SIGNS or isinstance(operation, ast.Not):
            return _names(operand)
        case ast.BoolOp(values=values):
            return [name for value in values for name in _names(value)]
        case ast.Compare(left, operations, others) if all(type(each) in {**_EQUALITIES, **_ORDERS} for each in operations):
            return [name for value in (left, *others) for name in _names(value)]
        case ast.Call(ast.Name(id=function), arguments, []) if function in _FUNCTIONS:
            _, least, most = _FUNCTIONS[function]
            if not least <= len(arguments) <= most:
                raise ExpressionError(f"{function}() takes {least if least == most else f'{least} to {most}'} values")
            return [name for value in arguments for name in _names(value)]
    raise ExpressionError(f"{ast.unparse(tree)!r} is not allowed; an expression has {_SUPPORTED}")


def _key(tree: ast.expr) -> str:
    match tree:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=last):
            return f"{_key(value)}.{last}"
    raise ExpressionError(f"{ast.unparse(tree)!r} is not allowed; an expression has {_SUPPORTED}")


def _value(tree: ast.expr, value_of: Callable[[str], Any]) -> Any:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.Name() | ast.Attribute():
            return value_of(_key(tree))
        case ast.BinOp(left, operation, right):
            return _calculated(tree, _ARITHMETIC[type(operation)], _number(left, value_of), _number(right, value_of))
        case ast.UnaryOp(ast.Not(), operand):
            return not _value(operand, value_of)
        case ast.UnaryOp(operation, operand):
            return _calculated(tree, _SIGNS[type(operation)], _number(operand, value_of))
        case ast.BoolOp(ast.And(), values):
            return all(_value(value, value_of) for value in values)
        case ast.BoolOp(ast.Or(), values):
            return any(_value(value, value_of) for value in values)
        case ast.Compare(left, operations, others):
            operands = [left, *others]
            return all(_holds(operands[i], each, operands[i + 1], value_of) for i, each in enumerate(operations))
        case ast.Call(ast.Name(id=function), arguments):
            return _calculated(tree, _FUNCTIONS[function][0], *(_number(each, value_of) for each in arguments))
    raise AssertionError(f"{ast.dump(tree)} passed parse_expression")


def _holds(left: ast.expr, operation: ast.cmpop, right: ast.expr, value_of: Callable[[str], Any]) -> bool:
    if type(operation) in _EQUALITIES:
        return _EQUALITIES[type(operation)](_value(left, value_of), _value(right, value_of))
    return _ORDERS[type(operation)](_number(left, value_of), _number(right, value_of))


def _number(tree: ast.expr, value_of: Callable[[str], Any]) -> int | float:
    value = _value(tree, value_of)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{ast.unparse(tree)} is {value!r}, which is no number")
    return value


def _calculated(tree: ast.expr, operation: Callable[..., Any], *values: int | float) -> int | float:
    """The result, refused where it is no finite number that fits 64 bits; what would grow beyond is not even begun."""
    try:
        if operation is operator.pow and _bits(*values) > 64:
            raise OverflowError
        if operation is round and len(values) == 2 and not (isinstance(values[1], int) and abs(values[1]) <= _MAX_DIGITS):
            raise ExpressionError(f"{ast.unparse(tree)}: round() keeps -{_MAX_DIGITS} to {_MAX_DIGITS} digits")
        result = operation(*values)
    except ZeroDivisionError:
        raise ExpressionError(f"{ast.unparse(tree)} divides by zero") from None
    except OverflowError:
        raise ExpressionError(f"{ast.unparse(tree)} is too large") from None
    if isinstance(result, complex) or (isinstance(result, float) and not math.isfinite(result)):
        raise ExpressionError(f"{ast.unparse(tree)} is no finite number")
    if isinstance(result, int) and abs(result) > _MAX_INTEGER:
        raise ExpressionError(f"{ast.unparse(tree)} is too large")
    return result


def _bits(base: int | float, exponent: int | float) -> float:
    """Bits of the integer that a power would make; 0 where it makes a fraction, whose size is fixed."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        return exponent * math.log2(abs(base))
    return 0
