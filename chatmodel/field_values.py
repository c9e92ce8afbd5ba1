"""Is a value of a settings file what its field wants?"""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


def write_plainly(text: str) -> str:
    """A whole number that is written as people write large ones, 1e8, as `int` reads it; anything else as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if "e" in text.lower() and number.is_integer() else text


def fit_value(name: str, value: Any, hint: Any) -> Any:
    """A value as a field with this annotation takes it; words are left to the parser of the command line.

    Raises:
        ValueError: it is of another kind. Fields that take more than numbers, words and paths are not looked at.
    """
    wanted = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if isinstance(value, str):
        switches = {"on": True, "off": False} if bool in wanted and str not in wanted else {}
        return switches.get(value.lower(), value)
    if int in wanted and isinstance(value, float) and value.is_integer():
        return int(value)
    if not wanted <= WANTED.keys() or _is_one_of(value, wanted):
        return value
    if wanted & {str, Path} and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    kinds = [text for kind, text in WANTED.items() if kind in wanted]
    raise ValueError(f"{name}={value!r} must be {' or '.join(kinds)}")


def _is_one_of(value: Any, wanted: set[Any]) -> bool:
    return type(value) in wanted or (type(value) is int and float in wanted)
