"""A program's settings: fields' defaults, a YAML file, the command line; what is wrong with them in a sentence."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from chatmodel.runtime import UserError

CONFIG_FLAG = re.compile(r"^(--config)=")
WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


class RecipeParser(TrlParser):  # type: ignore[misc]
    """TRL's parser, with one sentence in place of a usage text of up to two hundred options."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message}; --help lists the options")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Called by argparse; the type may be TRL's own function around `int`, of that name."""
        kind: Any = action.type
        if kind is Any:  # an entry of a list, as in YAML
            return read_word(arg_string)
        is_whole = getattr(kind, "__name__", "") == "int"
        return super()._get_value(action, write_plainly(arg_string) if is_whole else arg_string)


def parse_arguments(*dataclasses: Any) -> tuple[Any, ...]:
    """One filled instance per dataclass: defaults < `--config` YAML < command line.

    Raises:
        UserError: an option is unknown or its value wrong; the YAML file is missing, no mapping, or has a strange key.
    """
    parser = RecipeParser(
        dataclasses,
        allow_abbrev=False,
        description=sys.modules["__main__"].__doc__,
        epilog="--config FILE reads these settings from a YAML file; the command line overrides it.",
    )
    # TrlParser only knows "--config FILE"; everybody's fingers know "--config=FILE" as well.
    arguments = [part for word in sys.argv[1:] for part in CONFIG_FLAG.split(word) if part]
    known = ["config", *(field.name for dataclass in dataclasses for field in fields(dataclass))]
    check_options(arguments, known)
    if arguments[-1:] == ["--config"]:
        raise UserError("--config stands at the end; it takes the path of a YAML file")
    if "--config" in arguments:
        position = arguments.index("--config")
        _, path = arguments.pop(position), arguments.pop(position)
        parser.set_defaults_with_config(**read_typed_config(path, dataclasses))
    try:
        *filled, left_over = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the configuration cannot be used: {' '.join(str(error).split())}") from None
    if left_over:
        raise UserError(f"{left_over[0]!r} belongs to no option; options are written --name value")
    return tuple(filled)


def check_options(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an option that no dataclass has, by name and with the option that was probably meant."""
    for word in arguments:
        option = word.partition("=")[0]
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name not in known and name.removeprefix("no_") not in known and name != "help":
            raise UserError(f"there is no option {option}{suggest(name, known, '--')}; --help lists the options")


def read_typed_config(path: str, dataclasses: Sequence[Any]) -> dict[str, Any]:
    """The settings of a YAML file, each a field of one of the dataclasses, and of its type.

    Raises:
        UserError: the first that is not, with the key that was probably meant.
    """
    hints = {name: hint for one in dataclasses for name, hint in get_type_hints(one).items()}
    known = [field.name for one in dataclasses for field in fields(one)]
    settings = read_config(path)
    for key, value in settings.items():
        if key not in known:
            raise UserError(
                f"config file {path} has the unknown key {key}{suggest(key, known)}; --help lists the keys"
            )
        try:
            settings[key] = fit_value(key, value, hints[key])
        except ValueError as error:
            raise UserError(f"{error}; correct it in the config file {path}") from None
    return settings


def suggest(name: Any, known: Sequence[str], prefix: str = "") -> str:
    """The words " (did you mean ...?)", or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def read_config(path: str) -> dict[str, Any]:
    """The settings of a YAML file, in which `no` and the like, which can be a name, stay as they are written.

    Raises:
        UserError: the file is missing or no YAML mapping.
    """
    try:
        text = Path(path).read_text()
        settings, words = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # the second leaves all as text
    except OSError:
        raise UserError(f"config file {path} does not exist; --config takes the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict | None):
        raise UserError(f"config file {path} is no YAML mapping; its lines are written name: value")
    return {key: _keep_word(value, words.get(key)) for key, value in (settings or {}).items()}


def read_word(text: str) -> Any:
    """A value of the command line as YAML reads it, but for `no` and the like, which can be a name."""
    try:
        return _keep_word(yaml.safe_load(text), text)
    except yaml.YAMLError:
        return text


def _keep_word(value: Any, word: Any) -> Any:
    return word if isinstance(value, bool) and str(word).lower() not in ("true", "false") else value


def default_settings(*dataclasses: Any) -> dict[str, Any]:
    """What is meant where nothing is asked for: the fields' defaults, those that JSON can hold."""
    defaults = {field.name: field.default for dataclass in dataclasses for field in fields(dataclass)}
    return {name: value for name, value in defaults.items() if isinstance(value, bool | int | float | str | None)}


def requested_settings(arguments: list[str]) -> dict[str, Any]:
    """What was asked for on a command line: the `--config` file's keys, overridden by the flags.

    Cheap on purpose (no dataclass, no trainer import), so that a finished stage can be recognised in a moment.
    """
    settings: dict[str, Any] = {}
    flags: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        name, has_equals, value = arguments[position].removeprefix("--").partition("=")
        position += 1
        values = [value] if has_equals else []
        while not has_equals and position < len(arguments) and not arguments[position].startswith("--"):
            values.append(arguments[position])
            position += 1
        flags[name.replace("-", "_")] = [value if name == "config" else read_word(value) for value in values]
    for path in flags.pop("config", []):
        settings |= read_config(path)
    for name, values in flags.items():
        settings[name] = True if not values else values[0] if len(values) == 1 else values
    return settings


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
    if str not in wanted and any(get_origin(kind) is list for kind in wanted):
        return value if isinstance(value, list | None) else [value]
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
