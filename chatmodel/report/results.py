"""What a run recorded: `results/*.json`, read so that a missing key is None and never a crash."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chatmodel.report.document import NotRun, Series
from chatmodel.report.formats import format_named, is_number
from chatmodel.runs import STAGES, Run
from chatmodel.runtime import UserError

# Results name the model they belong to; these are the commands that make them.
STAGE_COMMANDS = {
    "tokenizer": "python recipes/train_tokenizer.py --config recipes/configs/cpu/tokenizer.yaml",
    "base": "accelerate launch recipes/pretrain.py --config recipes/configs/cpu/pretrain.yaml",
    "base_eval": "accelerate launch recipes/eval.py --config recipes/configs/cpu/base_eval.yaml",
    "mid": "accelerate launch recipes/midtrain.py --config recipes/configs/cpu/midtrain.yaml",
    "mid_eval": "accelerate launch recipes/eval.py --config recipes/configs/cpu/mid_eval.yaml",
    "sft": "accelerate launch recipes/sft.py --config recipes/configs/cpu/sft.yaml",
    "sft_eval": "accelerate launch recipes/eval.py --config recipes/configs/cpu/sft_eval.yaml",
    "rl": "accelerate launch recipes/grpo.py --config recipes/configs/cpu/grpo.yaml",
    "rl_eval": "accelerate launch recipes/eval.py --config recipes/configs/cpu/rl_eval.yaml",
}


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


def flatten_values(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, written value) of everything in a nested dict; a list of records is only counted."""
    if (missing := find_not_run(value)) is not None:
        yield prefix, f"not run: {missing.reason}"
    elif isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from flatten_values(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield prefix, f"{len(value):,} records"
    else:
        yield prefix, format_named(prefix, value)


@dataclass(frozen=True)
class StageResult:
    """One stage's `results/<stage>.json`; `record` is None while the stage is not finished."""

    stage: str
    record: dict[str, Any] | None
    begun: bool
    run_dir: str

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
        return f"{STAGE_COMMANDS.get(self.stage, 'make speedrun')} --run_dir {self.run_dir}"

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
    results = {}
    for stage in (*STAGES, *(name for name in found if name not in STAGES)):
        record = run.read_result(stage)
        if record is not None and not isinstance(record, dict):
            raise UserError(
                f"{run.result_path(stage)} is damaged (it holds no JSON object); delete it and run its stage again"
            )
        results[stage] = StageResult(stage, record, (folder / f"{stage}.begun").exists(), str(run.run_dir))
    return results
