"""Generated conversations with numbers: sums and short word problems, worked out with the calculator."""

import hashlib
import random
from collections.abc import Callable

from chatmodel.conversations.render import Messages
from chatmodel.model.calculator import evaluate_expression

LARGEST_OPERAND = 99
LARGEST_FACTOR = 20  # in word problems, where a factor counts boxes or bags
HELD_OUT_SHARE = 0.2

# One operation: what is asked, and what the calculator is given.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "{a}+{b}": (
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "Calculate {a} + {b}.",
        "Add {a} and {b}.",
        "What is {a} plus {b}?",
        "How much is {a} and {b} together?",
        "What is the sum of {a} and {b}?",
        "Please work out {a} + {b} for me.",
        "I have {a} and get {b} more. How many is that?",
    ),
    "{a}-{b}": (
        "What is {a} - {b}?",
        "{a} - {b} = ?",
        "Calculate {a} - {b}.",
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
        "Take {b} away from {a}.",
        "What is the difference between {a} and {b}?",
        "Please work out {a} - {b} for me.",
        "I have {a} and lose {b}. How many are left?",
    ),
    "{a}*{b}": (
        "What is {a} * {b}?",
        "{a} * {b} = ?",
        "Calculate {a} * {b}.",
        "Multiply {a} by {b}.",
        "What is {a} times {b}?",
        "How much is {a} x {b}?",
        "What is the product of {a} and {b}?",
        "Please work out {a} * {b} for me.",
        "There are {a} rows of {b}. How many is that?",
    ),
    "{a}+{b}-{c}": ("What is {a} + {b} - {c}?", "Add {a} and {b}, then subtract {c}.", "Calculate {a} + {b} - {c}."),
    "{a}*{b}+{c}": ("What is {a} * {b} + {c}?", "Multiply {a} by {b}, then add {c}.", "Calculate {a} * {b} + {c}."),
    "({a}+{b})*{c}": (
        "What is ({a} + {b}) * {c}?",
        "Add {a} and {b}, then multiply by {c}.",
        "Calculate ({a} + {b}) * {c}.",
    ),
}

NAMES = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Ivy",
    "Jack",
    "Lena",
    "Mia",
    "Noah",
    "Omar",
)
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "oranges", "pencils", "shells", "stamps")

# One or two steps; {r} is the result of the first.
STORIES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("{a}+{b}",): (
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "{name} picks {a} {things} in the morning and {b} in the evening. How many {things} is that in all?",
        "There are {a} {things} on the table and {b} in the box. How many {things} are there together?",
    ),
    ("{a}-{b}",): (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "There were {a} {things} in the box. {name} took {b} of them. How many {things} are still there?",
        "{name} wants {a} {things} and has {b}. How many {things} are missing?",
    ),
    ("{a}*{b}",): (
        "{name} has {a} boxes with {b} {things} each. How many {things} is that?",
        "{name} buys {b} {things} on each of {a} days. How many {things} does {name} buy?",
        "There are {a} shelves and {b} {things} on every shelf. How many {things} are there?",
    ),
    ("{a}+{b}", "{r}-{c}"): (
        "{name} has {a} {things}, buys {b} more and gives away {c}. How many {things} does {name} have now?",
        "There are {a} red and {b} blue {things}. {name} takes {c} of them. How many {things} are left?",
    ),
    ("{a}*{b}", "{r}+{c}"): (
        "{name} has {a} bags with {b} {things} each and {c} more at home. How many {things} is that?",
        "{name} fills {a} boxes with {b} {things} each, and {c} {things} do not fit. How many {things} are there?",
    ),
    ("{a}+{b}", "{r}*{c}"): (
        "In each of {c} boxes there are {a} red and {b} blue {things}. How many {things} are there?",
        "{name} picks {a} {things} before lunch and {b} after it, for {c} days. How many {things} is that?",
    ),
}


def solve_expression(index: int, split: str) -> Messages:
    """A sum of two or three numbers, asked in many ways and answered with one calculator call."""
    rng = random.Random(f"arithmetic {split} {index}")
    expression = rng.choice(list(QUESTIONS))
    question = rng.choice(QUESTIONS[expression])
    if rng.random() < 0.3:
        question = question.lower()
    numbers = draw_numbers(rng, split, lambda a, b, c: _is_sensible((expression,), a, b, c, LARGEST_OPERAND))
    return _write_conversation(question.format(**numbers), [expression.format(**numbers)])


def solve_story(index: int, split: str) -> Messages:
    """A word problem of one or two steps, each of them a calculator call."""
    rng = random.Random(f"story {split} {index}")
    steps = rng.choice(list(STORIES))
    question = rng.choice(STORIES[steps])
    numbers = draw_numbers(rng, split, lambda a, b, c: _is_sensible(steps, a, b, c, LARGEST_FACTOR))
    expressions = [steps[0].format(**numbers)]
    if len(steps) > 1:
        expressions.append(steps[1].format(r=evaluate_expression(expressions[0]), **numbers))
    return _write_conversation(
        question.format(name=rng.choice(NAMES), things=rng.choice(THINGS), **numbers), expressions
    )


def _is_sensible(steps: tuple[str, ...], a: int, b: int, c: int, largest_factor: int) -> bool:
    """No result falls below zero, and factors are from 2 to `largest_factor`."""
    text = " ".join(steps)
    if "-{b}" in text and a < b:
        return False
    if "-{c}" in text and a + b < c:
        return False
    factors = ([a, b] if "{a}*{b}" in text else []) + ([c] if "{r}*{c}" in text else [])
    return all(2 <= factor <= largest_factor for factor in factors)


def _write_conversation(question: str, expressions: list[str]) -> Messages:
    reply = []
    for expression in expressions:
        result = evaluate_expression(expression)
        assert result is not None, expression
        reply += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    reply.append({"type": "text", "text": f"#### {result}"})
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def draw_numbers(rng: random.Random, split: str, is_sensible: Callable[[int, int, int], bool]) -> dict[str, int]:
    """Three numbers: in "train" no two of them are a held-out pair, in any other split the first two are one."""
    while True:
        a, b, c = (rng.randint(1, LARGEST_OPERAND) for _ in range(3))
        if not is_sensible(a, b, c):
            continue
        held_out = [is_held_out_pair(a, b), is_held_out_pair(a, c), is_held_out_pair(b, c)]
        if not any(held_out) if split == "train" else held_out[0]:
            return {"a": a, "b": b, "c": c}


def is_held_out_pair(a: int, b: int) -> bool:
    """Whether two numbers, in either order, are kept from training; about one pair in five is."""
    digest = hashlib.sha256(f"{min(a, b)} {max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
