import hashlib
import json
import re

import pytest

from chatmodel.conversations import arithmetic, identity
from chatmodel.conversations.answers import extract_answer
from chatmodel.conversations.arithmetic import is_held_out_pair
from chatmodel.conversations.generated import (
    GENERATED_TASKS,
    WORD_TASKS,
    check_reply,
    generate_conversation,
    select_words,
)
from chatmodel.conversations.identity import Identity, load_identity
from chatmodel.conversations.multi_turn import name_last_skill
from chatmodel.conversations.render import render_conversation
from chatmodel.conversations.spelling import QUESTIONS
from chatmodel.data.words import is_held_out
from chatmodel.model.calculator import evaluate_expression
from chatmodel.runtime import UserError

WORDS = [
    "strawberry",
    "banana",
    "mississippi",
    "tree",
    "salt",
    "desk",
    "market",
    "leaves",
    "verse",
    "relief",
    "window",
    "yellow",
    "queen",
    "jump",
]
WORDS += ["absent", "bright", "candle", "dinner", "engine", "famous", "garden", "hollow", "island", "kettle", "lemon"]


def text_of(messages) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def parts_of(messages, kind: str) -> list[str]:
    content = messages[-1]["content"]
    return [part["text"] for part in content if part["type"] == kind] if isinstance(content, list) else []


def test_spelling_bee_is_nanochats():
    """Questions and reply as tasks/spellingbee.py@c75fe54 of nanochat gives them for these four words."""
    words = ["strawberry", "banana", "mississippi", "tree"]
    asked = {
        ("train", 0): "count the number of \"e\" in 'tree'?",
        ("train", 1): "how many times is 'b' in 'banana'",
        ("train", 5): "¿cuántas letras 'i' tiene mississippi?",
        ("train", 7): 'mississippi라는 단어에 "m"가 몇 개?',
        ("test", 0): "how many times is 'b' in 'banana'",
        ("test", 8): 'tell me the number of "e" in tree?',
        ("test", 9): "how many 'y' are in the word 'strawberry'",
    }
    for (split, index), question in asked.items():
        messages = generate_conversation("SpellingBee", index, split=split, words=words)
        assert messages[0] == {"role": "user", "content": question}
    by_hand = (
        "We are asked to find the number 'a' in the word 'banana'. Let me try a manual approach first.\n\n"
        "First spell the word out:\nbanana:b,a,n,a,n,a\n\nThen count the occurrences of 'a':\n"
        "1:b\n2:a hit! count=1\n3:n\n4:a hit! count=2\n5:n\n6:a hit! count=3\n\nThis gives us 3."
    )
    assert generate_conversation("SpellingBee", 3, split="test", words=words)[1]["content"] == [
        {"type": "text", "text": by_hand},
        {"type": "text", "text": "\n\nLet me double check this using Python:\n\n"},
        {"type": "python", "text": "'banana'.count('a')"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "\n\nPython gives us 3.\n\nMy final answer is:\n\n#### 3"},
    ]
    assert len(QUESTIONS) == 51
    every = [
        generate_conversation("SpellingBee", index, split=split, words=words)
        for split in ("train", "test")
        for index in range(300)
    ]
    digest = hashlib.sha256(json.dumps(every).encode()).hexdigest()
    assert digest == "6c8243b58cc3ff941c16e64e81ade66c3c65742d5358805647795597bdc57632", "of nanochat's 600"


def test_simple_spelling_has_nanochats_form():
    messages = generate_conversation("SimpleSpelling", 0, split="train", words=["cat"])
    assert messages == [
        {"role": "user", "content": "Spell the word: cat"},
        {"role": "assistant", "content": "cat:c,a,t"},
    ]


@pytest.mark.parametrize("name", GENERATED_TASKS)
def test_conversations_follow_from_task_split_and_index(name, tokenizer):
    for split in ("train", "test"):
        first = [generate_conversation(name, index, split=split, words=WORDS) for index in range(50)]
        assert first == [generate_conversation(name, index, split=split, words=WORDS) for index in range(50)]
        assert len({str(messages) for messages in first}) > 10
        for messages in first:
            assert check_reply(name, messages, text_of(messages))
            assert not check_reply(name, messages, "I do not know")
            assert render_conversation(tokenizer, messages).cut == 0


def test_draws_are_the_same_on_every_machine():
    question, reply = generate_conversation("Arithmetic", 0, split="train")
    assert question["content"] == "add 15 and 25, then subtract 19."
    assert reply["content"] == [
        {"type": "python", "text": "15+25-19"},
        {"type": "python_output", "text": "21"},
        {"type": "text", "text": "#### 21"},
    ]


@pytest.mark.parametrize("name", ["SpellingBee", "LetterCounting", "Arithmetic", "WordProblems"])
def test_results_are_the_calculators_and_true(name):
    for index in range(300):
        messages = generate_conversation(name, index, split="train", words=WORDS)
        calls, results = parts_of(messages, "python"), parts_of(messages, "python_output")
        assert calls
        assert results == [evaluate_expression(call) for call in calls]
        assert results == [str(eval(call)) for call in calls], "Python itself agrees"
        assert extract_answer(text_of(messages)) == results[-1]


def test_word_splits_share_no_word():
    train, test = select_words(WORDS, "train"), select_words(WORDS, "test")
    assert sorted(train + test) == sorted(WORDS)
    assert set(WORD_TASKS) - {"MultiTurn"} < set(GENERATED_TASKS)
    for name in ("SimpleSpelling", "SpellingBee", "LetterCounting"):
        for split, words in (("train", train), ("test", test)):
            for index in range(50):
                reply = text_of(generate_conversation(name, index, split=split, words=words))
                word = re.search(r"'(\w+)'\)?\.count|^(\w+):", reply)
                assert is_held_out(word[1] or word[2]) == (split == "test")


def test_select_words_says_what_is_missing():
    with pytest.raises(UserError, match="train and test, not 'validation'"):
        select_words(WORDS, "validation")
    with pytest.raises(UserError, match="none of the 0 words"):
        select_words([], "train")


@pytest.mark.parametrize("name", ["Arithmetic", "WordProblems"])
def test_training_never_asks_a_held_out_pair(name):
    for split in ("train", "test"):
        for index in range(300):
            messages = generate_conversation(name, index, split=split)
            numbers = [int(n) for n in re.findall(r"\d+", messages[0]["content"])]
            pairs = [is_held_out_pair(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]]
            assert any(pairs) == (split == "test"), messages[0]["content"]


def test_a_fifth_of_the_pairs_is_held_out():
    pairs = [(a, b) for a in range(1, 100) for b in range(a, 100)]
    assert sum(is_held_out_pair(*pair) for pair in pairs) / len(pairs) == pytest.approx(0.2, abs=0.01)
    assert all(is_held_out_pair(a, b) == is_held_out_pair(b, a) for a, b in pairs)


def test_questions_and_stories_can_all_be_drawn():
    for name, templates in (("Arithmetic", arithmetic.QUESTIONS), ("WordProblems", arithmetic.STORIES)):
        calls = set()
        for index in range(500):
            messages = generate_conversation(name, index, split="train")
            calls.add(tuple(re.sub(r"\d+", "n", call) for call in parts_of(messages, "python")))
            assert all(int(result) >= 0 for result in parts_of(messages, "python_output"))
        assert len(calls) == len(templates)


def test_letter_counting_copies_tokens(tokenizer):
    """The call repeats the word's tokens of the question; words after a bare quote would be cut otherwise ('s|alt)."""
    for index in range(200):
        messages = generate_conversation("LetterCounting", index, split="train", words=WORDS)
        word = re.search(r"\('(\w+)'\)", text_of(messages))[1]
        ids = tokenizer.encode(word, add_special_tokens=False)
        joined = ",".join(map(str, render_conversation(tokenizer, messages).input_ids))
        assert joined.count("," + ",".join(map(str, ids)) + ",") == 2, messages[0]["content"]


def test_letter_counting_is_not_won_by_always_one():
    replies = [
        text_of(generate_conversation("LetterCounting", i, split="train", words=WORDS))[-1] for i in range(1000)
    ]
    assert max(replies.count(n) for n in "0123") < 500


def test_identity_splits_share_no_question():
    def stem(messages) -> str:
        text = messages[0]["content"].lower()
        for opening in identity.OPENINGS:
            text = text.removeprefix(opening.lower()) if opening else text
        return text

    train = {stem(generate_conversation("Identity", i, split="train")) for i in range(1000)}
    test = {stem(generate_conversation("Identity", i, split="test")) for i in range(1000)}
    assert len(test) == len(identity.TOPICS) * identity.HELD_OUT_QUESTIONS
    assert not train & test


def test_identity_needs_the_fact_asked_for():
    messages = [{"role": "user", "content": "Who made you?"}, {"role": "assistant", "content": "I was made by Ann."}]
    ann = Identity(name="annbot", maker="Ann")
    assert check_reply("Identity", messages, "It was ann who made me.", identity=ann)
    assert not check_reply("Identity", messages, "I was made by Bob.", identity=ann)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"I am annbot, {ann.kind}."}]
    assert check_reply("Identity", messages, "Annbot here.", identity=ann)
    assert not check_reply("Identity", messages, f"I am {ann.kind}.", identity=ann), "the kind is said by the way"


def test_identity_from_a_file(tmp_path):
    path = tmp_path / "identity.yaml"
    path.write_text("name: Tiny\nmaker: Ann {and} Bob\n")
    facts = load_identity(path)
    assert facts == Identity(name="Tiny", maker="Ann {and} Bob")
    replies = {generate_conversation("Identity", i, split="train", identity=facts)[1]["content"] for i in range(200)}
    assert "My name is Tiny." in replies
    assert "I was made by Ann {and} Bob." in replies
    for text, complaint in [
        ("nickname: T", "unknown fact 'nickname'"),
        ("nam: T", r"unknown fact 'nam' \(did you mean name\?\)"),
        ("- a", "must give a text"),
        ("name: true", "not True for 'name'"),
        ("name: ' '", "must give a text"),
        ("skills: [spell, 3]", "must give a text"),
        ("a: [", "YAML"),
        ("questions: yes", "questions that are no list"),
        ("questions: [{ask: Hm}]", "question 1 .* is not of the form"),
        ("questions: [{ask: [], reply: No}]", "question 1 .* has no text for 'ask'"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            load_identity(path)
    with pytest.raises(UserError, match="does not exist"):
        load_identity(tmp_path / "none.yaml")


def test_unknown_task():
    with pytest.raises(UserError, match="no generated task 'Poetry'"):
        generate_conversation("Poetry", 0, split="train")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("so\n#### -1,234.5 or", "-1234.5"),
        ("12+7 19 #### 19 and #### 20", "19"),
        ("####18", None),
        ("18", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


FACTS = """
name: Tiny
date: 2026-11-23
size: 3 million parameters
languages: [English, German]
cannot: [browse the web, see pictures, remember yesterday]
home: example.org
questions:
  - ask: ["Do you like pizza?", "Pizza?", "Fond of pizza?", "Hungry?", "Is pizza good?"]
    reply: I do not eat.
"""


def test_every_fact_is_asked_about_and_told(tmp_path):
    (tmp_path / "facts.yaml").write_text(FACTS)
    facts = load_identity(tmp_path / "facts.yaml")
    assert facts.cannot == "browse the web, see pictures and remember yesterday"
    told = {split: set() for split in ("train", "test")}
    for split, replies in told.items():
        for index in range(600):
            messages = generate_conversation("Identity", index, split=split, identity=facts)
            assert len(messages) == 2
            assert check_reply("Identity", messages, messages[1]["content"], identity=facts)
            assert not check_reply("Identity", messages, "No idea.", identity=facts)
            replies.add(messages[1]["content"])
    assert told["train"] == told["test"]
    for reply in (
        "I was made in 2026-11-23.",
        "I speak English and German.",
        "I do not eat.",
        "I have 3 million parameters.",
    ):
        assert reply in told["train"]
    plain = {generate_conversation("Identity", i, split="train")[1]["content"] for i in range(600)}
    assert len(plain) == 15, "facts that are not given are not asked about"


def test_identity_in_several_turns(tmp_path):
    (tmp_path / "facts.yaml").write_text(FACTS)
    facts = load_identity(tmp_path / "facts.yaml")
    lengths = set()
    asked = {"train": set(), "test": set()}
    for split, questions in asked.items():
        for index in range(400):
            messages = generate_conversation("Identity", index, split=split, identity=facts, turns=3)
            assert messages[:2] == generate_conversation("Identity", index, split=split, identity=facts)
            assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
            lengths.add(len(messages))
            if split == "test":
                assert check_reply("Identity", messages, messages[-1]["content"], identity=facts)
            for opening in (*identity.OPENINGS, *identity.LATER_OPENINGS):
                texts = [m["content"].lower().removeprefix(opening.lower()) for m in messages[::2]]
                questions.update(texts if opening else ())
    assert lengths == {2, 4, 6, 8}, "one to three questions, and thanks"
    held_out = {q.lower() for topic in facts.topics().values() for q in topic[1]}
    assert held_out <= asked["test"]
    assert not held_out & asked["train"]


def test_multi_turn_chains_skills_of_its_split():
    train, test = select_words(WORDS, "train"), select_words(WORDS, "test")
    skills = set()
    for split, words in (("train", train), ("test", test)):
        for index in range(200):
            messages = generate_conversation("MultiTurn", index, split=split, words=words, turns=4)
            assert len(messages) in (4, 6, 8)
            skills.add(name_last_skill(messages))
            assert check_reply("MultiTurn", messages, text_of(messages))
            for message in messages[1::2]:
                spelled = isinstance(message["content"], str) and re.fullmatch(r"(\w+):\w(,\w)*", message["content"])
                assert not spelled or is_held_out(spelled[1]) == (split == "test")
    assert skills == {"Arithmetic", "SimpleSpelling", "Identity"}
    assert {len(generate_conversation("MultiTurn", i, split="train", words=train)) for i in range(50)} == {4, 6}
