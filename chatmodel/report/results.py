"""What a run recorded: `results/*.json`, read so that a missing key is None and never a crash."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from chatmodel.report.code_size import find_repository
from chatmodel.report.document import NotRun, Series
from chatmodel.report.formats import NOT_RECORDED, format_named, is_number
from chatmodel.runs import STAGE_INPUTS, Run
from chatmodel.runtime import UserError

# What makes each stage: recipe, config file in a folder of configs, flags.
STAGE_COMMANDS = {
    "tokenizer": ("train_tokenizer.py", "tokenizer.yaml", ""),
    "base": ("pretrain.py", "pretrain.yaml", ""),
    "base_eval": ("eval.py", "eval.yaml", " --stage base"),
    "mid": ("sft.py", "midtrain.yaml", " --stage mid"),
    "mid_eval": ("eval.py", "eval.yaml", " --stage mid"),
    "sft": ("sft.py", "sft.yaml", " --stage sft"),
    "sft_eval": ("eval.py", "eval.yaml", " --stage sft"),
    "rl": ("grpo.py", "grpo.yaml", ""),
    "rl_eval": ("eval.py", "eval.yaml", " --stage rl"),
}
DEFAULT_CONFIGS = "recipes/configs/cpu"


def pick(value: Any, *keys: str) -> Any:
    """`value[key1][key2]...`, or None where a key or a dict is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def pick_number(value: Any, *keys: str) -> Any:
    """Like `pick`, but None for anything that is no finite number."""
    found = pick(value, *keys)
    return found if is_number(found) and math.isfinite(found) else None


def pick_records(value: Any, *keys: str) -> list[dict[str, Any]]:
    """The dicts in a list, or nothing."""
    found = pick(value, *keys)
    return [record for record in found if isinstance(record, dict)] if isinstance(found, list) else []


def pick_named(value: Any, *keys: str) -> dict[str, Any]:
    """A dict, or an empty one; also empty when it says that it was not run."""
    found = pick(value, *keys)
    return found if isinstance(found, dict) and find_not_run(found) is None else {}


def find_not_run(value: Any, what: str = "") -> NotRun | None:
    """The reason and command of `{"not_run": reason, "how": command}`; None for anything else."""
    reason = pick(value, "not_run")
    if not reason:
        return None
    how = pick(value, "how")
    return NotRun(str(reason), None if how is None else str(how), what)


def collect_series(label: str, records: list[dict[str, Any]], name: str, *, x: str = "step") -> Series:
    """The points (record[x], record[name]) that were recorded and are finite."""
    pairs = [(pick_number(record, x), pick_number(record, name)) for record in records]
    return Series(label, [(float(a), float(b)) for a, b in pairs if a is not None and b is not None])


def flatten_values(value: Any, prefix: str = "", *, null: str = NOT_RECORDED) -> Iterator[tuple[str, str]]:
    """(dotted key, written value) of everything in a nested dict; a list of records is only counted.

    Args:
        null: what None says; in settings it is a choice, among metrics a gap.
    """
    if (missing := find_not_run(value)) is not None:
        yield prefix, f"not run: {missing.reason}"
    elif isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from flatten_values(item, f"{prefix}.{key}" if prefix else str(key), null=null)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield prefix, f"{len(value):,} records"
    elif value is None:
        yield prefix, null
    else:
        yield prefix, "none" if value in ([], {}) else format_named(prefix, value)


def describe_context(base: dict[str, Any]) -> str:
    """What a token saw when pretraining measured its validation text, as the end of a label; "" if not recorded."""
    within = base.get("val_bpb_within_documents")
    return "" if within is None else ", within documents" if within else ", over whole rows"


def shorten_paths(text: str) -> str:
    """Text without the path of the repository, so that it reads (and runs) from there."""
    return text.replace(f"{find_repository()}/", "")


def guess_configs(records: Iterable[Any]) -> str:
    """The folder of config files that the finished stages used."""
    for record in records:
        if found := re.search(r"--config[ =](\S+)/[^/\s]+\.ya?ml", str(pick(record, "command"))):
            return shorten_paths(found.group(1))
    return DEFAULT_CONFIGS


@dataclass(frozen=True)
class StageResult:
    """One stage's `results/<stage>.json`; `record` is None while the stage is not finished."""

    stage: str
    record: dict[str, Any] | None
    begun: bool
    run_dir: str
    configs: str = DEFAULT_CONFIGS

    @property
    def file(self) -> str:
        """The JSON file, relative to the run."""
        return f"results/{self.stage}.json"

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured."""
        found = pick(self.record, "metrics")
        return found if isinstance(found, dict) else {}

    @property
    def how(self) -> str:
        """The command that finishes this stage."""
        if self.stage not in STAGE_COMMANDS:
            return f"python scripts/speedrun.py --run_dir {self.run_dir}"
        recipe, config, flags = STAGE_COMMANDS[self.stage]
        # A folder of configs need not have one for every stage.
        folder = self.configs if (find_repository() / self.configs / config).exists() else DEFAULT_CONFIGS
        return f"python recipes/{recipe} --config {folder}/{config} --run_dir {self.run_dir}{flags}"

    @property
    def command(self) -> str | None:
        """The command that made the result, with paths from the repository on."""
        found = pick(self.record, "command")
        return shorten_paths(found) if isinstance(found, str) and found.strip() else None

    @property
    def missing(self) -> NotRun | None:
        """Why there are no numbers, or None when there are."""
        if self.record is None:
            reason = f"stage {self.stage} was begun and is not finished" if self.begun else "the stage was not started"
            return NotRun(reason, self.how)
        return find_not_run(self.metrics)


def load_results(run: Run) -> dict[str, StageResult]:
    """Every stage of the run, finished or not, then any other file in `results/`, in reading order.

    Raises:
        UserError: nothing is finished, or a file is damaged.
    """
    folder = run.folder("results")
    found = sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith("."))
    if not found:
        raise UserError(
            f"there is nothing to report: {folder} holds no finished stage; "
            "give the --run_dir of a run, or start one with: make speedrun"
        )
    stages = (*STAGE_INPUTS, *(name for name in found if name not in STAGE_INPUTS))
    records = {stage: run.read_result(stage) for stage in stages}
    configs, run_dir = guess_configs(records.values()), shorten_paths(str(run.run_dir))
    results = {}
    for stage, record in records.items():
        if record is not None and not isinstance(record, dict):
            raise UserError(
                f"{run.result_path(stage)} is damaged (it holds no JSON object); delete it and run its stage again"
            )
        results[stage] = StageResult(stage, record, (folder / f"{stage}.begun").exists(), run_dir, configs)
    return results
