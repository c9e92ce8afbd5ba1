"""Repeated paragraphs go, by runs of eight words."""

from chatmodel.data.duplicates import find_repeated, remove_near_duplicates

FIRST = "one two three four five six seven eight nine ten eleven twelve"
OTHER = "the quick brown fox jumps over the lazy dog and runs far away"


def test_runs_of_eight_words_decide():
    # FIRST has 5 runs; "... ten ELEVEN x" keeps 4 of 5, and one changed word in the middle leaves none of 5.
    changed_end = FIRST.replace("twelve", "dozen")
    changed_middle = FIRST.replace("six", "half-a-dozen")
    assert find_repeated([FIRST, OTHER, changed_end, changed_middle, FIRST.upper()]) == [
        False,
        False,
        True,
        False,
        True,
    ]


def test_short_paragraphs_and_repetition_within_one_are_not_repeated():
    assert find_repeated(["see below", "see below", f"{FIRST} {FIRST} {FIRST}"]) == [False, False, False]


def test_documents_lose_repeated_paragraphs_or_go():
    unique = "here is something that nobody has ever said in this way before today, and nobody will again"
    documents = [f"{FIRST}\n\n{OTHER}", f"{FIRST}\n\n{unique}", f"{FIRST}\n\n{OTHER}\n\nnew", OTHER, "too short"]
    assert remove_near_duplicates(documents, min_words=5) == [
        f"{FIRST}\n\n{OTHER}",
        unique,
        None,  # one word of 26 is new
        None,
        None,
    ]


def test_nothing():
    assert remove_near_duplicates([], min_words=1) == []
    assert find_repeated(["", "a"]) == [False, False]
