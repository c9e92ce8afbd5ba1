"""Files of a folder that take the place of the Hub's data sets in a mixture."""

import pytest

from chatmodel.conversations.stand_ins import choose_sources
from chatmodel.runtime import UserError

ENTRIES = [
    {"name": "SmolTalk", "rows": 100, "stand_ins": [{"path": "chats.jsonl.gz", "epochs": 2}, {"path": "more.jsonl"}]},
    {"name": "SpellingBee", "rows": 9, "stand_ins": [{"name": "SpellingBee", "path": "words.txt.gz", "rows": 5}]},
    "GSM8K",
]


def test_without_a_folder_the_mixture_is_the_hubs():
    assert choose_sources(ENTRIES, None) == [
        {"name": "SmolTalk", "rows": 100},
        {"name": "SpellingBee", "rows": 9},
        "GSM8K",
    ]


def test_with_a_folder_files_stand_in(tmp_path):
    for name in ("chats.jsonl.gz", "more.jsonl", "words.txt.gz"):
        (tmp_path / name).touch()
    assert choose_sources(ENTRIES, tmp_path) == [
        {"name": "chats", "path": str(tmp_path / "chats.jsonl.gz"), "epochs": 2},
        {"name": "more", "path": str(tmp_path / "more.jsonl")},
        {"name": "SpellingBee", "path": str(tmp_path / "words.txt.gz"), "rows": 5},
        "GSM8K",
    ]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"chats\.jsonl\.gz, which stands in for SmolTalk, is not in"):
        choose_sources(ENTRIES, tmp_path)
    with pytest.raises(UserError, match="nowhere is no folder"):
        choose_sources(ENTRIES, tmp_path / "nowhere")
    with pytest.raises(UserError, match="stand_ins of SmolTalk"):
        choose_sources([{"name": "SmolTalk", "stand_ins": "chats.jsonl"}], tmp_path)
