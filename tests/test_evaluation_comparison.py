"""Two evaluations compared: what counts as a difference, in which direction, and what cannot be compared."""

import json
import math
import sys

import numpy as np
import pytest

from chatmodel.evaluation.comparison import Measured, compare_systems, compare_task, load_system, render_comparison
from chatmodel.evaluation.statistics import holm_adjust, summarize_score, summarize_task
from chatmodel.runtime import UserError
from scripts.compare_results import main


def write_result(path, tasks, *, part="core", bpb=None):
    """A file as recipes/eval.py writes it; `tasks` maps a name to (decisions, baseline)."""
    summaries = {name: summarize_task(right, baseline=b, seconds=1.0) for name, (right, b) in tasks.items()}
    metrics = {part: {part: summarize_score(summaries)["score"], "tasks": summaries}}
    metrics |= {"bpb": {"validation": bpb}} if bpb else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": metrics}))
    return str(path)


def flip(right, *, won, lost):
    """The same decisions, but for `won` wrong ones put right and `lost` right ones put wrong."""
    flipped = list(right)
    for index in [i for i, value in enumerate(right) if not value][:won] + [i for i, v in enumerate(right) if v][
        :lost
    ]:
        flipped[index] = not flipped[index]
    return flipped


HALF = [True, False] * 100


def test_pairs_find_what_two_separate_errors_hide(tmp_path):
    """16 more right of 200: 1.6 separate standard errors, but paired 16 wins against none."""
    first = write_result(tmp_path / "a.json", {"easy": (HALF, 0.25), "same": (HALF, 0.0)})
    second = write_result(tmp_path / "b.json", {"easy": (flip(HALF, won=16, lost=0), 0.25), "same": (HALF, 0.0)})
    (part,) = compare_systems(load_system(first), load_system(second))
    easy, same = part.tasks
    assert easy.value == pytest.approx(0.08)
    assert easy.paired
    assert easy.p_value == pytest.approx(2 / 2**16)
    assert easy.stderr == pytest.approx(math.sqrt((0.08 - 0.08**2) / 200))
    assert easy.adjusted == pytest.approx(2 * easy.p_value)
    assert easy.exceeds_noise
    assert (same.value, same.p_value, same.exceeds_noise) == (0.0, 1.0, False)
    # The mean centered accuracy: 0.08 / 0.75 in one of two tasks, with its error scaled alike.
    assert part.overall.value == pytest.approx(0.08 / 0.75 / 2)
    assert part.overall.stderr == pytest.approx(easy.stderr / 0.75 / 2)
    assert part.overall.interval[0] < part.overall.value < part.overall.interval[1]
    assert part.overall.exceeds_noise
    # Against the direction the verdict turns.
    (back,) = compare_systems(load_system(second), load_system(first))
    assert back.overall.value == pytest.approx(-part.overall.value)
    text = render_comparison(load_system(first), load_system(second))
    assert "| B is better" in text
    assert "Of 2 tasks compared at p < 0.05, 0.1 would differ by chance" in text
    assert "One training seed says that two models differ" in text


def test_old_files_without_decisions_are_compared_less_sharply(tmp_path):
    first = write_result(tmp_path / "a.json", {"easy": (HALF, 0.25)})
    second = write_result(tmp_path / "b.json", {"easy": (flip(HALF, won=16, lost=0), 0.25)})
    content = json.loads((tmp_path / "a.json").read_text())
    del content["metrics"]["core"]["tasks"]["easy"]["decisions"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    (part,) = compare_systems(load_system(first), load_system(second))
    assert not part.tasks[0].paired
    assert part.tasks[0].stderr == pytest.approx(math.sqrt(0.25 / 200 + 0.58 * 0.42 / 200))
    assert not part.tasks[0].exceeds_noise
    assert "pairs = no" in render_comparison(load_system(first), load_system(second))


def test_equal_models_rarely_differ():
    """Two models that are right by independent coins: Holm's verdicts are wrong in about one comparison in twenty."""
    generator = np.random.default_rng(0)

    def draw():
        values = (generator.random(60) < 0.4).astype(float)
        return Measured(values, (values.mean(),), 0.25, has_decisions=True)

    found = [
        min(holm_adjust([compare_task("coins", draw(), draw()).p_value for _ in range(5)])) < 0.05 for _ in range(400)
    ]
    assert 0 < sum(found) <= 30


def test_seeds_count_as_noise(tmp_path):
    """Two seeds a system: the spread between them joins the error, and hides a difference that one pair shows."""
    lows = [write_result(tmp_path / f"low{i}.json", {"easy": (flip(HALF, won=0, lost=8 * i), 0.0)}) for i in (0, 3)]
    highs = [write_result(tmp_path / f"high{i}.json", {"easy": (flip(HALF, won=8 * i, lost=0), 0.0)}) for i in (1, 2)]
    (single,) = compare_systems(load_system(lows[1]), load_system(highs[0]))
    assert single.overall.exceeds_noise
    first, second = load_system(",".join(lows)), load_system(",".join(highs))
    (part,) = compare_systems(first, second)
    assert (part.overall.first, part.overall.second) == (pytest.approx(0.44), pytest.approx(0.56))
    seeds = np.var([0.5, 0.38], ddof=1) / 2 + np.var([0.54, 0.58], ddof=1) / 2
    assert part.overall.stderr > math.sqrt(seeds)
    assert not part.overall.exceeds_noise
    low = part.systems[0]
    assert (low["mean"], low["num_seeds"]) == (pytest.approx(0.44), 2)
    assert low["spread"] == pytest.approx(0.12 / math.sqrt(2))
    text = render_comparison(first, second)
    assert "A: CORE 0.4400 ± " in text
    assert "2 seeds with a standard deviation of 0.0849 between them" in text


def test_run_folders_numbers_and_the_script(tmp_path, capsys, monkeypatch):
    for run, won in (("a", 0), ("b", 2)):
        write_result(
            tmp_path / run / "results" / "base_eval.json", {"easy": (flip(HALF, won=won, lost=0), 0.0)}, bpb=1.2
        )
        write_result(tmp_path / run / "results" / "sft_eval.json", {"MMLU": (HALF, 0.25)}, part="chatcore")
    monkeypatch.setattr(sys, "argv", ["compare_results.py", str(tmp_path / "a"), str(tmp_path / "b")])
    main()
    text = capsys.readouterr().out
    assert "## base CORE" in text
    assert "## sft ChatCORE" in text
    assert "within the noise" in text
    assert "base bits per byte, validation" in text
    assert "needs several seeds of both" in text


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_system(str(tmp_path / "missing.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no evaluation"):
        load_system(str(tmp_path / "empty"))
    core = write_result(tmp_path / "a.json", {"easy": (HALF, 0.25)})
    chat = write_result(tmp_path / "b.json", {"MMLU": (HALF, 0.25)}, part="chatcore")
    with pytest.raises(UserError, match="no evaluation in common"):
        compare_systems(load_system(core), load_system(chat))
    fewer = write_result(tmp_path / "c.json", {"easy": (HALF[:50], 0.25)})
    with pytest.raises(UserError, match="different numbers of examples"):
        load_system(f"{core},{fewer}")
    (part,) = compare_systems(load_system(core), load_system(fewer))
    assert not part.tasks[0].paired
