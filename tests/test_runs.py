"""A run remembers what each stage was made with, and refuses to mix."""

import errno
import subprocess
import sys

import pytest

from chatmodel.runs import Run, publish_folder
from chatmodel.runtime import UserError, read_json, write_json


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def finish(run, stage, **settings):
    opened = run.begin(stage, settings=settings)
    opened.finish({"answer": 42})
    return run.read_result(stage)


def test_a_finished_stage_is_not_done_again(run):
    finish(run, "tokenizer", vocab_size=512)
    assert run.begin("tokenizer", settings={"vocab_size": 512}) is None
    assert run.is_finished("tokenizer", settings={"vocab_size": 512})
    assert not run.is_finished("base", settings={})
    result = read_json(run.result_path("tokenizer"))
    assert result["metrics"] == {"answer": 42}
    assert result["seconds"] >= 0


def test_a_changed_setting_is_named(run):
    finish(run, "tokenizer", vocab_size=512, doc_cap=100)
    with pytest.raises(UserError, match="vocab_size=512, now 1024"):
        run.begin("tokenizer", settings={"vocab_size": 1024, "doc_cap": 100})
    with pytest.raises(UserError, match="doc_cap=100, now unset"):
        run.is_finished("tokenizer", settings={"vocab_size": 512})


def test_where_a_run_lies_is_no_setting(run):
    finish(run, "tokenizer", vocab_size=512, run_dir="a")
    assert run.begin("tokenizer", settings={"vocab_size": 512, "run_dir": "b", "preview_masks": 3}) is None


def test_a_setting_that_counted_in_an_older_version_does_not_any_more(run):
    result = finish(run, "tokenizer", vocab_size=512)
    write_json(run.result_path("tokenizer"), result | {"settings": {"vocab_size": 512, "save_every": 200}})
    assert run.begin("tokenizer", settings={"vocab_size": 512, "save_every": 100}) is None
    with pytest.raises(UserError, match="made with vocab_size=512, now 300: "):
        run.begin("tokenizer", settings={"vocab_size": 300})


def begin_and_save(run, settings, **options):
    finish(run, "tokenizer")
    run.begin("base", settings=settings, **options)
    (run.checkpoints("base") / "step-00000001").mkdir(parents=True)


@pytest.mark.parametrize(
    "asked",
    [
        {"seed": 42},
        {"depth": "4", "mixed_precision": False, "train_tokens": 100_000_000},
        {"compile": None, "fp8": "false"},
        {"eval_every": 10, "sample_every": 5, "core_every": 7, "eval_bundle": "b.zip", "core_max_per_task": 11},
    ],
)
def test_the_same_in_other_words_is_no_change(run, asked):
    before = {"depth": 4, "mixed_precision": "no", "train_tokens": "1e8"}
    defaults = {"seed": 42, "compile": None, "fp8": False, "core_max_per_task": 500}
    begin_and_save(run, before, defaults=defaults)
    run.begin("base", settings=before | asked, defaults=defaults).finish({})
    if "eval_bundle" not in asked:
        assert run.is_finished("base", settings=before)  # without the recipe, from what it has left
    for change in ({"seed": 43}, {"mixed_precision": "bf16"}, {"fp8": True}, {"compile": False}):
        with pytest.raises(UserError, match=f"base .* was made with .*{next(iter(change))}="):
            run.begin("base", settings=before | asked | change, defaults=defaults)


def test_what_was_measured_at_the_end_is_a_setting_of_what_is_finished(run):
    begin_and_save(run, {"depth": 4})
    run.begin("base", settings={"depth": 4, "eval_bundle": "b.zip"}).finish({})
    assert run.read_result("base")["settings"] == {"depth": 4, "eval_bundle": "b.zip"}
    with pytest.raises(UserError, match=r"was made with eval_bundle=b\.zip, now unset"):
        run.begin("base", settings={"depth": 4})


def test_an_interrupted_stage_continues_only_with_its_settings(run):
    finish(run, "tokenizer")
    run.begin("base", settings={"depth": 1})  # nothing was saved, so this is only a mistake to correct
    first = run.begin("base", settings={"depth": 2})
    (run.checkpoints("base") / "step-00000001").mkdir(parents=True)
    again = run.begin("base", settings={"depth": 2})
    assert again.started == first.started
    assert again.id == first.id
    with pytest.raises(UserError, match="was begun with depth=2, now 3"):
        run.begin("base", settings={"depth": 3})


def test_a_change_that_is_accepted_is_the_stages_setting_from_then_on(run):
    finish(run, "tokenizer")
    run.begin("base", settings={"depth": 2, "lr_fraction": 1.0})
    (run.checkpoints("base") / "step-00000001").mkdir(parents=True)
    changed = {"depth": 2, "lr_fraction": 0.5}
    with pytest.raises(UserError, match=r"lr_fraction=1\.0, now 0\.5: .*, or add --accept_changes to go on"):
        run.begin("base", settings=changed, accept_changes=False)
    assert run.begin("base", settings=changed | {"accept_changes": True}, accept_changes=True) is not None
    again = run.begin("base", settings=changed, accept_changes=False)
    again.finish({})
    assert run.read_result("base")["settings"] == changed
    with pytest.raises(UserError, match="was made with") as refused:  # what is finished is not changed any more
        run.begin("base", settings={"depth": 2}, accept_changes=True)
    assert "accept_changes" not in str(refused.value)


HOLD = """
import sys
from chatmodel.runs import Run
held = Run(sys.argv[1]).begin("tokenizer", settings={})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_stage_that_is_at_work_is_not_begun_twice(run):
    """Whatever becomes of the process: its end, not its word, gives the stage free."""
    command = [sys.executable, "-c", HOLD, str(run.run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"tokenizer in .* is at work already, in process {other.pid} on "):
            run.begin("tokenizer", settings={})
        other.kill()
    finish(run, "tokenizer")
    assert run.begin("base", settings={}) is not None


def test_a_run_folder_that_cannot_be_one_is_refused_first(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"run_dir .*file is a file; give the path of a folder"):
        Run(file)
    with pytest.raises(UserError, match=r"cannot be written to \(Not a directory"):
        Run(file / "run").begin("tokenizer", settings={})

    def refuse(**options):
        raise PermissionError(errno.EACCES, "Permission denied")  # root, as which tests may run, writes everywhere

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        UserError, match=r"cannot be written to \(Permission denied: .*results\); choose another --run_dir"
    ):
        Run(tmp_path / "run").begin("tokenizer", settings={})


def test_a_missing_input_is_named(run):
    with pytest.raises(UserError, match="stage base needs stage tokenizer"):
        run.begin("base", settings={})


def test_a_stage_made_from_another_input_is_noticed(run):
    finish(run, "tokenizer")
    finish(run, "base")
    run.result_path("tokenizer").unlink()
    finish(run, "tokenizer")
    with pytest.raises(UserError, match="was made from another tokenizer"):
        run.begin("base", settings={})


def test_a_damaged_result_is_named(run):
    finish(run, "tokenizer")
    run.result_path("tokenizer").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        run.read_result("tokenizer")


def test_publish_replaces_a_folder(tmp_path):
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    publish_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
