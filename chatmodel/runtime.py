"""What every entry point needs around its work: arguments, clear errors, JSON files, facts about the machine."""

import argparse
import difflib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import psutil
import torch
import transformers
import yaml
from trl import TrlParser

from chatmodel.field_values import fit_value, write_plainly
from chatmodel.launchers import follow_launcher

logger = logging.getLogger("chatmodel")

REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "trl",
    "peft",
    "lm_eval",
    "evaluate",
)

CONFIG_FLAG = re.compile(r"^(--config)=")
MODEL_STAGES = ("base", "mid", "sft", "rl", "dpo")


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


class RecipeParser(TrlParser):  # type: ignore[misc]
    """TRL's parser, with one sentence in place of a usage text of up to two hundred options."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message}; --help lists the options")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Called by argparse; the type may be TRL's own function around `int`, of that name."""
        is_whole = getattr(action.type, "__name__", "") == "int"
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


def check_model_name(name: str) -> bool:
    """Whether `name` is a folder; else it is a name on the Hub, which has two parts at most.

    Raises:
        UserError: it is a folder without a model, or the path of one that does not exist.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file() and (folder.is_dir() or len(folder.parts) > 2):
        raise UserError(explain_no_model(folder))
    return folder.is_dir()


def explain_no_model(folder: Path) -> str:
    """One sentence for a folder without a model: whether it is there at all, and where models of its run lie."""
    if not folder.is_dir():
        beside = find_models(folder.parent)
        mend = f"its run has {', '.join(beside)}" if beside else "give a model folder, such as runs/cpu/sft"
        return f"folder {folder} does not exist; {mend}"
    inside = find_models(folder)
    if inside:
        return f"{folder} is a run folder; give one of its stages: {', '.join(inside)}"
    return f"{folder} holds no model (no tokenizer.json or config.json); give a folder that a stage has finished"


def find_models(run_dir: Path) -> list[str]:
    """The model folders of a run."""
    return [str(run_dir / stage) for stage in MODEL_STAGES if (run_dir / stage / "config.json").is_file()]


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


def choose_device() -> torch.device:
    """The best device of this process: CUDA (its local rank), then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_precision(device: torch.device, asked: str | None = None) -> str:
    """ "bf16" or "no" (fp32): what was asked for, else bf16 where this device is faster with it, found by trying.

    Accelerate's own setting is not looked at, since `accelerate launch` sets "no" where nobody asked; if the choice is
    another one, the log says so.

    Raises:
        UserError: something else was asked for.
    """
    if asked not in (None, "bf16", "no"):
        raise UserError(f"mixed_precision={asked!r} must be 'bf16' or 'no'; leave it out to let the device decide")
    if asked is not None:
        return asked
    if device.type == "cuda":
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    else:
        chosen = "bf16" if device.type == "cpu" and _matmul_speedup(torch.bfloat16) > 1.3 else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", chosen)
    hint = f", not Accelerate's '{launched}', which does not count: this program's own --mixed_precision does"
    named = "bf16" if chosen == "bf16" else "fp32"
    logger.info("precision: %s on %s%s", named, device.type, hint if launched != chosen else "")
    return chosen


def _matmul_speedup(dtype: torch.dtype) -> float:
    """How many times faster this CPU multiplies matrices of `dtype` than of fp32; some emulate bf16 slowly."""
    seconds = {}
    for kind in (torch.float32, dtype):
        left, right = torch.randn(512, 512).to(kind), torch.randn(512, 1024).to(kind)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        seconds[kind] = min(times)
    return seconds[torch.float32] / seconds[dtype]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # no such module on Windows
        return int(psutil.Process().memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_environment() -> dict[str, Any]:
    """Facts for the report: code version, hardware, software."""
    return {"git": describe_git(), "hardware": describe_hardware(), "software": describe_software()}


def describe_git() -> dict[str, Any]:
    """Branch, commit, first line of its message, and whether files differ from it; empty outside a checkout."""

    def ask(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = ask("rev-parse", "--short", "HEAD")
    if commit is None:
        return {}
    return {
        "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
        "commit": commit,
        "message": ask("log", "-1", "--format=%s"),
        "dirty": bool(ask("status", "--porcelain")),
    }


def describe_hardware() -> dict[str, Any]:
    """Platform, cores, memory and accelerators of this machine."""
    facts: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [],
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts["gpus"].append({"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        facts["gpus"].append({"name": "Apple MPS", "memory_gib": facts["memory_gib"]})
    return facts


def describe_software() -> dict[str, Any]:
    """Versions of Python, CUDA and the packages a result depends on."""
    versions: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
