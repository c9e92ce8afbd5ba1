"""Rewards by name or from a file: what they are called, and what is said of those that cannot be used."""

import pytest

from chatmodel.reinforcement.reward_choice import find_rewards
from chatmodel.runtime import UserError

FILE = '''
def brevity(completions, **columns):
    """The shorter the better."""
    return [1 / (1 + len(text)) for text in completions]

def silent(completions, task, **columns):
    return [None if name == "GSM8K" else 0.5 for name in task]

def broken(completions, **columns):
    return [1 / 0 for text in completions]

def few(completions, **columns):
    return [1.0]

def endless(completions, **columns):
    return [float("inf") for text in completions]

async def slow(completions, **columns):
    return [1.0 for text in completions]

CONSTANT = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


def test_ours_and_ones_own(file):
    found = find_rewards(["task", "form", f"{file}:brevity", f"{file}:silent"])
    assert [function.__name__ for function in found.values()] == list(found) == ["task", "form", "brevity", "silent"]
    columns = {"prompts": ["?", "?"], "completions": ["#### 7", "7"], "task": ["GSM8K", "Sums"], "answer": ["7", "7"]}
    assert found["task"](**columns) == [1.0, 0.0]
    assert found["form"](**columns) == [1.0, 0.0]
    assert found["brevity"](**columns) == [1 / 7, 1 / 2]
    assert found["silent"](**columns) == [None, 0.5]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "rewards is empty; name at least one of task, form"),
        (["tsk"], "reward 'tsk' is not known; choose task, form, or a function as my.py:function"),
        (["task", "task"], "rewards has 'task' twice"),
        (["{file}:brevity", "{file}:brevity"], "rewards has 'brevity' twice"),
        (["nowhere.py:brevity"], "there is no file nowhere.py"),
        (["{file}:length"], "has no function 'length'; it has brevity, silent, broken, few, endless, slow"),
        (["{file}:CONSTANT"], "has no function 'CONSTANT'"),
        (["{file}:slow"], "is an async function; make it a plain one"),
    ],
)
def test_what_cannot_be_a_reward(file, names, sentence):
    with pytest.raises(UserError, match=sentence):
        find_rewards([name.format(file=file) for name in names])


def test_a_file_that_cannot_be_run(file):
    file.write_text("import no_such_package\n")
    with pytest.raises(
        UserError, match=r"cannot be run \(ModuleNotFoundError: .*no_such_package.* at my_rewards.py:1"
    ):
        find_rewards([f"{file}:brevity"])
    file.write_text("def brevity(:\n")
    with pytest.raises(UserError, match=r"cannot be run \(SyntaxError"):
        find_rewards([f"{file}:brevity"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "reward 'broken' failed: ZeroDivisionError: division by zero at my_rewards.py:10"),
        ("few", "reward 'few' gave 1 numbers for 2 completions"),
        ("endless", "reward 'endless' gave inf; it must give a finite number, or None, a completion"),
    ],
)
def test_what_a_reward_does_wrong(file, name, sentence):
    function = find_rewards([f"{file}:{name}"])[name]
    with pytest.raises(UserError, match=sentence):
        function(completions=["a", "b"])
