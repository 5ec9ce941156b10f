"""Checks of numeric arguments: Python's and numpy's numbers are accepted, bools are not."""

import math
import numbers
import operator


def read_whole_number(name: str, value: object, *, minimum: int = 1) -> int:
    """
    `value` as an int.

    Args:
        name: name of the argument, for the error message.
        value: an int or an equivalent, such as a numpy integer; bools are not accepted.
        minimum: smallest allowed value.
    Raises:
        TypeError: `value` is not a whole number.
        ValueError: `value` is less than `minimum`.
    """
    try:
        if isinstance(value, bool) or type(value).__name__ == "bool":  # numpy's is no subclass of Python's
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.") from None
    if number < minimum:
        raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {number}.")
    return number


def read_number(name: str, value: object, *, minimum: float, maximum: float) -> float:
    """
    `value` as a float from `minimum` to `maximum`.

    Raises:
        TypeError: `value` is not a number, or is a bool.
        ValueError: `value` is NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}.")
    number = float(value)
    if not (math.isfinite(number) and minimum <= number <= maximum):
        raise ValueError(f"`{name}` must be from {minimum:g} to {maximum:g}, got {value}.")
    return number
