import gzip
import json

import pytest
from datasets import Dataset

from chatmodel.conversations.files import convert_row, read_rows, stream_rows
from chatmodel.conversations.render import render_conversation
from chatmodel.runtime import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_jsonl(path, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_each_layout_gives_the_same_rows(tmp_path, name):
    rows = [{"messages": TALK}, {"messages": TALK + TALK}]
    path = tmp_path / name
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith("json"):
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    found = read_rows(path)
    assert [convert_row(row) for row in found.rows] == [TALK, TALK + TALK]
    assert found.locate(1) == f"{path}, row 2"


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"messages": TALK}])
    write_jsonl(tmp_path / "a.jsonl.gz", [{"messages": TALK + TALK}, {"messages": TALK}])
    (tmp_path / "README.md").write_text("not data")
    found = read_rows(tmp_path)
    assert [len(row["messages"]) for row in found.rows] == [4, 2, 2]
    assert [found.locate(i) for i in range(3)] == [
        f"{tmp_path / 'a.jsonl.gz'}, row 1",
        f"{tmp_path / 'a.jsonl.gz'}, row 2",
        f"{tmp_path / 'b.jsonl'}, row 1",
    ]


def test_a_folder_of_parquet_files_stays_on_the_disk(tmp_path):
    for name in "ab":
        Dataset.from_list([{"messages": TALK}]).to_parquet(str(tmp_path / f"{name}.parquet"))
    found = read_rows(tmp_path)
    assert isinstance(found.rows, Dataset)
    assert [convert_row(row) for row in found.rows] == [TALK, TALK]


@pytest.mark.parametrize(
    "row",
    [
        TALK,
        {"messages": TALK, "source": "x"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello"},
    ],
)
def test_layouts_of_a_row(row):
    assert convert_row(row) == TALK


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Sort:", "input": "b a", "output": "a b"}
    assert convert_row(row)[0]["content"] == "Sort:\n\nb a"


def test_sharegpt_system():
    row = {"conversations": [{"from": "system", "value": "Be kind."}]}
    assert convert_row(row) == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "Hi"}, r"no conversation in it \(found: text\)"),
        ("Hi", r"found: str"),
        ({"messages": "Hi"}, "found: messages"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "from 'tool'"),
        ({"conversations": [{"value": "x"}]}, "not of the form"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"from \['gpt'\]"),
        ({"instruction": 3, "output": "x"}, "'instruction' is 3, which is no text"),
    ],
)
def test_rows_without_a_conversation(row, complaint):
    with pytest.raises(UserError, match=complaint):
        convert_row(row)


def test_what_cannot_be_read_is_named(tmp_path):
    def check(name: str, content: bytes, complaint: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=complaint) as caught:
            read_rows(path)
        assert str(path) in str(caught.value)

    check("a.csv", b"x", "unknown ending")
    check("a.jsonl", b"", "is empty")
    check("a.json", b"[]", "is empty")
    check("a.json", b"{}", "no list")
    check("a.json", b"[", "not valid JSON")
    check("b.jsonl", b"{}\n\n{nonsense\n", "line 3 is not valid JSON")
    check("c.jsonl", b"\xff\xfe\n", "line 1 is not UTF-8 text")
    check("a.jsonl.gz", b"not gzip", "damaged")
    check("b.jsonl.gz", gzip.compress(json.dumps(TALK).encode() * 99)[:-20], "damaged")
    check("a.parquet", b"PAR1 nonsense", "damaged")
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        read_rows(tmp_path / "empty")


def test_windows_files_and_all_of_unicode(tmp_path, tokenizer):
    """A byte order mark, CRLF between rows and inside them, and characters of every kind come through as they are."""
    text = "Größe 東京 🙂 e\u0301\r\nline\u2028two"
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}] * 2
    for number, ascii_only in enumerate((True, False)):
        path = tmp_path / f"{number}.jsonl"
        content = "\r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [convert_row(row) for row in read_rows(path).rows] == [row["messages"] for row in rows]
        assert [row for _, row in stream_rows(path)] == rows
    ids = render_conversation(tokenizer, rows[0]["messages"]).input_ids
    assert tokenizer.decode(ids).count(text) == 2


def test_multi_turn_and_system_in_each_layout(tokenizer):
    texts = ["Be brief.", "Hi", "Hello", "Bye", "Bye!"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    senders = ["system", "human", "gpt", "human", "gpt"]
    turns = [{"from": sender, "value": text} for sender, text in zip(senders, texts, strict=True)]
    for row in ({"messages": messages}, {"conversations": turns}, {"conversations": messages}, messages):
        assert convert_row(row) == messages
    rendered = render_conversation(tokenizer, messages)
    assert tokenizer.decode(rendered.input_ids) == (
        "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>Hello<|assistant_end|>"
        "<|user_start|>Bye<|user_end|><|assistant_start|>Bye!<|assistant_end|>"
    )
    trained = [token_id for token_id, kept in zip(rendered.input_ids, rendered.mask, strict=True) if kept]
    assert tokenizer.decode(trained) == "Hello<|assistant_end|>Bye!<|assistant_end|>"


def test_a_bad_line_can_be_kept_in_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(TALK)}\n{{"cut off\n{json.dumps(TALK)}')
    rows = read_rows(path, keep_bad=True).rows
    assert [convert_row(row) for row in rows[::2]] == [TALK, TALK]
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        convert_row(rows[1])


def test_a_line_that_is_not_utf8_is_named_and_can_be_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(TALK).encode()
    path.write_bytes(good + b'\n[{"role": "user", "content": "caf\xe9"}]\n' + b"9" * 5000 + b"\n" + good)
    with pytest.raises(UserError, match="line 2 is not UTF-8 text; save the file as UTF-8"):
        read_rows(path)
    rows = read_rows(path, keep_bad=True).rows
    assert [convert_row(row) for row in rows[::3]] == [TALK, TALK]
    with pytest.raises(UserError, match="line 3 is not valid JSON"):
        convert_row(rows[2])
    (tmp_path / "b.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(UserError, match=r"b\.json is not UTF-8 text"):
        read_rows(tmp_path / "b.json")


def test_streaming_reads_a_folder_and_names_its_rows(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"messages": TALK}])
    Dataset.from_list([{"messages": TALK}] * 3).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "c.json").write_text(json.dumps([TALK]))
    found = list(stream_rows(tmp_path))
    assert [convert_row(row) for _, row in found] == [TALK] * 5
    assert [where for where, _ in found][2:4] == [f"{tmp_path / 'a.parquet'}, row 3", f"{tmp_path / 'b.jsonl'}, row 1"]
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(TALK).encode() * 99)[:-20])
    with pytest.raises(UserError, match=r"d\.jsonl\.gz is damaged"):
        list(stream_rows(tmp_path))
