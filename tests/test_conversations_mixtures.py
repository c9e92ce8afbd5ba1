import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset

from chatmodel.conversations import datasets, mixtures, rows, sources
from chatmodel.conversations.mixtures import count_rows, describe_counts, load_mixture, mix_rows, preview_mixture
from chatmodel.conversations.render import render_conversation
from chatmodel.conversations.sources import MixtureEntry, Source, open_entry, parse_mixture
from chatmodel.data.words import is_held_out
from chatmodel.runtime import UserError

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
WORDS = ["absent", "bright", "candle", "dinner", "engine", "famous", "garden", "hollow", "island", "kettle", "lemon"]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


def write_rows(path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def talks(tmp_path) -> str:
    """Seven conversations that can be told apart."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(7)
    ]
    return write_rows(tmp_path / "talks.jsonl", rows)


def test_rows_labels_and_counts(tokenizer, talks):
    dataset, counts = load_mixture([{"name": "talks", "path": talks}, "Arithmetic"], tokenizer, max_length=64)
    assert set(dataset.column_names) == {"input_ids", "labels", "source"}
    assert [count["name"] for count in counts] == ["talks", "Arithmetic"]
    assert [count["rows"] for count in counts] == [7, 1000]
    for count in counts:
        rows = [row for row in dataset if row["source"] == count["name"]]
        assert count["rows"] == len(rows)
        assert count["tokens"] == sum(len(row["input_ids"]) for row in rows)
        assert count["trained_tokens"] == sum(label != -100 for row in rows for label in row["labels"])
        assert count["skipped"] == count["cut"] == count["dropped"] == 0
    talk = render_conversation(tokenizer, [TALK[0] | {"content": "Say 3"}, TALK[1] | {"content": "3"}])
    row = next(row for row in dataset if row["input_ids"] == talk.input_ids)
    assert row["labels"] == [i if m else -100 for i, m in zip(talk.input_ids, talk.mask, strict=True)]
    assert sum(label != -100 for label in row["labels"]) == 2, "the reply's one token and its end"


def test_mid_training_labels_everything(tokenizer, talks):
    dataset, counts = load_mixture([talks], tokenizer, max_length=64, train_on_prompts=True)
    assert all(row["labels"] == row["input_ids"] for row in dataset)
    assert counts[0]["trained_tokens"] == counts[0]["tokens"]


def test_the_order_is_nanochats(tokenizer, talks):
    """TaskMixture lists (task, row) pairs and shuffles them with Random(42); epochs are as listing a task twice."""
    expected = [(task, row) for task in range(3) for row in range(4)]
    random.Random(42).shuffle(expected)
    assert mix_rows([4, 4, 4], seed=42) == expected
    first, _ = load_mixture([talks, {"name": "Identity", "rows": 7}], tokenizer, max_length=64)
    again, _ = load_mixture([talks, {"name": "Identity", "rows": 7}], tokenizer, max_length=64)
    other, _ = load_mixture([talks, {"name": "Identity", "rows": 7}], tokenizer, max_length=64, seed=1)
    assert list(first["input_ids"]) == list(again["input_ids"]) != list(other["input_ids"])
    assert sorted(first["input_ids"]) == sorted(other["input_ids"])
    assert list(first["source"]) != sorted(first["source"]), "the tasks are mixed"


def test_no_row_without_a_trained_label_leaves(tokenizer, tmp_path):
    """nanochat's issue 590: conversations whose reply begins behind the cut gave a loss of 0/0."""
    long = {"messages": [{"role": "user", "content": "word " * 200}, TALK[1]]}
    half = {"messages": [TALK[0], {"role": "assistant", "content": "word " * 200}]}
    path = write_rows(tmp_path / "long.jsonl", [long, half, {"messages": TALK}])
    dataset, counts = load_mixture([path], tokenizer, max_length=32)
    assert counts[0] | {"tokens": 0, "trained_tokens": 0} == {
        "name": path,
        "rows": 2,
        "tokens": 0,
        "trained_tokens": 0,
        "skipped": 0,
        "cut": 1,
        "dropped": 1,
    }
    assert max(map(len, dataset["input_ids"])) == 32
    assert all(any(label != -100 for label in row["labels"][1:]) for row in dataset)
    with pytest.raises(UserError, match="none of the mixture's 1 conversations can be trained on"):
        load_mixture([write_rows(tmp_path / "only.jsonl", [long])], tokenizer, max_length=32)


def test_a_conversation_without_an_assistant_is_named_or_skipped(tokenizer, tmp_path, caplog):
    rows = [{"messages": TALK}, {"messages": TALK[:1]}, {"text": "no conversation"}, {"messages": TALK + TALK}]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=r"bad\.jsonl, row (2: .*no assistant turn|3: .*no conversation)"):
        load_mixture([path], tokenizer, max_length=64)
    with open(path, "a") as file:
        file.write("\n{broken\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 5 is not valid JSON"):
        load_mixture([path], tokenizer, max_length=64)
    with caplog.at_level("WARNING", logger="chatmodel"):
        dataset, counts = load_mixture([path], tokenizer, max_length=64, skip_invalid=True)
    assert len(dataset) == counts[0]["rows"] == 2
    assert counts[0]["skipped"] == 3
    assert "3 invalid conversations left out" in caplog.text
    for problem in ("row 2: the conversation has no assistant turn", "row 3: the row has no conversation", "line 5"):
        assert problem in caplog.text


def test_rows_epochs_and_weights():
    def count(entries, available):
        sources = [Source(str(n), size, lambda i: TALK, str) for n, size in enumerate(available)]
        return count_rows(parse_mixture([{"name": str(n)} | entry for n, entry in enumerate(entries)]), sources)

    assert count([{}, {"epochs": 2}, {"epochs": 0.5}], [10, 10, 10]) == [10, 20, 5]
    assert count([{"epochs": 0.01}], [10]) == [1]
    # 1,000 + 200 rows stay 1,200, shared 3 : 1; the entry without a weight keeps its own.
    assert count([{"weight": 3}, {"weight": 1}, {}], [1000, 200, 7]) == [900, 300, 7]


def test_repeated_rows_come_in_full_rounds(tokenizer, talks):
    dataset, _ = load_mixture([{"name": talks, "rows": 3, "epochs": 2}], tokenizer, max_length=64)
    texts = sorted(map(str, dataset["input_ids"]))
    assert len(texts) == 6
    assert len(set(texts)) == 3
    assert texts[::2] == texts[1::2]


def test_fewer_rows_are_a_part_of_more(talks):
    few, many = (open_entry(MixtureEntry(talks, rows=rows)) for rows in (3, 5))
    assert [few.read(i) for i in range(3)] == [many.read(i) for i in range(3)]
    assert few.locate(0) != f"{talks}, row 1", "they are drawn from everywhere in the file"


def test_splits_of_generated_tasks():
    def words_of(entry: MixtureEntry, **options) -> set[str]:
        source = open_entry(entry, words=WORDS, **options)
        return {source.read(index)[1]["content"].partition(":")[0] for index in range(50)}

    train, held_out = words_of(MixtureEntry("SimpleSpelling")), words_of(MixtureEntry("SimpleSpelling", split="test"))
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    assert words_of(MixtureEntry("SimpleSpelling"), split="validation") == held_out
    assert words_of(MixtureEntry("SimpleSpelling", split="train"), split="validation") == train


def test_public_tasks_come_from_the_folder(tokenizer, tmp_path):
    row = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    write_rows(tmp_path / "gsm8k_train.jsonl", [row])
    write_rows(tmp_path / "gsm8k_test.jsonl", [row | {"question": "two?"}, row])
    for split, size in (("train", 1), ("validation", 2)):
        dataset, _ = load_mixture(["GSM8K"], tokenizer, max_length=64, chatcore_folder=tmp_path, split=split)
        assert len(dataset) == size
    dataset, _ = load_mixture([{"name": "GSM8K", "path": str(tmp_path), "split": "test"}], tokenizer, max_length=64)
    assert len(dataset) == 2


def test_identity_and_word_list_from_a_path(tmp_path):
    (tmp_path / "who.yaml").write_text("name: Tiny")
    (tmp_path / "words.txt").write_text("apple\norange\nbanana\nmelon\ncherry\n")
    who = open_entry(MixtureEntry("Identity", path=str(tmp_path / "who.yaml")))
    assert any("Tiny" in who.read(index)[1]["content"] for index in range(20))
    facts = open_entry(MixtureEntry("Identity", facts=str(tmp_path / "who.yaml"), turns=3))
    assert facts.read(0)[:2] == who.read(0)
    assert max(len(facts.read(index)) for index in range(20)) > 2
    both = MixtureEntry("MultiTurn", path=str(tmp_path / "words.txt"), facts=str(tmp_path / "who.yaml"), turns=2)
    assert {len(open_entry(both).read(index)) for index in range(20)} == {4}
    assert "Tiny" in str([open_entry(both).read(index) for index in range(20)])
    spelling = open_entry(MixtureEntry("SimpleSpelling", path=str(tmp_path / "words.txt")))
    assert spelling.read(0)[1]["content"][:5] in "apple orange banana melon cherry"


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "mixture is empty"),
        (None, "mixture is empty"),
        ([{"rows": 3}], "entry 1 has no name"),
        ([3], "entry 1 has no name"),
        (["GSM8K", {"name": "X", "wieght": 1}], r"entry 2 \(X\) has the unknown key 'wieght'"),
        ([{"name": "X", "weight": 0}], "weight 0; give a number above 0"),
        ([{"name": "X", "weight": -1}], "weight -1"),
        ([{"name": "X", "epochs": 0}], "epochs 0"),
        ([{"name": "X", "epochs": "two"}], "epochs 'two'"),
        ([{"name": "X", "rows": 0}], "rows 0"),
        ([{"name": "X", "rows": 2.5}], "rows 2.5; give a number above 0, whole"),
        ([{"name": "X", "rows": True}], "rows True"),
        ([{"name": "X", "path": 3}], "path 3; it must be text"),
        ([{"name": "X", "epochs": 1, "weight": 1}], "both epochs and weight"),
        ([{"name": "X", "weight": float("nan")}], "weight nan"),
        ([{"name": "X", "epochs": float("inf")}], "epochs inf"),
        ([{"name": "X", "rows": -3}], "rows -3"),
        ([{"name": "X", "too_long": "keep"}], "too_long 'keep'; it must be 'cut' or 'drop'"),
        ([{"name": "X", "streaming": 1}], "streaming 1; it must be true or false"),
        ([{"name": "X", "streaming": True}], "say how many rows"),
        ([{"name": "Identity", "streaming": True}], "nothing to stream"),
        ([{"name": "X", "facts": "me.yaml"}], "has facts, which only"),
        ([{"name": "Arithmetic", "turns": 2}], "has turns, which only"),
        ([{"name": "MultiTurn", "turns": 0}], "turns 0; give a number above 0, whole"),
    ],
)
def test_wrong_entries_are_named(entries, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_mixture(entries)


def test_what_is_not_there_is_named(tokenizer, tmp_path):
    def load(entry, **options):
        return load_mixture([entry], tokenizer, max_length=options.pop("max_length", 64), **options)

    with pytest.raises(UserError, match="'Poetry' is not known; known are"):
        load("Poetry")
    with pytest.raises(UserError, match=r"'gsm8k' is not known \(did you mean GSM8K\?\)"):
        load("gsm8k")
    with pytest.raises(UserError, match=r"'WordProblem' is not known \(did you mean WordProblems\?\)"):
        load("WordProblem")
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        load({"name": "mine", "path": str(tmp_path / "none.jsonl")})
    with pytest.raises(UserError, match=r"data/none\.jsonl does not exist"):
        load("data/none.jsonl")
    with pytest.raises(UserError, match=r"ann/talk \(train\) is absent"):
        load("ann/talk")
    with pytest.raises(UserError, match="max_length is 1"):
        load("Arithmetic", max_length=1)


def test_too_long_conversations_are_cut_or_dropped(tokenizer, tmp_path, caplog):
    half = {"messages": [TALK[0], {"role": "assistant", "content": "word " * 200}]}
    path = write_rows(tmp_path / "long.jsonl", [half, {"messages": TALK}])
    for rule, kept, cut, dropped in (("cut", 2, 1, 0), ("drop", 1, 0, 1)):
        dataset, counts = load_mixture([{"name": path, "too_long": rule}], tokenizer, max_length=32)
        assert [len(dataset), *(counts[0][key] for key in ("rows", "cut", "dropped"))] == [kept, kept, cut, dropped]
    path = write_rows(tmp_path / "all.jsonl", [half])
    load_mixture([{"name": path, "too_long": "drop"}, "Arithmetic"], tokenizer, max_length=32)
    assert f"{path}: none of its conversations can be trained on" in caplog.text


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_stream_gives_its_first_rows_shuffled(tokenizer, tmp_path, ending, monkeypatch):
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": f"reply {n}"}]} for n in range(50)]
    path = tmp_path / f"smoltalk_train{ending}"
    if ending == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    monkeypatch.setattr(sources, "SHUFFLE_ROWS", 8)
    entry = {"name": "SmolTalk", "rows": 20, "streaming": True}
    dataset, counts = load_mixture([entry, "Arithmetic"], tokenizer, max_length=64, chatcore_folder=tmp_path)
    again, _ = load_mixture([entry, "Arithmetic"], tokenizer, max_length=64, chatcore_folder=tmp_path)
    assert dataset.cache_files, "on the disk, not in memory"
    assert list(dataset["input_ids"]) == list(again["input_ids"])
    assert counts[0]["rows"] == 20
    found = [row["input_ids"] for row in dataset if row["source"] == "SmolTalk"]
    first = [render_conversation(tokenizer, row["messages"]).input_ids for row in rows[:20]]
    assert sorted(found) == sorted(first)
    assert found != first
    twice, _ = load_mixture([entry | {"path": str(path), "epochs": 2}], tokenizer, max_length=64)
    assert sorted(twice["input_ids"]) == sorted(first * 2)
    with pytest.raises(UserError, match="ends after 50 rows, but 51 are asked for"):
        load_mixture([{"name": str(path), "rows": 51, "streaming": True}], tokenizer, max_length=64, skip_invalid=True)


def test_a_stream_from_the_hub_holds_no_more_than_its_buffer(tokenizer, monkeypatch):
    """A stand-in for the Hub that counts the rows it has given."""
    given = []

    def stream(hub, subset, split, streaming):
        assert (hub, subset, split, streaming) == ("HuggingFaceTB/smol-smoltalk", None, "train", True)

        def rows():
            for n in range(10**9):
                given.append(n)
                yield {"messages": [TALK[0], {"role": "assistant", "content": str(n)}]}

        return rows()

    monkeypatch.setattr(datasets, "HfApi", lambda: SimpleNamespace(dataset_info=lambda hub, timeout: None))
    monkeypatch.setattr(datasets, "load_dataset", stream)
    monkeypatch.setattr(sources, "SHUFFLE_ROWS", 5)
    source = open_entry(MixtureEntry("SmolTalk", rows=30, streaming=True))
    assert source.count == 30
    assert len(given) == 6, "the buffer, and the row that pushed the first one out"
    seen = []
    for index in range(10):
        seen.append(int(source.read(index)[1]["content"]))
        assert len(given) == 6 + index
    assert len(set(seen)) == 10
    assert source.locate(9) == f"HuggingFaceTB/smol-smoltalk (train), row {seen[-1] + 1}"
    monkeypatch.setattr(datasets, "HfApi", lambda: 1 / 0)
    with pytest.raises(UserError, match=r"SmolTalk \(train\) is absent"):
        open_entry(MixtureEntry("SmolTalk", rows=30, streaming=True))


def test_a_large_mixture_is_the_same_on_the_disk(tokenizer, talks, monkeypatch):
    small, _ = load_mixture([talks, "Identity"], tokenizer, max_length=64)
    monkeypatch.setattr(mixtures, "LARGE_MIXTURE", 100)
    large, _ = load_mixture([talks, "Identity"], tokenizer, max_length=64)
    assert large.cache_files
    assert not small.cache_files
    assert list(large) == list(small)
    assert large.features == small.features


@pytest.fixture
def in_processes(monkeypatch):
    """Rows are made by two processes, three rows at a time."""
    monkeypatch.setattr(rows, "CHUNK_ROWS", 3)
    monkeypatch.setattr(rows, "PARALLEL_ROWS", 0)
    monkeypatch.setattr(rows, "count_cores", lambda: 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process")
def test_processes_make_the_same_rows_and_counts(tokenizer, tmp_path, request, caplog, monkeypatch):
    wrong = [{"messages": TALK[:1]}, {"text": "none"}] * 3
    path = write_rows(tmp_path / "some.jsonl", [{"messages": TALK}, {"messages": TALK + TALK}, *wrong] * 5)
    entries = [{"name": path, "too_long": "drop"}, {"name": "Arithmetic", "rows": 50}, {"name": path, "epochs": 2}]

    def load():
        with caplog.at_level("WARNING", logger="chatmodel"):
            caplog.clear()
            dataset, counts = load_mixture(entries, tokenizer, max_length=32, skip_invalid=True)
        return list(dataset), counts, dataset.features, caplog.text

    alone = load()
    request.getfixturevalue("in_processes")
    numbers = []
    original = rows.open_processes

    def open_processes(work, number, **options):
        numbers.append(number)
        return original(work, number, **options)

    monkeypatch.setattr(rows, "open_processes", open_processes)
    assert load() == alone
    assert numbers == [2]
    assert alone[1][0]["skipped"] == 30
    assert "and 27 more" in alone[3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process")
def test_a_wrong_row_is_named_by_a_process_too(tokenizer, tmp_path, in_processes):
    path = write_rows(tmp_path / "bad.jsonl", [{"messages": TALK}] * 20 + [{"messages": TALK[:1]}])
    with pytest.raises(UserError, match=r"bad\.jsonl, row 21: .*no assistant turn.*skip_invalid"):
        load_mixture([path], tokenizer, max_length=64)


def test_a_stand_in_is_a_file_of_conversations(talks):
    source = open_entry(MixtureEntry("SmolTalk", path=talks))
    assert (source.name, source.count) == ("SmolTalk", 7)
    assert source.read(0)[0]["content"].startswith("Say")
    assert open_entry(MixtureEntry("GSM8K", path=talks)).read(0)[0]["content"].startswith("Say")


def test_counts_are_described(tokenizer, tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": [TALK[0] | {"content": "x" * 99}]}])
    entries = [{"name": "mine", "path": path}, {"name": "Arithmetic", "rows": 2}]
    with caplog.at_level("INFO", logger="chatmodel"):
        _, counts = load_mixture(entries, tokenizer, max_length=64, skip_invalid=True)
    lines = describe_counts(counts)
    tokens = [count["tokens"] for count in counts]
    share = f"{tokens[0] / sum(tokens):.1%}"
    trained = len(tokenizer.encode("Hello there", add_special_tokens=False)) + 1
    assert lines[0] == (
        f"mine: 1 conversations, {tokens[0]} tokens ({share}), {trained} of them trained; 1 skipped as invalid"
    )
    assert lines[-1].startswith(f"all: 3 conversations, {sum(tokens)} tokens (100.0%)")
    assert all(line in caplog.text for line in lines)


def test_the_preview_begins_with_a_users_own_rows(tokenizer, talks):
    dataset, _ = load_mixture(["Arithmetic", {"name": "mine", "path": talks}], tokenizer, max_length=64)
    legend, *lines = preview_mixture(dataset, tokenizer, 2)
    assert "green" in legend
    assert "grey" in legend
    assert [line.partition(":")[0] for line in lines] == ["mine", "mine", "Arithmetic", "Arithmetic"]
    assert "\033[90m<|user_start|>\033[0m" in lines[0]
    assert "\033[92m<|assistant_end|>\033[0m" in lines[0]


@pytest.mark.data
def test_the_seeds_sft_mixture_has_its_22439_rows(data_root):
    entries = parse_mixture(yaml.safe_load((CONFIGS / "seed" / "sft.yaml").read_text())["mixture"])
    stand_in = str(data_root / "chat" / "instruct_mixed.jsonl.gz")
    entries = [replace(entry, path=stand_in) if entry.name == "SmolTalk" else entry for entry in entries]
    opened = [open_entry(entry, folder=data_root / "chatcore", words=WORDS) for entry in entries]
    assert sum(count_rows(entries, opened)) == 22_439


@pytest.mark.data
def test_every_chat_file_renders(tokenizer, data_root):
    sizes = {
        "cot_train": 25_970,
        "gsm8k_train": 7_473,
        "instruct_mixed": 10_185,
        "openstax_exercises": 12_756,
        "sgd_dialogues": 6_000,
        "stackexchange_qa": 1_229,
        "svamp_asdiv": 2_535,
        "t0_tasks": 12_000,
        "taskmaster4": 3_677,
        "topical_chat": 2_156,
    }
    for name, size in sizes.items():
        source = open_entry(MixtureEntry(name, path=str(data_root / "chat" / f"{name}.jsonl.gz")))
        assert source.count == size
        entry = {"name": name, "path": str(data_root / "chat" / f"{name}.jsonl.gz"), "rows": 50}
        dataset, counts = load_mixture([entry], tokenizer, max_length=4096)
        assert len(dataset) == 50 - counts[0]["dropped"]
        assert counts[0]["skipped"] == 0
