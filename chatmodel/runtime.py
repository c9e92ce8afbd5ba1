"""What every entry point needs around its work: a log, errors in one sentence, JSON files that are whole."""

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import transformers

from chatmodel.launchers import follow_launcher

logger = logging.getLogger("chatmodel")


class UserError(ValueError):
    """A mistake the user can mend; its text is one sentence that says what is wrong and how to mend it."""


def entry_point(main: Callable[[], None]) -> None:
    """Run a recipe's `main`: log to stderr, end with its launcher, make a `UserError` a sentence and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    silence_noise()
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
    follow_launcher()
    try:
        main()
    except UserError as error:
        exit_with(error)


def silence_noise() -> None:
    """Keep warnings that a user of the recipes can do nothing about out of the way of those that matter."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
    # Of each attempt to reach the Hub, twice over; what is waited for, and what came of it, is said by who asks.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()  # of loading and saving weights, a second at most


@cache
def warn_once(message: str, *parts: str) -> None:
    """Say in the log, the first time only, that something is slower or poorer than it could be."""
    logger.warning(message, *parts)


def exit_with(error: UserError) -> NoReturn:
    """End the process with the error's sentence on stderr and exit code 2."""
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)


def write_json(path: Path, value: Any) -> None:
    """Write `value` beside `path` and rename it, so that a killed process never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
    # NamedTemporaryFile makes files private to their owner; results are meant to be read by others.
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_json(path: Path) -> Any:
    """The value stored in a JSON file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run its stage again") from None
