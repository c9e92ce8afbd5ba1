"""How much of a benchmark stands in the training text? Shared runs of words, per task of CORE and ChatCORE.

An example is touched when a run of 13 of its words is in the training text, and covered when 70 % of its runs of 8
are. Sources: GPT-3, arXiv 2005.14165, appendix C (13-grams); PaLM, arXiv 2204.02311, section 8 (70 % of 8-grams).
"""

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chatmodel.data.encoding import cut_texts
from chatmodel.evaluation.chat_tasks import BASELINES, ChatExample, load_chat_examples
from chatmodel.evaluation.core_tasks import CoreTask, load_core_tasks
from chatmodel.evaluation.ngrams import Hashes, Numbers, hash_ngrams, hash_words, write_ngram
from chatmodel.evaluation.statistics import binomial_stderr, pack_decisions, unpack_decisions
from chatmodel.workers import run_in_order

# Characters hashed at a time: temporary arrays take about forty bytes each.
BATCH_CHARS = 2_000_000
# An n-gram in more examples of a task than this is the task's own wording ("Choose the right answer"), not a question.
WORDING_SHARE, WORDING_COUNT = 0.05, 10
FILTER_BITS = 24
COVERED_SHARE = 0.7


@dataclass(frozen=True)
class Rule:
    """When an example counts as contaminated: at least this share of its n-grams (0: any) is in the text."""

    name: str
    n: int
    share: float


RULES = (Rule("touched", 13, 0.0), Rule("touched_8", 8, 0.0), Rule("covered", 8, COVERED_SHARE))


@dataclass
class NgramIndex:
    """The n-grams of all examples, and how often each has been seen.

    `hashes` (U,) are sorted and different; `ngrams` (E,) are indices into them, one for each n-gram of an example and
    `examples` (E,) which example, counted over all tasks. `table` says which leading bits occur at all.
    """

    n: int
    hashes: Hashes
    ngrams: Numbers
    examples: Numbers
    table: Any
    seen: Numbers
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, hashes: Hashes) -> None:
        """Note the n-grams of a text."""
        candidates = hashes[self.table[hashes >> np.uint64(64 - FILTER_BITS)]]
        places = np.searchsorted(self.hashes, candidates)
        places = np.minimum(places, len(self.hashes) - 1)
        found, counts = np.unique(places[self.hashes[places] == candidates], return_counts=True)
        with self.lock:
            self.seen[found] += counts


def read_benchmarks(bundle: Path | None, chatcore: Path | None) -> dict[str, list[str]]:
    """The text of each example, question and right answer, by task: those of CORE, then "ChatCORE ...".

    The order is that of the evaluation, so that its decisions belong to the same examples.
    """
    texts: dict[str, list[str]] = {}
    if bundle is not None:
        for task in load_core_tasks(bundle):
            texts[task.label] = [write_core_example(task, example) for example in task.examples]
    if chatcore is not None:
        for name in BASELINES:
            examples = load_chat_examples(name, folder=chatcore)
            texts[f"ChatCORE {name}"] = [write_chat_example(name, example) for example in examples]
    return texts


def write_core_example(task: CoreTask, example: Mapping[str, Any]) -> str:
    """Question and right answer, without the examples shown before them."""
    if task.kind == "multiple_choice":
        return f"{example['query']} {example['choices'][example['gold']]}"
    if task.kind == "schema":
        return f"{example['context_options'][example['gold']]} {example['continuation']}"
    return f"{example['context']} {example['continuation']}"


def write_chat_example(name: str, example: ChatExample) -> str:
    """Question and right answer, without the wording that the prompt puts around them."""
    row = example.row
    if name.startswith("ARC"):
        answer = row["choices"]["text"][list(row["choices"]["label"]).index(row["answerKey"])]
        return f"{row['question']} {answer}"
    if name == "MMLU":
        return f"{row['question']} {row['choices'][row['answer']]}"
    if name == "GSM8K":
        return f"{row['question']} {re.sub(r'<<[^>]*>>', '', row['answer'])}"
    return write_messages(example.messages)


def write_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """All text of a conversation."""
    contents = (message["content"] for message in messages)
    return "\n".join(
        content if isinstance(content, str) else "".join(part["text"] for part in content) for content in contents
    )


def build_index(benchmarks: Mapping[str, Sequence[str]], n: int) -> NgramIndex:
    """The n-grams of all examples, without those that are a task's own wording."""
    parts = []
    first = 0
    for texts in benchmarks.values():
        hashes, examples = _hash_task(texts, n)
        parts.append((hashes, examples + first))
        first += len(texts)
    unique, ids = np.unique(np.concatenate([hashes for hashes, _ in parts]), return_inverse=True)
    table = np.zeros(1 << FILTER_BITS, dtype=bool)
    table[unique >> np.uint64(64 - FILTER_BITS)] = True
    examples = np.concatenate([examples for _, examples in parts])
    return NgramIndex(n, unique, ids, examples, table, np.zeros(len(unique), dtype=np.int64))


def _hash_task(texts: Sequence[str], n: int) -> tuple[Hashes, Numbers]:
    """Different n-grams of each example of a task, and the example of each."""
    found = []
    begin = 0
    for batch in cut_texts(texts, num_chars=BATCH_CHARS):
        words = hash_words(batch)
        ngrams = hash_ngrams(words, n)
        found.append((ngrams.hashes, words.texts[ngrams.positions] + begin))
        begin += len(batch)
    hashes = np.concatenate([hashes for hashes, _ in found])
    examples = np.concatenate([examples for _, examples in found])
    order = np.lexsort((examples, hashes))
    hashes, examples = hashes[order], examples[order]
    again = (hashes[1:] == hashes[:-1]) & (examples[1:] == examples[:-1])
    first = np.concatenate([[True], ~again])[: len(hashes)]
    hashes, examples = hashes[first], examples[first]
    _, ids, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = counts[ids] <= max(WORDING_COUNT, WORDING_SHARE * len(texts))
    return hashes[rare], examples[rare]


def scan_texts(texts: Iterable[str], indices: Sequence[NgramIndex], *, num_workers: int) -> dict[str, int]:
    """Count the n-grams of training text in the indices; gives how many `documents`, `words` and `chars` were read.

    NumPy leaves the interpreter to others while it works, so threads do; a few batches are in memory at a time.
    """
    totals = {"documents": 0, "words": 0, "chars": 0}

    def work(batch: list[str]) -> int:
        words = hash_words(batch)
        for index in indices:
            index.count(hash_ngrams(words, index.n).hashes)
        return len(words.hashes)

    with ThreadPoolExecutor(num_workers) as pool:
        batches = cut_texts(texts, num_chars=BATCH_CHARS)
        for batch, words in run_in_order(batches, lambda batch: pool.submit(work, batch), ahead=2 * num_workers):
            totals["documents"] += len(batch)
            totals["chars"] += sum(map(len, batch))
            totals["words"] += words.result()
    return totals


def judge_examples(index: NgramIndex, rule: Rule, num_examples: int) -> tuple[Any, Any]:
    """(has an n-gram at all, is contaminated), both (examples,) of truth values, over all tasks."""
    sizes = np.bincount(index.examples, minlength=num_examples)
    hits = np.bincount(index.examples, weights=index.seen[index.ngrams] > 0, minlength=num_examples)
    return sizes > 0, (hits > 0) & (hits >= rule.share * sizes)


def report_contamination(
    benchmarks: Mapping[str, Sequence[str]],
    indices: Sequence[NgramIndex],
    *,
    decisions: Mapping[str, Sequence[bool]] | None = None,
    num_samples: int = 3,
) -> dict[str, dict[str, Any]]:
    """Per task: `n`; per rule how many examples are long enough to be `checked`, and of those found, their `share` and
    which (`examples`, packed as decisions are); some n-grams that were found; accuracy on the found and the others.

    Args:
        decisions: of an evaluation, by task: right or wrong for each example, or for the first ones.
    """
    total = sum(map(len, benchmarks.values()))
    by_n = {index.n: index for index in indices}
    judged = {rule.name: judge_examples(by_n[rule.n], rule, total) for rule in RULES if rule.n in by_n}
    report: dict[str, dict[str, Any]] = {}
    first = 0
    for name, texts in benchmarks.items():
        span = slice(first, first + len(texts))
        report[name] = {"n": len(texts)}
        for rule, (has_ngrams, dirty) in judged.items():
            checked = int(has_ngrams[span].sum())
            report[name][rule] = {
                "checked": checked,
                "found": int(dirty[span].sum()),
                "share": int(dirty[span].sum()) / checked if checked else None,
                "examples": pack_decisions(dirty[span].tolist()),
            }
            if decisions and name in decisions:
                report[name][rule] |= split_accuracy(dirty[span], decisions[name])
        samples = (write_samples(texts, index, num_samples) for index in indices)
        report[name]["samples"] = next(filter(None, samples), [])
        first += len(texts)
    return report


def split_accuracy(dirty: Any, right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy, standard error and number of the evaluated examples that are clean, and of those that are not."""
    answers = np.asarray(right, dtype=np.float64)
    parts = {"clean": answers[~dirty[: len(answers)]], "dirty": answers[dirty[: len(answers)]]}
    return {
        f"accuracy_{name}": {"accuracy": float(part.mean()), "n": len(part)}
        | {"stderr": binomial_stderr(float(part.mean()), len(part))}
        for name, part in parts.items()
        if len(part)
    }


def write_samples(texts: Sequence[str], index: NgramIndex, num_samples: int) -> list[str]:
    """N-grams that were found in the training text, of different examples, the first ones of the task."""
    samples: list[str] = []
    for batch in cut_texts(texts, num_chars=BATCH_CHARS):
        words = hash_words(batch)
        ngrams = hash_ngrams(words, index.n)
        places = np.minimum(np.searchsorted(index.hashes, ngrams.hashes), max(0, len(index.hashes) - 1))
        found = ngrams.positions[(index.hashes[places] == ngrams.hashes) & (index.seen[places] > 0)]
        _, firsts = np.unique(words.texts[found], return_index=True)
        for position in found[firsts][: num_samples - len(samples)]:
            samples.append(write_ngram(words, int(position), index.n))
        if len(samples) == num_samples:
            break
    return samples


def read_decisions(metrics: Mapping[str, Any]) -> dict[str, list[bool]]:
    """The decisions of an evaluation, by the names that `read_benchmarks` gives."""
    found: dict[str, list[bool]] = {}
    for part, prefix in (("core", ""), ("chatcore", "ChatCORE ")):
        for name, task in (metrics.get(part) or {}).get("tasks", {}).items():
            if "decisions" in task:
                found[prefix + name] = unpack_decisions(task["decisions"], task["n"])
    return found


def render_contamination(report: Mapping[str, Mapping[str, Any]], totals: Mapping[str, int]) -> str:
    """The report as a Markdown table, with an n-gram of each task that was found."""
    rules = [rule for rule in RULES if all(rule.name in task for task in report.values())]
    heads = {"touched": "13 words", "touched_8": "8 words", "covered": "70 % of 8 words"}
    measured = [rule.name for rule in rules if any("accuracy_clean" in task[rule.name] for task in report.values())]
    columns = ["task", "examples", *(heads[rule.name] for rule in rules)]
    columns += [f"accuracy clean / found ({heads[name]})" for name in measured[:1]] + ["for example"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 2) + "---|"]
    for name, task in report.items():
        cells = [name, f"{task['n']:,}", *(_format_share(task[rule.name]) for rule in rules)]
        cells += [_format_split(task[rule]) for rule in measured[:1]]
        lines.append("| " + " | ".join([*cells, *(task["samples"][:1] or [""])]) + " |")
    counts = f"{totals['documents']:,} documents, {totals['words']:,} words, {totals['chars']:,} characters of text."
    return "\n".join([*lines, "", counts])


def _format_share(found: Mapping[str, Any]) -> str:
    if found["share"] is None:
        return "too short"
    return f"{100 * found['share']:.1f} % ({found['found']:,} of {found['checked']:,})"


def _format_split(found: Mapping[str, Any]) -> str:
    texts = []
    for part in ("accuracy_clean", "accuracy_dirty"):
        value = found.get(part)
        texts.append(f"{value['accuracy']:.3f} ± {value['stderr']:.3f} ({value['n']:,})" if value else "-")
    return " / ".join(texts)
