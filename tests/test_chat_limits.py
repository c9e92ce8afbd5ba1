"""What a server refuses: each limit at its edge, and requests that no client means well."""

import json

import pytest

from chatmodel.chat.limits import Limits, RequestError, check_request, read_json_object

LIMITS = Limits(max_messages=3, max_message_chars=10, max_chars=150, max_new_tokens=100)
ASKED = [{"role": "user", "content": "Hi"}]


def check(knows_tools=False, **body):
    check_request({"messages": ASKED} | body, LIMITS, knows_tools=knows_tools)


def test_what_is_within_the_limits_passes():
    check(temperature=0, top_p=1, max_tokens=100, n=1, seed=0, stop=["a", "b"], stream=True, tools=[], model="m")
    check(temperature=2.0, max_completion_tokens=1, stop="x" * 64, frequency_penalty=0.5, tools=None)
    check(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 10}]}])
    check(messages=[{"role": "user", "content": "x"}] * 3)
    call = {"function": {"name": "f", "arguments": "{}"}}
    check(knows_tools=True, messages=[*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    check(knows_tools=True, tools=[{"type": "function"}])
    check_request({"prompt": "x" * 90}, LIMITS, knows_tools=False)
    check_request({"input": "Hello", "max_output_tokens": 5}, LIMITS, knows_tools=False)


REFUSED = {
    "too many messages": ({"messages": ASKED * 4}, "there are 4 messages; at most 3"),
    "a long message": (
        {"messages": [{"role": "user", "content": "x" * 11}]},
        "message 1 has 11 characters; at most 10",
    ),
    "long parts": (
        {"messages": [*ASKED, {"role": "user", "content": [{"type": "text", "text": "x" * 6}] * 2}]},
        "message 2 has 12 characters",
    ),
    "much text": ({"model": "x" * 160}, "characters of text; at most 150"),
    "much text in keys": ({"tools": [{"x" * 160: 1}]}, "at most 150"),
    "no messages": ({"messages": []}, "there are no messages"),
    "messages of no form": ({"messages": "Hi"}, "there are no messages"),
    "a message of no form": ({"messages": ["Hi"]}, "message 1 is not of the form"),
    "a message without role": ({"messages": [{"content": "Hi"}]}, "message 1 is not of the form"),
    "content of no form": ({"messages": [{"role": "user", "content": 5}]}, "neither text nor a list"),
    "no content": ({"messages": [{"role": "user"}]}, "neither text nor a list"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is read"),
    "an input of no form": ({"input": [5]}, "message 1 is not of the form"),
    "half a surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    "many answers": ({"n": 10**6}, "n=1000000 answers"),
    "answers of no number": ({"n": "many"}, "n=many answers"),
    "one of many": ({"best_of": 5}, "best_of=5"),
    "cold": ({"temperature": -0.5}, "temperature=-0.5 must be a number from 0 to 2"),
    "hot": ({"temperature": 2.5}, "from 0 to 2"),
    "no temperature": ({"temperature": "0.5"}, "temperature=0.5 must be a number"),
    "infinite": ({"temperature": float("inf")}, "temperature=inf"),
    "true": ({"temperature": True}, "temperature=True"),
    "long answers": ({"max_tokens": 101}, "max_tokens=101 must be a whole number from 1 to 100"),
    "no answer": ({"max_completion_tokens": 0}, "from 1 to 100"),
    "half a token": ({"max_output_tokens": 1.5}, "a whole number"),
    "no top_p": ({"top_p": 0}, "top_p=0"),
    "a huge seed": ({"seed": 2**70}, "seed=1180591620717411303424"),
    "negative penalty": ({"frequency_penalty": -2}, "frequency_penalty=-2"),
    "stream of no form": ({"stream": "yes"}, "stream must be true or false"),
    "many stops": ({"stop": ["a"] * 5}, "at most 4"),
    "an empty stop": ({"stop": [""]}, "1 to 64 characters"),
    "a stop of no form": ({"stop": {"a": 1}}, "stop must be a text or a list"),
    "tools": ({"tools": [{"type": "function"}]}, "leave tools out"),
    "a call": ({"messages": [{"role": "user", "tool_calls": []}]}, "knows nothing"),
    "tools of no form": ({"tools": False}, "tools must be a list"),
    "a suffix of no form": ({"suffix": [1]}, "suffix must be a text"),
    "instructions of no form": ({"instructions": -1}, "instructions must be a text"),
    "a model of no form": ({"model": {}}, "model must be a text"),
    "a config's end": (
        {"generation_config": '{"eos_token_id": [[1]]}'},
        "eos_token_id in generation_config must be a",
    ),
    "a config's beginning": (
        {"generation_config": '{"bos_token_id": {}}'},
        "bos_token_id in generation_config must be",
    ),
    "a config's version": ({"generation_config": '{"transformers_version": 5}'}, "must be a text"),
    "a config's padding": (
        {"generation_config": '{"pad_token_id": "x"}'},
        "pad_token_id in generation_config must be",
    ),
    "a config": ({"generation_config": '{"num_beams": 4}'}, "num_beams in generation_config is not taken"),
    "a config's length": ({"generation_config": '{"max_new_tokens": 99999}'}, "max_new_tokens=99999 must be"),
    "a config that is none": ({"generation_config": {"top_k": 5}}, "a text that holds a JSON object"),
    "a template": ({"chat_template_kwargs": {}}, "chat_template_kwargs is not taken"),
    "biases": ({"logit_bias": {"x": 1}}, "logit_bias is not taken"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_over_a_limit_is_refused_with_a_sentence(changes, message):
    with pytest.raises(RequestError, match=message) as caught:
        check(**changes)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff{}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=["nothing", "half", "list", "number", "no UTF-8", "NaN", "Infinity", "deep", "long number"],
)
def test_broken_json_is_refused(body):
    with pytest.raises(RequestError) as caught:
        read_json_object(body)
    assert caught.value.status == 400
    assert read_json_object(json.dumps({"a": "ä"}).encode()) == {"a": "ä"}
