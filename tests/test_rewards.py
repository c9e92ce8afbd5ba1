import inspect

from chatmodel import rewards
from chatmodel.conversations.generated import generate_conversation
from chatmodel.rewards import reward_answer, reward_form, reward_spelling, reward_task


def test_answer():
    completions = ["12+7 19 #### 19", "#### 20", "19", "#### 1,019", "#### 19 #### 20"]
    assert reward_answer(completions, ["19", "19", "19", "1019", "19"]) == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert reward_answer(["#### 1019", "nothing"], ["1,019", "1"]) == [1.0, 0.0]


def test_answer_of_messages():
    completions = [[{"role": "assistant", "content": "#### 3"}], [{"role": "assistant", "content": ""}]]
    assert reward_answer(completions, ["3", "3"]) == [1.0, 0.0]


def test_reference_replies_earn_everything():
    for name in ("Arithmetic", "WordProblems", "LetterCounting", "SpellingBee"):
        replies, answers = [], []
        for index in range(20):
            parts = generate_conversation(name, index, split="train", words=["banana", "tree"])[1]["content"]
            replies.append("".join(part["text"] for part in parts))
            answers.append(parts[-2]["text"])
        assert reward_answer(replies, answers) == reward_form(replies) == [1.0] * 20


def test_form():
    completions = ["so #### 19\n", "#### 19 it is", "#### 1 #### 2", "19", "", "#### "]
    assert reward_form(completions) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_spelling():
    graded = {"cat:c,a,t": 1.0, "c,a,t": 1.0, "cat:c,a": 2 / 3, "cat:c,o,t": 2 / 3, "cat:c,a,t,s,x,y": 0.5}
    graded |= {"cat:": 0.0, "": 0.0, "dog:d,o,g": 0.0, "cat:a,c,t": 1 / 3}
    assert reward_spelling(list(graded), ["cat"] * len(graded)) == list(graded.values())


def test_each_row_by_its_task():
    completions = ["cat:c,a,x", "#### 7", "cat:c,a,t", [{"role": "assistant", "content": "cat:c,a,t"}]]
    tasks = ["SimpleSpelling", "GSM8K", "LetterCounting", "SimpleSpelling"]
    assert reward_task(completions, tasks, ["cat", "7", "3", "cat"]) == [2 / 3, 1.0, 0.0, 1.0]


def test_all_take_what_trl_hands_over():
    """TRL calls a reward with keywords: completions, prompts, and every column of the data set."""
    functions = [f for name, f in inspect.getmembers(rewards, inspect.isfunction) if name.startswith("reward_")]
    assert len(functions) == 4
    for function in functions:
        columns = {"prompts": ["?"], "completion_ids": [[1]], "source": ["x"], "trainer_state": None}
        assert function(completions=["#### 1"], answer=["1"], word=["cat"], task=["GSM8K"], **columns)[0] in (0.0, 1.0)
