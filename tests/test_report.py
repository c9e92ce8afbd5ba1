"""The report of runs that are incomplete, damaged or full of awkward text."""

import importlib.util
import json
import random
import re
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from test_report_seed import seed_records, write_run

from chatmodel.report import render_report
from chatmodel.report.as_html import write_html
from chatmodel.report.as_markdown import write_markdown
from chatmodel.report.code_size import find_repository
from chatmodel.report.document import Document, Facts, NotRun, Section, Table, Transcript
from chatmodel.report.model_card import describe_training
from chatmodel.report.render import build_document
from chatmodel.report.results import DEFAULT_CONFIGS, STAGE_COMMANDS, load_results
from chatmodel.runs import STAGE_INPUTS, Run
from chatmodel.runtime import UserError, entry_point, write_json

VOID = {"meta", "img", "br"}
NASTY = (
    "a|b <script>alert('x')</script> ``` `c` [l](u) *b* _e_ $x$ \\| &amp; ~~s~~\n\n# head\n| x |\x1b[31m\u202e\ud800"
)


class Page(HTMLParser):
    """Checks that tags are balanced, and collects the text of each table row, and of each element with its tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key == "src"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.handle_data("\n")
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data


def shown(text: str) -> str:
    return text.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\ud800", "\\ud800")


def nasty_document() -> Document:
    blocks = [
        Facts([("key", NASTY), (NASTY, "value")], NASTY),
        Table(("Name", "Text", "Number"), [("one", NASTY, "1"), (NASTY, "two", "2")], num_text_columns=2),
        NotRun(NASTY, NASTY, NASTY),
        Transcript(NASTY, [("assistant", NASTY), (NASTY, "end")]),
    ]
    return Document(NASTY, NASTY, [Section("Nasty", blocks), Section("After", [Table(("A",), [("last",)])])])


def test_awkward_text_breaks_no_html():
    page = Page(write_html(nasty_document(), {}))
    assert "script" not in page.tags
    assert page.rows == [
        ["Name", "Text", "Number"],
        ["one", shown(NASTY), "1"],
        [shown(NASTY), "two", "2"],
        ["A"],
        ["last"],
    ]
    # The parser, unlike a browser, keeps the line break that opens a <pre>.
    assert page.texts["pre"] == ["\n" + shown(NASTY), "\nend"]
    assert page.texts["dd"] == [shown(NASTY), "value"]


def test_awkward_text_breaks_no_markdown():
    """Read back by an independent CommonMark parser: same structure, same text."""
    text = write_markdown(nasty_document())
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    page = Page(re.sub(r"<(hr|br) ?/?>", "<br>", rendered))
    assert "script" not in page.tags
    assert not {"em", "strong", "a", "s"} & {*page.tags} - {"strong"}
    assert page.texts["h2"] == ["Nasty", "After"]
    assert page.rows == [
        ["Name", "Text", "Number"],
        ["one", shown(NASTY), "1"],
        [shown(NASTY), "two", "2"],
        ["A"],
        ["last"],
    ]
    assert f"assistant: {shown(NASTY)}\n\n{shown(NASTY)}: end\n" in page.texts["code"]


def test_awkward_samples_reach_both_files(tmp_path):
    records = seed_records()
    records["base_eval"]["metrics"]["samples"] = [{"prompt": "p|q", "completion": "<b>|\n```\n"}]
    parts = [{"type": "text", "text": "I count: "}, {"type": "python", "text": "'<i>'.count('i')"}]
    messages = [{"role": "user", "content": "How many `i`?"}, {"role": "assistant", "content": parts}]
    records["sft_eval"]["metrics"]["samples"] = [{"messages": messages}]
    records["rl"]["metrics"]["completions"] = [{"prompt": messages[:1], "completion": "<|x|> 3", "reward": 1.0}]
    markdown, page = render_report(write_run(tmp_path, records))
    assert r"| 0 | p\|q | &lt;b&gt;\|<br>\`\`\`<br> |" in markdown.read_text()
    assert "assistant: I count: ⟨python: '<i>'.count('i')⟩" in markdown.read_text()
    assert "Completion 1 after RL: reward 1.0000" in markdown.read_text()
    parsed = Page(page.read_text())
    assert ["0", "p|q", "<b>|\n```\n"] in parsed.rows
    assert "\nI count: ⟨python: '<i>'.count('i')⟩" in parsed.texts["pre"]
    assert "\nHow many `i`?" in parsed.texts["pre"]


def test_page_is_self_contained_and_plots_are_drawn(tmp_path):
    records = seed_records()
    points = [{"step": i, "loss": 3 - i / 10, "reward": i / 10, "completion_length": 9} for i in range(8)]
    for stage in ("mid", "sft", "rl"):
        records[stage]["metrics"]["history"] = points
    markdown, page = render_report(write_run(tmp_path, records))
    plots = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in plots] == ["base_loss.svg", "mid_loss.svg", "rl_reward.svg", "sft_loss.svg"]
    for path in plots:
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        assert f"](plots/{path.name})" in markdown.read_text()
    sources = Page(page.read_text()).sources
    assert len(sources) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    # First quarter of eight rewards 0.0 ... 0.7: mean 0.05, standard error 0.0707 / sqrt(2); last: 0.65.
    assert "| first quarter | 2 | 0.0500 ± 0.0500 |" in markdown.read_text()
    assert "| last quarter | 2 | 0.6500 ± 0.0500 |" in markdown.read_text()


def test_the_same_results_draw_the_same_plots(tmp_path):
    run = write_run(tmp_path, seed_records())
    render_report(run)
    first = (tmp_path / "plots" / "base_loss.svg").read_bytes()
    render_report(run)
    assert (tmp_path / "plots" / "base_loss.svg").read_bytes() == first


def test_only_the_tokenizer_is_finished(tmp_path):
    run = write_run(tmp_path, {"tokenizer": seed_records()["tokenizer"]})
    write_json(run.folder("results") / "base.begun", {"settings": {}})
    text = render_report(run)[0].read_text()
    assert "vocab_size: 65,536" in text
    assert "not run: stage base was begun and is not finished. To get it: `python recipes/pretrain.py" in text
    assert text.count("not run: the stage was not started. To get it: `") == 8  # loss and evaluation share base_eval
    assert f"--run_dir {tmp_path}`" in text
    assert "| CORE | - | - | - | - |" in text


def test_measurement_that_was_not_run_says_why(tmp_path):
    records = seed_records()
    absent = {"not_run": "data absent", "how": "python scripts/prepare_data.py --chatcore"}
    records["mid_eval"]["metrics"]["chatcore"]["tasks"] |= {"MMLU": absent, "GSM8K": absent}
    records["sft_eval"]["metrics"]["chatcore"]["tasks"] |= {"MMLU": absent, "GSM8K": absent}
    records["mid_eval"]["metrics"]["chatcore"]["chatcore"] = None
    skills = {"not_run": "none taught", "how": "name some with `--skills`, evaluate again"}
    records["sft_eval"]["metrics"]["skills"] = skills
    records["base_eval"]["metrics"]["core"] = {"not_run": "no bundle", "how": "make bundle"}
    records["tokenizer"]["metrics"]["comparison"] |= {"not_run": "GPT-4 is not reachable", "how": "go online"}
    for text in records["tokenizer"]["metrics"]["comparison"]["texts"]:
        text["gpt4"] = None
    text = render_report(write_run(tmp_path, records))[0].read_text()
    how = "To get it: `python scripts/prepare_data.py --chatcore`"
    assert f"MMLU, GSM8K not run: data absent. {how}" in text
    assert f"MMLU, GSM8K (MID, SFT) not run: data absent. {how}" in text
    assert "ChatCORE metric: not run: some of its tasks were not run" in text
    assert "CORE not run: no bundle. To get it: `make bundle`" in text
    assert "| CORE | not run | - | - | - |" in text
    assert "| ChatCORE | - | not run | 0.0079 | - |" in text
    assert "Taught skills not run: none taught. To get it: name some with `--skills`, evaluate again" in text
    assert "Comparison with GPT-2" in text
    assert "Comparison with GPT-4" not in text
    assert "Comparison not run: GPT-4 is not reachable. To get it: `go online`" in text


def test_accuracies_have_standard_errors_and_skills_their_chance(tmp_path):
    records = seed_records()
    task = {"accuracy": 0.2685, "centered": 0.0247, "stderr": 0.0091, "n": 2376, "seconds": 95.0}
    records["sft_eval"]["metrics"]["chatcore"]["tasks"]["ARC-Easy"] = task
    records["sft_eval"]["metrics"]["skills"] = {"spelling": {"accuracy": 0.9, "correct": 90, "n": 100, "chance": 0.1}}
    records["rl"]["metrics"]["pass_at_1"] = {"before": {"correct": 20, "n": 100}, "after": {"correct": 50, "n": 100}}
    text = render_report(write_run(tmp_path, records))[0].read_text()
    assert "| ARC-Easy | 0.2685 ± 0.0091 | 0.0247 | 2,376 | 1.6 min |" in text
    assert "| ARC-Easy | - | 0.2685 | 0.2685 ± 0.0091 (n = 2,376) | - |" in text
    # sqrt(0.9 * 0.1 / 100) = 0.03
    assert "| spelling | 0.9000 ± 0.0300 | 90 / 100 | 0.1000 | +0.8000 | &lt; 1e-9 |" in text
    assert "| skill: spelling | - | - | 0.9000 ± 0.0300 (n = 100) | - |" in text
    # sqrt(0.2 * 0.8 / 100) = 0.04; sqrt(0.5 * 0.5 / 100) = 0.05; together 0.0640
    assert "| before RL | 0.2000 ± 0.0400 | 20 / 100 |" in text
    assert "| after RL | 0.5000 ± 0.0500 | 50 / 100 |" in text
    assert "| change | +0.3000 ± 0.0640 |  |" in text
    assert "| RL pass@1 (gsm8k) | - | - | 0.2000 ± 0.0400 (n = 100) | 0.5000 ± 0.0500 (n = 100) |" in text


def test_stages_on_different_machines_are_told_apart(tmp_path):
    records = {stage: seed_records()[stage] for stage in ("tokenizer", "base")}
    records["base"] = json.loads(json.dumps(records["base"]))
    records["base"]["environment"]["hardware"]["gpus"] = [{"name": "H200", "memory_gib": 140}] * 8
    text = render_report(write_run(tmp_path, records))[0].read_text()
    assert "GPUs: 1x NVIDIA GeForce RTX 5090 (31.8 GiB) (tokenizer); 8x H200 (140.0 GiB) (base)" in text


def test_a_validation_number_says_what_a_token_saw(tmp_path):
    records = seed_records()
    for within, words in ((True, "within documents"), (False, "over whole rows")):
        records["base"]["metrics"]["val_bpb_within_documents"] = within
        run = write_run(tmp_path / words, records)
        text = render_report(run)[0].read_text()
        assert f"Final validation bpb, {words}: 0.9539" in text
        assert "val_bpb_within_documents" not in text
        card = describe_training(load_results(run), "base")
        assert card[0].rows[-1] == (f"Validation bits per byte after pretraining, {words}", "0.9539")


def test_other_result_files_are_shown(tmp_path):
    records = {"tokenizer": seed_records()["tokenizer"], "lm_eval": {"metrics": {"arc": {"acc": 0.25}}}}
    text = render_report(write_run(tmp_path, records))[0].read_text()
    assert "## Other results: lm_eval" in text
    assert "- arc.acc: 0.2500" in text


ODD_VALUES = [None, "text", [], {}, {"not_run": "odd", "how": None}, -1, float("nan"), float("inf"), True, [1], [{}]]


def spoil(value, draw: random.Random):
    """The value with some of its parts removed or replaced by something unexpected."""
    if draw.random() < 0.04:
        return draw.choice(ODD_VALUES)
    if isinstance(value, dict):
        return {key: spoil(item, draw) for key, item in value.items() if draw.random() > 0.04}
    return [spoil(item, draw) for item in value[:8]] if isinstance(value, list) else value


def test_no_odd_or_missing_value_stops_the_report(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    written = []
    for seed in range(60):
        draw = random.Random(seed)
        records = {}
        for stage, record in seed_records().items():
            spoiled = spoil(record, draw)
            records[stage] = spoiled if isinstance(spoiled, dict) else {}
        run = write_run(tmp_path / str(seed), records)
        document = build_document(load_results(run), 2.0, "odd", tmp_path)
        written.append(write_markdown(document))
        Page(write_html(document, {figure.name: b"" for figure in document.figures}))
    assert "not recorded" in "".join(written)


def test_stage_without_any_numbers_is_reported_as_not_recorded(tmp_path):
    text = render_report(write_run(tmp_path, {stage: {} for stage in STAGE_INPUTS}))[0].read_text()
    assert "Number of parameters: not recorded" in text
    assert "val bpb, over whole rows: not recorded" in text
    assert "not run" not in text


@pytest.mark.parametrize("content", ['{"metrics": ', "[1, 2]"])
def test_damaged_result_is_named(tmp_path, content):
    run = write_run(tmp_path, {"tokenizer": seed_records()["tokenizer"]})
    run.result_path("base").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(run.result_path("base")))):
        render_report(run)


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        render_report(Run(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_negative_rate_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"hourly_rate is -1\.0"):
        render_report(write_run(tmp_path, seed_records()), hourly_rate=-1.0)


def load_recipe():
    path = Path(__file__).parents[1] / "recipes" / "report.py"
    spec = importlib.util.spec_from_file_location("report_recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["report_recipe"] = recipe
    spec.loader.exec_module(recipe)
    return recipe


def test_recipe_writes_both_files_and_names_them(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path, seed_records())
    monkeypatch.setattr(sys, "argv", ["report.py", "--run_dir", str(tmp_path), "--hourly_rate", "3"])
    load_recipe().main()
    assert capsys.readouterr().out.splitlines() == [str(run.folder("report.md")), str(run.folder("report.html"))]
    assert r"\$3.00 / hour" in run.folder("report.md").read_text()


def test_recipe_without_results_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--run_dir", str(tmp_path / "typo")])
    with pytest.raises(SystemExit, match="2"):
        entry_point(load_recipe().main)
    assert capsys.readouterr().err.startswith("error: there is nothing to report: ")


def test_commands_name_the_configs_of_the_finished_stages(tmp_path):
    root = find_repository()
    records = {"tokenizer": seed_records()["tokenizer"]}
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "midtrain.yaml").touch()
    made_by = f"{root}/recipes/train_tokenizer.py --config {configs}/tokenizer.yaml"
    records["tokenizer"]["command"] = f"python {made_by}"
    text = render_report(write_run(tmp_path, records))[0].read_text()
    assert f"made by `python recipes/train_tokenizer.py --config {configs}/tokenizer.yaml`" in text
    assert f"`python recipes/sft.py --config {configs}/midtrain.yaml --run_dir {tmp_path} --stage mid`" in text
    # No such file in that folder: the default's.
    assert f"`python recipes/sft.py --config recipes/configs/cpu/sft.yaml --run_dir {tmp_path} --stage sft`" in text


def test_every_command_names_files_that_exist():
    for recipe, config, _ in STAGE_COMMANDS.values():
        assert (find_repository() / "recipes" / recipe).is_file()
        assert (find_repository() / DEFAULT_CONFIGS / config).is_file()
    assert STAGE_COMMANDS.keys() == STAGE_INPUTS.keys()
