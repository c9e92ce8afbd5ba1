"""What does CORE ask? The bundle's tasks, their few-shot prompts, and the tokens of each prompt that are scored.

The data, the shuffle, the few-shot draw and the prompts are nanochat's, so that the metric is comparable with its.
Source: karpathy/nanochat nanochat/core_eval.py and scripts/base_eval.py@c75fe54; the metric is DCLM's,
arXiv 2406.11794.
"""

import csv
import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chatmodel.evaluation.batches import common_length
from chatmodel.evaluation.bundle import HOW_TO_GET_BUNDLE, open_bundle
from chatmodel.evaluation.scoring import Request
from chatmodel.runtime import UserError

KINDS = ("multiple_choice", "schema", "language_modeling")
# Of 22 baselines in percent, the three that DCLM corrected after nanochat took them over: the share of the most
# frequent answer where the answers are uneven, else one of the choices.
# Source: mlfoundations/dclm issue 114 (6 Sept 2025).
DCLM_CORRECTIONS = {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0}


@dataclass(frozen=True)
class CoreTask:
    """One task: its examples in the order of nanochat's shuffle, cut to the number asked for.

    `kind` is `multiple_choice` (query, choices, gold), `schema` (context_options, continuation, gold) or
    `language_modeling` (context, continuation). `baseline` is the share of right answers by chance.
    `dclm_baseline` is that in DCLM's corrected table.
    """

    label: str
    kind: str
    num_fewshot: int
    delimiter: str
    baseline: float
    examples: list[dict[str, Any]]

    @property
    def dclm_baseline(self) -> float:
        return 0.01 * DCLM_CORRECTIONS.get(self.label, 100 * self.baseline)


def load_core_tasks(bundle: Path, *, max_per_task: int | None = None) -> Iterator[CoreTask]:
    """The tasks of a bundle (a zip file or a folder: core.yaml, eval_meta_data.csv, eval_data/), one after another.

    Raises:
        UserError: the bundle or a part of it is missing or damaged, or too few examples are left for the few shots.
    """
    if max_per_task is not None and max_per_task < 1:
        raise UserError(f"max_per_task is {max_per_task}; give a number from 1 on, or leave it out for all examples")
    root = open_bundle(bundle)
    try:
        entries = yaml.safe_load((root / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        table = csv.DictReader((root / "eval_meta_data.csv").read_text(encoding="utf-8").splitlines())
        baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in table}
        for entry in entries:
            yield _load_task(root, entry, baselines, max_per_task)
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError, zipfile.BadZipFile) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"the CORE bundle {bundle} is incomplete or damaged ({message}); {HOW_TO_GET_BUNDLE}"
        ) from None


def _load_task(root: Any, entry: dict[str, Any], baselines: dict[str, float], max_per_task: int | None) -> CoreTask:
    label, kind, num_fewshot = entry["label"], entry["icl_task_type"], entry["num_fewshot"][0]
    if kind not in KINDS:
        raise UserError(f"CORE task {label} is of kind {kind}; known kinds are {', '.join(KINDS)}")
    lines = (root / "eval_data" / entry["dataset_uri"]).read_text(encoding="utf-8").strip().split("\n")
    examples = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(examples)
    examples = examples[:max_per_task]
    if len(examples) <= num_fewshot:
        raise UserError(
            f"CORE task {label} shows {num_fewshot} other examples with each one, but {len(examples)} are there;"
            f" set max_per_task to at least {num_fewshot + 1}"
        )
    return CoreTask(label, kind, num_fewshot, entry.get("continuation_delimiter", " "), baselines[label], examples)


def draw_fewshot(task: CoreTask, index: int) -> list[dict[str, Any]]:
    """The other examples shown before example `index`: the same draw as nanochat's from a list without it."""
    drawn = random.Random(1234 + index).sample(range(len(task.examples) - 1), task.num_fewshot)
    return [task.examples[i if i < index else i + 1] for i in drawn]


def render_prompts(task: CoreTask, index: int) -> list[str]:
    """The texts of example `index`: one per choice; for language modelling (without, with) the continuation."""
    shots = "".join(_render_shot(task, shot) + "\n\n" for shot in draw_fewshot(task, index))
    example = task.examples[index]
    if task.kind == "multiple_choice":
        return [f"{shots}{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        tail = f"{task.delimiter}{example['continuation']}"
        return [f"{shots}{context}{tail}" for context in example["context_options"]]
    context = f"{shots}{example['context'].strip()}{task.delimiter}"
    # Without its last blank, which tokenizers join with the word that follows.
    return [context.strip(), f"{context}{example['continuation']}"]


def _render_shot(task: CoreTask, shot: dict[str, Any]) -> str:
    if task.kind == "multiple_choice":
        return f"{shot['query']}{task.delimiter}{shot['choices'][shot['gold']]}"
    if task.kind == "schema":
        return f"{shot['context_options'][shot['gold']]}{task.delimiter}{shot['continuation']}"
    return f"{shot['context'].strip()}{task.delimiter}{shot['continuation']}"


def build_requests(kind: str, encoded: Sequence[Any], *, max_length: int | None = None) -> list[Request]:
    """What is scored of an example's encoded prompts: one request per choice, or one for language modelling.

    The choices of a question share their beginning, so all after it is scored; schema options share their end, which
    is scored; in language modelling it is what the continuation adds. With `max_length`, only the last tokens stay.

    Args:
        encoded: ids of each prompt, as lists or arrays.
    """
    if kind == "schema":
        shared = common_length([ids[::-1] for ids in encoded])
        starts = [len(ids) - shared for ids in encoded]
    else:
        starts = [common_length(encoded)] * len(encoded)
    pairs = list(zip(encoded, starts, strict=True))
    return [_cut(ids, start, max_length) for ids, start in (pairs[1:] if kind == "language_modeling" else pairs)]


def _cut(ids: Any, start: int, max_length: int | None) -> Request:
    removed = 0 if max_length is None else max(0, len(ids) - max_length)
    kept = tuple(ids[removed:]) if isinstance(ids, list) else ids[removed:]
    return Request(kept, max(1, start - removed))
