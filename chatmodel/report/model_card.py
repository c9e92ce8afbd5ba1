"""The model card of a finished stage: what it is, how to use it, and the run's numbers, also as the Hub reads them."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from chatmodel.export.folders import read_card
from chatmodel.report.as_markdown import write_section
from chatmodel.report.chat_sections import build_chat_evaluation
from chatmodel.report.document import Block, Facts, Section, Table
from chatmodel.report.formats import NOT_RECORDED, format_count, format_decimal
from chatmodel.report.pretraining_sections import build_base_evaluation
from chatmodel.report.results import (
    StageResult,
    describe_context,
    find_not_run,
    load_results,
    pick,
    pick_named,
    pick_number,
)
from chatmodel.report.tables import read_accuracy
from chatmodel.runs import Run
from chatmodel.runtime import UserError

TRAINING_STAGES = ("tokenizer", "base", "mid", "sft", "rl")
CALLS = {
    "base": 'print(pipe("The library", max_new_tokens=64)[0]["generated_text"])',
    "chat": 'question = [{"role": "user", "content": "What is 27 + 48?"}]\n'
    'print(pipe(question, max_new_tokens=64)[0]["generated_text"][-1]["content"])',
}
USAGE = """## How to use it

```python
from transformers import pipeline

pipe = pipeline("text-generation", "{name}", trust_remote_code=True)
{call}
```

`trust_remote_code=True` runs the Python files of this repository; read them first. Where the package `chatmodel` is
installed, `import chatmodel` does without. The context is {context} tokens, prompt and answer together."""


def write_model_card(run: Run, stage: str, *, name: str) -> str:
    """The README of `run`'s model of `stage` (base, mid, sft or rl), as it is to stand in the Hub's repository `name`.

    Raises:
        UserError: the stage is not finished, or was not evaluated, so that there are no numbers.
    """
    results = load_results(run)
    trained, evaluated = (results[key] for key in (stage, f"{stage}_eval"))
    for result in (trained, evaluated):
        if result.record is None:
            raise UserError(f"{result.stage} of {run.run_dir} is not finished; finish it with: {result.how}")
    build = build_base_evaluation if stage == "base" else lambda found: build_chat_evaluation(found, stage)
    context = pick_number(results["base"].metrics, "plan", "model", "max_position_embeddings")
    usage = {"name": name, "call": CALLS["base" if stage == "base" else "chat"], "context": format_count(context)}
    parts = [
        write_header(name, evaluated.metrics),
        f"# {name.rpartition('/')[2]}",
        *read_card(run.folder(stage)),
        USAGE.format(**usage),
        write_section(build(results)),
        write_section(Section("Training", describe_training(results, stage))),
    ]
    return "\n\n".join(parts) + "\n"


def write_header(name: str, metrics: dict[str, Any]) -> str:
    """The YAML block that the Hub reads: library, task, tags, and every measured share as a result of the model."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"chatmodel-{task.lower()}",  # results of one data set would become one
            dataset_name=task,
            metric_type="accuracy",
            metric_name="share right" if n is None else f"share right of {n:,}",
            metric_value=round(share, 4),
        )
        for task, share, n in measured_shares(metrics)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["chatmodel"],
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def measured_shares(metrics: dict[str, Any]) -> list[tuple[str, float, int | None]]:
    """(task, share right, number of examples if it is known) of every task that was run, of all benchmarks."""
    tasks: dict[str, Any] = {}
    for benchmark in ("core", "chatcore"):
        tasks |= pick_named(metrics, benchmark, "tasks")
    tasks |= pick_named(metrics, "skills")
    read = {name: read_accuracy(task) for name, task in tasks.items() if find_not_run(task) is None}
    return [(name, share, n) for name, (share, _, n) in read.items() if share is not None]


def describe_training(results: dict[str, StageResult], stage: str) -> list[Block]:
    """The model's size, its validation loss, and the command of every stage that made it."""
    base = results["base"].metrics
    facts = [
        ("Parameters", format_count(pick_number(base, "parameters"))),
        ("Pretraining tokens", format_count(pick_number(base, "train_tokens"))),
        (
            f"Validation bits per byte after pretraining{describe_context(base)}",
            format_decimal(pick_number(base, "val_bpb_final")),
        ),
    ]
    rows = [
        (
            each.stage,
            str(pick(each.record, "environment", "git", "commit") or NOT_RECORDED),
            each.command or NOT_RECORDED,
        )
        for each in (results[name] for name in TRAINING_STAGES[: TRAINING_STAGES.index(stage) + 1])
        if each.record is not None
    ]
    return [Facts(facts), Table(("Stage", "Commit", "Command"), rows, num_text_columns=3)]
