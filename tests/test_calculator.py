"""The calculator: exact, closed to everything but arithmetic and counting, and forced into the model's output."""

import pytest
import torch

from chatmodel.model.calculator import CalculatorLogitsProcessor, evaluate_expression
from chatmodel.tokenizer import calculator_table


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12+30", "42"),
        ("2*(3+4)-5", "9"),
        ("12/60*50", "10"),
        ("0.1+0.2", "0.3"),
        ("10/3", "3.333333"),
        ("-2/3", "-0.666667"),
        ("1,000+1", "1001"),
        (" 7 ", "7"),
        ("'banana'.count('a')", "3"),
        ("\"a,b\".count(',')", "1"),
        ("1/3-1/3", "0"),
    ],
)
def test_results(expression, result):
    assert evaluate_expression(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1/0",
        "2**9999",
        "9" * 300,
        "9" * 30,
        "__import__('os').system('true')",
        "'a'.upper()",
        "'a'*10**9",
        "'a'.count(x)",
        "'a'.count('a', 1)",
        "(lambda: 1)()",
        "[1][0]",
        "1 if 1 else 2",
        "True+True",
        "1j",
        "(" * 190,
        "'a'.count",
        "f'{1}'",
        "\x00",
    ],
)
def test_everything_else_is_refused(expression):
    assert evaluate_expression(expression) is None


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("call", "result"), [("12+30", "42"), ("'banana'.count('n')", "2"), ("5-17.5", "-12.5"), ("99*99", "9801")]
)
def test_the_result_is_forced_token_by_token(tokenizer, call, result):
    processor = CalculatorLogitsProcessor(calculator_table(tokenizer))
    ids = encode(tokenizer, f"It is <|python_start|>{call}<|python_end|>")
    expected = encode(tokenizer, f"<|output_start|>{result}<|output_end|>")
    for token in expected:
        scores = processor(torch.tensor([ids]), torch.randn(1, len(tokenizer)))
        assert scores[0].argmax() == token
        assert torch.isinf(scores[0]).sum() == len(tokenizer) - 1
        ids.append(token)
    free = processor(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))
    assert torch.isinf(free[0]).nonzero().flatten().tolist() == [tokenizer.convert_tokens_to_ids("<|output_start|>")]


def test_a_refused_call_gets_no_output(tokenizer):
    processor = CalculatorLogitsProcessor(calculator_table(tokenizer))
    for text in ("<|python_start|>2**9<|python_end|>", "no start<|python_end|>", "<|python_start|><|python_end|>"):
        scores = processor(torch.tensor([encode(tokenizer, text)]), torch.zeros(1, len(tokenizer)))
        assert torch.isinf(scores).sum() == 1


def test_rows_of_a_batch_do_not_mix(tokenizer):
    processor = CalculatorLogitsProcessor(calculator_table(tokenizer))
    rows = [encode(tokenizer, f"<|python_start|>1+{n}<|python_end|><|output_start|>") for n in (1, 2, 3)]
    scores = processor(torch.tensor(rows), torch.zeros(3, len(tokenizer)))
    assert tokenizer.batch_decode(scores.argmax(-1)[:, None]) == ["2", "3", "4"]


def test_generate_calls_it(tokenizer, chat_model):
    prompt = encode(tokenizer, "<|bos|>What is 12 plus 30?<|python_start|>12+30<|python_end|>")
    output = chat_model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=True)
    text = tokenizer.decode(output[0, len(prompt) :])
    assert text.startswith("<|output_start|>42<|output_end|>")
