"""Markup, code and tables go; sentences stay."""

import pytest

from chatmodel.data.prose import clean_markup, is_prose


def test_numpydoc():
    text = """
    Compute the weighted average along the specified axis.

    The result is `nan` where *all* weights are zero, see
    :func:`numpy.average` and the `guide <https://example.org/guide>`_ [1]_.

    Parameters
    ----------
    a : array_like, optional
        The array that contains the data to be averaged over
        the given axis.
    axis : {0, 1}
        Short.

    Returns
    -------
    out : ndarray
        The average along the axis that was asked for.

    See Also
    --------
    mean : average of all the elements that are in the array

    Examples
    --------
    The two calls below give the same number for all the inputs:

    >>> average([1, 2, 3])
    2.0

    .. versionadded:: 1.7
       It was added there and was not in the releases before that.
    .. note:: This is what you want in most of the cases.
    """
    assert clean_markup(text) == [
        "Compute the weighted average along the specified axis.",
        "The result is nan where all weights are zero, see numpy.average and the guide.",
        "a: The array that contains the data to be averaged over the given axis.",
        "out: The average along the axis that was asked for.",
        "The two calls below give the same number for all the inputs:",
        "This is what you want in most of the cases.",
    ]


def test_google_and_sphinx_entries_lose_their_types():
    text = """
    Args:
        path (`str` or `Path`, *optional*): Where the file is
            to be written, with all of its folders.
        mode: The mode in which the file will be opened.
    :param int count: How many of them should be read at once.
    :type count: int
    :returns: All of the lines that are in the given file.
    """
    assert clean_markup(text) == [
        "path: Where the file is to be written, with all of its folders.",
        "mode: The mode in which the file will be opened.",
        "count: How many of them should be read at once.",
        "All of the lines that are in the given file.",
    ]


def test_markdown():
    text = """# A heading that is long enough to be taken for a sentence

![badge](https://img.example/x.svg) It is **the** library for [tables](https://example.org) that you have been missing.

| column | what the column is for in the table |
|---|---|

```python
this = "would be a sentence if it was not in a fence"
```
> [!WARNING]
> This is what you should not do with it,
> as all of us have learned.
>
> A second paragraph of the quotation is here as well.

- The first of the items in a list, with
  its second line.
- x = 1
"""
    assert clean_markup(text) == [
        "It is the library for tables that you have been missing.",
        "This is what you should not do with it, as all of us have learned.",
        "A second paragraph of the quotation is here as well.",
        "- The first of the items in a list, with its second line.",
    ]


def test_literal_blocks_and_attributes_in_running_text():
    text = """
    Call it like this when you want to have all of it::

        result = call_it(with_all, of_it, and_more)

    Then use .items of the result, as it is in the docs (https://example.org/a.b?c=d).
    """
    assert clean_markup(text) == [
        "Call it like this when you want to have all of it:",
        "Then use .items of the result, as it is in the docs.",
    ]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("This is what a sentence looks like to the filter.", True),
        ("Too short to keep.", False),
        ("- But an item may be short.", True),
        ("foo_bar(x, y) -> z[1:2] == {0: 'a', 1: 'b'} if q is None else 3 * 4 + 5", False),
        ("Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Athens Prague", False),
    ],
)
def test_is_prose(paragraph, expected):
    assert is_prose(paragraph) is expected


def test_unclosed_fence_and_empty_text():
    assert clean_markup("```\nnever closed, and this is all that there is in it") == []
    assert clean_markup("") == []
