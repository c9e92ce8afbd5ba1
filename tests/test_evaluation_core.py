"""CORE on a made-up bundle with answers worked by hand, and its prompts, draws and spans."""

import json
import math
import random
import zipfile
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from chatmodel.evaluation.core import estimate_work, evaluate_core, is_right, prepare_ahead
from chatmodel.evaluation.core_tasks import CoreTask, build_requests, draw_fewshot, load_core_tasks, render_prompts
from chatmodel.evaluation.decisions import KeptDecisions
from chatmodel.evaluation.scoring import Request, Score
from chatmodel.evaluation.statistics import center_accuracy
from chatmodel.runtime import UserError

WORDS = [
    "<bos>",
    "the",
    "sky",
    "is",
    "blue",
    "green",
    "grass",
    "red",
    "cat",
    "dog",
    "sat",
    "ran",
    "because",
    "it",
    ":",
]
# P(next | word); what is left is spread evenly over the other words.
NEXT = {
    "is": {"blue": 0.4, "green": 0.25, "red": 0.05},
    "green": {"grass": 0.9},
    "cat": {"sat": 0.6, "ran": 0.1},
    "dog": {"sat": 0.2, "ran": 0.5},
    "because": {"it": 0.9},
    "it": {"ran": 0.3, "sat": 0.5},
    ":": {"blue": 0.7},
    "the": {"cat": 0.3, "sky": 0.2},
}


class BigramModel(nn.Module):
    """Predicts from the last word alone."""

    def __init__(self):
        super().__init__()
        table = torch.zeros(len(WORDS), len(WORDS))
        for row, word in enumerate(WORDS):
            known = NEXT.get(word, {})
            table[row] = (1 - sum(known.values())) / (len(WORDS) - len(known))
            for after, probability in known.items():
                table[row, WORDS.index(after)] = probability
        self.table = nn.Parameter(table.log())

    def forward(self, input_ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.table[input_ids][:, logits_to_keep])


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


TASKS = {
    # Mean losses of (blue | green grass | red): 0.916, (1.386 + 0.105) / 2 = 0.746, 2.996. The mean decides, not the
    # sum: "green grass" wins, right once in two.
    "choose": (
        {"icl_task_type": "multiple_choice"},
        25,
        [
            {"query": "the sky is", "choices": ["blue", "green grass", "red"], "gold": 1},
            {"query": "the sky is", "choices": ["blue", "green grass", "red"], "gold": 0},
        ],
    ),
    # P(sat | cat) = 0.6 against P(sat | dog) = 0.2 for the shared ending "sat"; the ending "ran" is the dog's.
    "refer": (
        {"icl_task_type": "schema"},
        50,
        [
            {"context_options": ["the cat", "the dog"], "continuation": "sat", "gold": 0},
            {"context_options": ["the cat", "the dog"], "continuation": "ran", "gold": 1},
            {"context_options": ["the cat", "the dog"], "continuation": "ran because it sat", "gold": 1},
            {"context_options": ["the cat", "the dog"], "continuation": "sat because it ran", "gold": 1},
        ],
    ),
    # "is" -> blue and "because" -> it -> sat are the likeliest; "ran" is not.
    "finish": (
        {"icl_task_type": "language_modeling", "continuation_delimiter": " : "},
        0,
        [
            {"context": "the sky is  ", "continuation": "blue"},
            {"context": "the sky is", "continuation": "green"},
        ],
    ),
}


@pytest.fixture
def bundle(tmp_path):
    """A folder in the official layout, zipped as the official one is: below `eval_bundle/`."""
    folder = tmp_path / "eval_bundle"
    (folder / "eval_data" / "made_up").mkdir(parents=True)
    entries, rows = [], ["Eval Task,Task Category,Random baseline"]
    for label, (settings, baseline, examples) in TASKS.items():
        uri = f"made_up/{label}.jsonl"
        entries.append({"label": label, "dataset_uri": uri, "num_fewshot": [0], **settings})
        rows.append(f"{label},none,{baseline}")
        (folder / "eval_data" / uri).write_text("".join(json.dumps(example) + "\n" for example in examples))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}, sort_keys=False))
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    with zipfile.ZipFile(tmp_path / "eval_bundle.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    return tmp_path / "eval_bundle.zip"


@pytest.mark.parametrize("place", ["eval_bundle.zip", "eval_bundle", "."])
def test_core_of_a_bundle_worked_by_hand(bundle, tokenizer, place):
    result = evaluate_core(BigramModel(), tokenizer, bundle.parent / place, batch_tokens=8)
    tasks = result["tasks"]
    assert {label: task["accuracy"] for label, task in tasks.items()} == {"choose": 0.5, "refer": 0.75, "finish": 0.5}
    assert tasks["choose"]["centered"] == pytest.approx((0.5 - 0.25) / 0.75)
    assert tasks["refer"]["centered"] == pytest.approx(0.5)
    assert tasks["finish"]["centered"] == 0.5
    # sqrt(p (1 - p) / n), and for centered accuracies divided by (1 - baseline)
    assert tasks["choose"]["stderr"] == pytest.approx(math.sqrt(0.125))
    assert tasks["refer"]["centered_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4) / 0.5)
    assert [task["n"] for task in tasks.values()] == [2, 4, 2]
    assert result["core"] == pytest.approx((1 / 3 + 0.5 + 0.5) / 3)
    stderr = math.sqrt(0.125 / 0.75**2 + (0.75 * 0.25 / 4) / 0.25 + 0.125) / 3
    assert result["stderr"] == pytest.approx(stderr)


def test_the_subset_is_the_beginning_of_nanochats_shuffle(bundle, tokenizer):
    order = list(range(4))
    random.Random(1337).shuffle(order)
    tasks = {task.label: task for task in load_core_tasks(bundle, max_per_task=2)}
    assert tasks["refer"].examples == [TASKS["refer"][2][index] for index in order[:2]]
    result = evaluate_core(BigramModel(), tokenizer, bundle, max_per_task=1)
    assert result["max_per_task"] == 1
    assert [task["n"] for task in result["tasks"].values()] == [1, 1, 1]


def test_without_a_bundle_it_says_what_is_missing(tokenizer):
    result = evaluate_core(BigramModel(), tokenizer, None)
    assert "data absent" in result["not_run"]
    assert "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip" in result["how"]


def make_task(kind, examples, *, num_fewshot=0, delimiter=" "):
    return CoreTask("made_up", kind, num_fewshot, delimiter, 0.0, examples)


def test_prompts_of_the_three_kinds():
    choose = make_task(
        "multiple_choice",
        [{"query": "Q1", "choices": ["x", "y"], "gold": 1}, {"query": "Q2", "choices": ["v", "w"], "gold": 0}],
        num_fewshot=1,
        delimiter="\nAnswer: ",
    )
    assert render_prompts(choose, 0) == ["Q2\nAnswer: v\n\nQ1\nAnswer: x", "Q2\nAnswer: v\n\nQ1\nAnswer: y"]
    refer = make_task("schema", [{"context_options": ["A", "B"], "continuation": "end", "gold": 0}])
    assert render_prompts(refer, 0) == ["A end", "B end"]
    finish = make_task(
        "language_modeling",
        [{"context": " one \n", "continuation": "two"}, {"context": "three", "continuation": "four "}],
        num_fewshot=1,
    )
    assert render_prompts(finish, 0) == ["three four \n\none", "three four \n\none two"]


def test_fewshot_draw_is_that_from_a_list_without_the_example():
    task = make_task("language_modeling", [{"context": str(i)} for i in range(40)], num_fewshot=10)
    for index in (0, 17, 39):
        others = [example for i, example in enumerate(task.examples) if i != index]
        assert draw_fewshot(task, index) == random.Random(1234 + index).sample(others, 10)


def test_spans_of_the_three_kinds():
    choices = [[0, 1, 2, 3], [0, 1, 4], [0, 1, 5, 6, 7]]
    assert build_requests("multiple_choice", choices) == [Request(tuple(ids), 2) for ids in choices]
    # The endings 8 9 are shared; the contexts differ in length.
    assert build_requests("schema", [[0, 1, 2, 8, 9], [0, 3, 8, 9]]) == [
        Request((0, 1, 2, 8, 9), 3),
        Request((0, 3, 8, 9), 2),
    ]
    assert build_requests("language_modeling", [[0, 1, 2], [0, 1, 2, 3, 4]]) == [Request((0, 1, 2, 3, 4), 3)]


def test_long_prompts_keep_their_end():
    assert build_requests("multiple_choice", [[0, 1, 2, 3], [0, 1, 9]], max_length=3) == [
        Request((1, 2, 3), 1),
        Request((0, 1, 9), 2),
    ]
    assert build_requests("language_modeling", [[0], [0, 1, 2, 3, 4]], max_length=2) == [Request((3, 4), 1)]


def test_the_first_of_equal_choices_wins():
    assert is_right("multiple_choice", [Score(1.0, False), Score(1.0, False)], 0)
    assert not is_right("schema", [Score(1.0, False), Score(1.0, False)], 1)
    # What Python's min makes of NaN, as nanochat's decision does.
    assert is_right("multiple_choice", [Score(1.0, False), Score(math.nan, True), Score(0.5, False)], 2)
    assert is_right("language_modeling", [Score(9.0, True)], None)


def test_bad_bundles_get_one_sentence(bundle, tmp_path):
    def load(path, **options):
        return list(load_core_tasks(path, **options))

    with pytest.raises(UserError, match=r"missing\.zip does not exist; `curl"):
        load(tmp_path / "missing.zip")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="neither a folder nor a zip file"):
        load(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no core\.yaml"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="max_per_task is 0"):
        load(bundle, max_per_task=0)
    folder = tmp_path / "eval_bundle"
    (folder / "eval_data" / "made_up" / "refer.jsonl").unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        load(folder)
    (folder / "eval_data" / "made_up" / "choose.jsonl").write_text("{broken")
    with pytest.raises(UserError, match="incomplete or damaged"):
        load(folder)


def test_too_few_examples_for_the_shots(bundle, tmp_path):
    path = tmp_path / "eval_bundle" / "core.yaml"
    path.write_text(path.read_text().replace("- 0", "- 3"))
    with pytest.raises(UserError, match="set max_per_task to at least 4"):
        list(load_core_tasks(tmp_path / "eval_bundle", max_per_task=3))


@pytest.mark.data
def test_the_official_bundle_has_22_tasks(data_root, tokenizer):
    tasks = list(load_core_tasks(data_root / "eval_bundle.zip"))
    assert len(tasks) == 22
    assert sum(len(task.examples) for task in tasks) == 91_037


def test_a_second_start_decides_only_what_is_left(bundle, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "base.decisions"

    class Crash(BigramModel):
        def forward(self, input_ids, **kwargs):
            if input_ids.shape[1] == 6 and WORDS.index(":") in input_ids[0]:  # a prompt of the last task
                raise RuntimeError("the machine went away")
            return super().forward(input_ids, **kwargs)

    with pytest.raises(RuntimeError, match="went away"):
        evaluate_core(Crash(), tokenizer, bundle, kept=KeptDecisions(path, model_key="m"))
    assert [task["task"] for task in json.loads(path.read_text())["tasks"].values()] == ["choose", "refer"]
    seen = []

    class Watched(BigramModel):
        def forward(self, input_ids, **kwargs):
            seen.append(input_ids)
            return super().forward(input_ids, **kwargs)

    caplog.clear()
    result = evaluate_core(Watched(), tokenizer, bundle, kept=KeptDecisions(path, model_key="m"))
    assert all(WORDS.index(":") in ids for ids in seen)
    assert "CORE: 2 of 3 tasks are decided already, as" in caplog.text
    fresh = evaluate_core(BigramModel(), tokenizer, bundle)
    assert result["core"] == fresh["core"]
    assert [t["decisions"] for t in result["tasks"].values()] == [t["decisions"] for t in fresh["tasks"].values()]
    # Other examples, other decisions: the file's are not taken.
    evaluate_core(Watched(), tokenizer, bundle, max_per_task=1, kept=KeptDecisions(path, model_key="m"))
    assert any(WORDS.index("blue") == ids[0, -1] for ids in seen)


def test_both_tables_of_baselines():
    """Of 0.5 right: by nanochat's 20 % it is 0.375 above chance, by DCLM's 40.3 % only 0.162."""
    task = CoreTask("commonsense_qa", "multiple_choice", 0, " ", 0.2, [])
    assert center_accuracy(0.5, task.baseline) == pytest.approx(0.375)
    assert center_accuracy(0.5, task.dclm_baseline) == pytest.approx((0.5 - 0.403) / 0.597)
    assert CoreTask("piqa", "multiple_choice", 0, " ", 0.5, []).dclm_baseline == 0.5


def test_work_counts_what_choices_share_once():
    task = make_task("multiple_choice", [{"query": "12345", "choices": ["abc", "abd", "x"], "gold": 0}] * 20)
    # "12345 abc" is 9 characters, of the others "d" and "x" are new.
    assert estimate_work(task) == 20 * (9 + 1 + 1)


def test_chunks_are_prepared_in_order_and_ahead():
    made = []

    def prepare(n):
        made.append(n)
        return n * n

    results = prepare_ahead(prepare, range(6))
    assert next(results) == 0
    assert list(results) == [1, 4, 9, 16, 25]
    assert made == [0, 1, 2, 3, 4, 5]


@pytest.mark.data
def test_dclms_corrections_are_the_shares_of_the_most_frequent_answer_or_of_a_choice(data_root):
    tasks = {task.label: task for task in load_core_tasks(data_root / "eval_bundle.zip")}
    golds = [example["gold"] for example in tasks["commonsense_qa"].examples]
    assert round(golds.count(2) / len(golds), 3) == pytest.approx(tasks["commonsense_qa"].dclm_baseline) == 0.403
    for label in ("agi_eval_lsat_ar", "bigbench_language_identification"):
        assert {len(example["choices"]) for example in tasks[label].examples} == {4}
        assert tasks[label].dclm_baseline == 0.25
