"""A run beside another one: the seed's results as they are kept, and what a report says of two runs."""

import re
from pathlib import Path

import pytest
from test_report_seed import CHAT_EVALUATIONS, CORE_TASKS, FINISHED, seed_records, write_run

from chatmodel.report import publish_report, render_report
from chatmodel.report.beside import build_beside, describe_run
from chatmodel.report.document import Table
from chatmodel.report.results import load_results
from chatmodel.runs import Run
from chatmodel.runtime import UserError

SEED = Run(Path(__file__).parents[1] / "docs" / "results" / "2025-10-27-nanochat-seed")


def read_tables(results, others):
    tables = [block for block in build_beside(results, others, folder="x").blocks if isinstance(block, Table)]
    return {table.caption.partition(":")[0]: {row[0]: row[1:] for row in table.rows} for table in tables}


def test_the_seeds_results_are_its_reports():
    seed, expected = load_results(SEED), seed_records()
    assert describe_run(seed) == "commit c75fe54, 1x NVIDIA GeForce RTX 5090, 2025-10-27"
    tasks = seed["base_eval"].metrics["core"]["tasks"]
    assert {name: task["centered"] for name, task in tasks.items()} == CORE_TASKS
    for stage, (chatcore, accuracies) in CHAT_EVALUATIONS.items():
        found = seed[f"{stage}_eval"].metrics["chatcore"]
        assert found.get("chatcore") == chatcore
        assert accuracies.items() <= {name: task["accuracy"] for name, task in found["tasks"].items()}.items()
    for stage, time in FINISHED.items():
        assert seed[stage].record["finished"] == time
        assert seed[stage].record["seconds"] == expected[stage]["seconds"]
    assert "history" not in seed["base"].metrics  # the report has no curve


def test_two_runs_side_by_side(tmp_path):
    ours = seed_records()
    ours["base"]["seconds"] = ours["base"]["seconds"] / 8
    ours["base_eval"]["metrics"]["core"]["tasks"]["copa"] |= {"centered": 0.3, "centered_stderr": 0.05}
    arc = {"accuracy": 0.4, "correct": 40, "n": 100, "stderr": 0.049, "centered": 0.2}
    ours["sft_eval"]["metrics"]["chatcore"]["tasks"]["ARC-Easy"] = arc
    del ours["rl_eval"]
    tables = read_tables(load_results(write_run(tmp_path, ours)), load_results(SEED))
    assert tables["Wall clock"]["base"] == ("25.8 min", "3 h 26 min", "8.0")
    assert tables["Wall clock"]["rl_eval"] == ("-", "39.1 min", "-")
    assert tables["Tokenizer"]["validation"] == ("4.86", "4.86", "+4.6 %", "+4.6 %", "+1.9 %", "+1.9 %")
    assert tables["Pretraining and memory"]["MFU"] == ("16.31 %", "16.31 %")
    assert tables["CORE and its tasks, centered"]["copa"] == ("0.3000 ± 0.0500", "0.2600 ± 0.0966", "+0.0400")
    assert len(tables["CORE and its tasks, centered"]) == 23
    chat = tables["ChatCORE and its tasks, accuracies"]
    assert chat["ARC-Easy"][2:4] == ("0.4000 ± 0.0490", "0.2660 ± 0.0091")
    assert chat["GSM8K"][4:] == ("-", "0.0129 ± 0.0031")
    # The five of the seed after SFT: (0.0213 + 0.0216 + 0.0044 + 0 + 0) / 5.
    assert chat["Mean of the five without SpellingBee, centered"][3] == "0.0095"


def test_the_report_has_both_and_can_be_published(tmp_path):
    run = write_run(tmp_path / "run", seed_records())
    run.folder("notes.md").write_text("What went\nwrong: nothing.\n\n\nReally *nothing*.\n")
    text = render_report(run, beside=SEED)[0].read_text()
    notes, section = re.split(r"^## ", text, flags=re.MULTILINE)[2:4]
    assert notes == "Notes\n\nWhat went wrong: nothing.\n\nReally \\*nothing\\*.\n\n"
    assert section.startswith("Beside another run")
    assert "its results are in docs/results/2025-10-27-nanochat-seed/results." in section
    assert "- base_eval: python recipes/x.py --stage base_eval" in text
    kept = tmp_path / "kept"
    publish_report(run, kept)
    publish_report(run, kept)
    assert (kept / "report.md").read_text() == text
    assert len(list((kept / "results").glob("*.json"))) == len(FINISHED)
    assert (kept / "plots" / "base_loss.svg").is_file()
    (kept / "results" / "other.json").write_text("{}")
    with pytest.raises(UserError, match="holds results that are not of"):
        publish_report(run, kept)
