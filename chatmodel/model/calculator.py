"""What a calculator call in the model's output evaluates to, and how generation writes the result after it."""

import ast
from collections.abc import Callable, Iterator
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import Any

import torch
from transformers import LogitsProcessor

MAX_EXPRESSION_CHARS = 200
MAX_RESULT_CHARS = 24
MAX_DECIMALS = 6

OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}


def evaluate_expression(expression: str) -> str | None:
    """The result of a calculator call as text, or None when the expression is refused.

    Allowed are numbers with + - * / and parentheses (commas between digits are dropped), and `'text'.count('part')`.
    Arithmetic is exact; a result that is no whole number is rounded to 6 decimals.
    """
    expression = expression.strip()
    if len(expression) > MAX_EXPRESSION_CHARS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    try:
        tree = ast.parse(expression, mode="eval")
        count = _count_call(tree.body)
        result = str(count) if count is not None else _format_number(_evaluate(tree.body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return result if len(result) <= MAX_RESULT_CHARS else None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError("not arithmetic")


def _count_call(node: ast.expr) -> int | None:
    """The value of `'text'.count('part')`, or None when the node is something else."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "count":
        return None
    strings = [node.func.value, *node.args]
    if node.keywords or len(strings) != 2:
        return None
    values = [string.value for string in strings if isinstance(string, ast.Constant) and isinstance(string.value, str)]
    return values[0].count(values[1]) if len(values) == 2 else None


def _format_number(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**MAX_DECIMALS)
    whole, decimals = divmod(abs(scaled), 10**MAX_DECIMALS)
    text = f"{whole}.{decimals:0{MAX_DECIMALS}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text


class CalculatorLogitsProcessor(LogitsProcessor):
    """Writes the calculator's answer into the text: after a call only the result's tokens may follow.

    A call is `start` expression `end`; `output_start` result `output_end` is forced behind it. It looks at the tokens
    alone and keeps no state, so that batches, beams and resumed prompts need no care. The model itself can never
    open an output: a result always comes from the calculator. A refused expression gets no output.

    Args:
        table: `config.calculator`: the ids of the four marks; `pieces`, the text of every id an expression can be
            made of; `output`, the ids of every piece a result is cut into.
    """

    supports_continuous_batching = True  # there `calculator_batching` takes its place

    def __init__(self, table: dict[str, Any]) -> None:
        self.start, self.end = int(table["start"]), int(table["end"])
        self.output_start, self.output_end = int(table["output_start"]), int(table["output_end"])
        lines = (line.partition("\t") for line in table["pieces"].split("\n") if line)
        self.texts = {int(token_id): text for token_id, _, text in lines}
        self.output: dict[str, list[int]] = table["output"]
        longest = max(len(ids) for ids in self.output.values())
        self.reach = 2 + MAX_RESULT_CHARS * longest

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args: input_ids (B, T), scores (B, vocab_size); returns the scores with the forced rows replaced."""
        scores = scores.clone()
        scores[:, self.output_start] = float("-inf")
        recent = (input_ids[:, -self.reach :] == self.end).any(dim=1)
        for row in torch.nonzero(recent).flatten().tolist():
            token = self.next_token(input_ids[row].tolist())
            if token is not None:
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores

    def next_token(self, ids: list[int]) -> int | None:
        """The token the calculator writes after `ids`, or None when the model is free to choose."""
        last_end = len(ids) - 1 - ids[::-1].index(self.end)
        forced = self.result_ids(ids[:last_end])
        position = len(ids) - 1 - last_end
        return forced[position] if position < len(forced) else None

    def result_ids(self, before_end: list[int]) -> list[int]:
        """The marked-up result of the call that ends with `before_end`; empty when there is none."""
        if self.start not in before_end:
            return []
        expression = before_end[len(before_end) - before_end[::-1].index(self.start) :]
        if any(token_id not in self.texts for token_id in expression):
            return []
        result = evaluate_expression("".join(self.texts[token_id] for token_id in expression))
        if result is None:
            return []
        ids = [token_id for piece in _cut_result(result) for token_id in self.output[piece]]
        return [self.output_start, *ids, self.output_end]


def _cut_result(text: str) -> Iterator[str]:
    """Pieces of a result as the tokenizer's split pattern cuts it: signs and points alone, digits in pairs."""
    position = 0
    while position < len(text):
        length = 2 if text[position : position + 2].isdigit() and position + 1 < len(text) else 1
        yield text[position : position + length]
        position += length
