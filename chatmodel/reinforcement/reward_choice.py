"""Which rewards does a run of reinforcement learning give: ours by name, or functions in a file of the user's?"""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from chatmodel.rewards import reward_form, reward_task
from chatmodel.runtime import UserError

RewardFunction = Callable[..., Sequence[float | None]]
KNOWN: dict[str, RewardFunction] = {"task": reward_task, "form": reward_form}


def find_rewards(names: Sequence[str]) -> dict[str, RewardFunction]:
    """Functions in TRL's form by a short name: of `KNOWN`, or "file.py:function", whose file is run for it.

    They get `completions`, `prompts` and the problems' columns (`task`, `answer`) as keywords, and return one number a
    completion, or None to say nothing of it. What one of them does wrong is said in a `UserError`.

    Raises:
        UserError: a name that is neither, a file that cannot be run, the same name twice, or no name at all.
    """
    if not names:
        raise UserError(f"rewards is empty; name at least one of {', '.join(KNOWN)}, or a function as my.py:function")
    found: dict[str, RewardFunction] = {}
    for name in names:
        short = name.rpartition(":")[2]
        if short in found:
            raise UserError(f"rewards has {short!r} twice; give each once, with its share in reward_weights")
        found[short] = _guard(short, KNOWN[name] if name in KNOWN else _load(name))
    return found


def _load(name: str) -> RewardFunction:
    file, _, function_name = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(f"reward {name!r} is not known; choose {', '.join(KNOWN)}, or a function as my.py:function")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"reward {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's program can fail in any way
        raise UserError(f"reward {name!r}: {path} cannot be run ({_describe(error)})") from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise UserError(
            f"reward {name!r}: {path} has no function {function_name!r}; it has {', '.join(there) or 'none'}"
        )
    if inspect.iscoroutinefunction(function):
        raise UserError(f"reward {name!r} is an async function; make it a plain one")
    return function


def _guard(name: str, function: RewardFunction) -> RewardFunction:
    """The same function under a short name; what it does wrong ends the run in one sentence."""

    @wraps(function)
    def rewards_of(*, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            rewards = list(function(completions=completions, **columns))
        except UserError:
            raise
        except Exception as error:  # the user's program can fail in any way
            raise UserError(f"reward {name!r} failed: {_describe(error)}") from error
        if len(rewards) != len(completions):
            raise UserError(f"reward {name!r} gave {len(rewards)} numbers for {len(completions)} completions")
        for reward in rewards:
            if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
                raise UserError(
                    f"reward {name!r} gave {reward!r}; it must give a finite number, or None, a completion"
                )
        return rewards

    rewards_of.__name__ = name  # what TRL calls it in its log
    return rewards_of


def _describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
