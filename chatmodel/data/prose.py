"""What is left of a docstring, reStructuredText or Markdown page when its markup, code and tables are taken out?"""

import inspect
import re
from collections.abc import Callable

# How a line can begin something that is not prose.
QUOTE = re.compile(r"^\s*>\s?(?:\[!\w+\])?(?!>)")
FENCE = re.compile(r"\s*(```|~~~)")
DOCTEST = re.compile(r"\s*(>>>|In \[\d*\]:|\$ )")
DIRECTIVE = re.compile(r"\s*\.\.\s+(?:([\w-]+)::\s*(.*)|\S.*)$")
BARE_DIRECTIVE = re.compile(r"\s*\.\.\s*$")
ADMONITIONS = {"note", "warning", "tip", "hint", "important", "caution", "attention", "admonition", "topic"}
UNDERLINE = re.compile(r"\s*([=\-~^\"'`*+#.:_])\1{2,}\s*$")
TABLE = re.compile(r"\s*(\||\+[-=+]+\+|[=-]{2,}(\s+[=-]{2,})+\s*$)")
MARKDOWN_HEADING = re.compile(r"\s*#{1,6}\s")
SECTION_LABEL = re.compile(
    r"\s*\**(Args?|Arguments|Parameters|Params|Keyword Arguments|Kwargs|Returns?|Yields?|Raises|Attributes|Inputs?"
    r"|Outputs?|Shape|Examples?|Usage|Notes?|References?|See also|Methods|Options|Reference)\**\s*:{1,2}\s*\**$",
    re.I,
)

ENTRY_SECTIONS = {"parameters", "other parameters", "returns", "yields", "raises", "attributes", "warns", "receives"}
DROPPED_SECTIONS = {"see also", "references", "methods", "routine listings", "bibliography", "changelog", "citation"}

BULLET = re.compile(r"\s*(?:[-*+•]|\(?\d{1,2}[.)]|#\.)\s+(?=\S)")
GOOGLE_ENTRY = re.compile(r"\s*[*`]{0,3}(\w+)[*`]{0,3}\s*\((?:[^()]|\([^()]*\))*\)\s*:\s*")
PLAIN_ENTRY = re.compile(r"\s{2,}[*`]{0,3}([a-z_]\w*)[*`]{0,3}\s*:\s+(?=[A-Z`])")
FIELD_ENTRY = re.compile(r"\s*:(?:param|parameter|arg|keyword|ivar|var|cvar)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*")
FIELD_RESULT = re.compile(r"\s*:(?:returns?|raises?[^:]*|yields?)\s*:\s*")
FIELD_TYPE = re.compile(r"\s*:(?:type|rtype|vartype|license|copyright|author)[^:]*:")

INLINE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, flags), replacement)
    for pattern, replacement, flags in (
        (r"<!--.*?-->", "", re.S),
        (r"</?[A-Za-z][^<>\n]{0,200}>(?!`)", "", 0),  # HTML tags, but not the target of an rst link
        (r"!\[[^\]]*\]\([^)\s]*\)", "", 0),  # images and badges
        (r"\[\[?`?([^\]\[`]+)`?\]?\]\([^)\s]*\)", r"\1", 0),  # [text](target)
        (r"\[`~?([\w.]+)`\]", r"\1", 0),
        (r":[a-z][\w:+-]*:`([^`<]*?)\s*<[^`>]*>`", r"\1", 0),  # :role:`text <target>`
        (r":[a-z][\w:+-]*:`[~!]?([^`]*)`", r"\1", 0),  # :role:`target`
        (r"`([^`<]+?)\s*<[^`>]+>`__?", r"\1", 0),  # `text <target>`_
        (r"\s?\[[\w#*]+\]_", "", 0),  # footnotes and citations
        (r"\|([\w ]+)\|_{0,2}", r"\1", 0),  # substitutions
        (r"``([^`]*)``", r"\1", 0),
        (r"`~?\.?([^`\n]*)`_{0,2}", r"\1", 0),
        (r"\*\*([^*\n]+)\*\*", r"\1", 0),
        (r"(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])", r"\1", 0),
        (r"(?<!\w)_([^_\s][^_\n]*)_(?!\w)", r"\1", 0),
        (r"\\([*_`|<>])", r"\1", 0),
        (r"\s*<?\b(?:https?|ftp)://[^\s>)]*[^\s>).,;:]>?", "", 0),
        (r"\(\s*\)", "", 0),
        (r"[ \t]+([.,;:])(?=\s|$)", r"\1", 0),
        (r"[ \t]{2,}", " ", 0),
    )
)

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about after all also an and any are as at be because been before between both but by can could do does each"
        " for from had has have how i if in into is it its may more most must no not of on one only or other our"
        " should so some such than that the their them then there these they this those to two up use used uses using"
        " was we were what when where whether which will with without would you your",
    )
)


def clean_markup(text: str) -> list[str]:
    """The prose paragraphs of a marked-up text, each on one line; list items keep their marker."""
    paragraphs: list[str] = []
    for paragraph in join_lines(drop_blocks(inspect.cleandoc(text.expandtabs(4)).split("\n"))):
        for pattern, replacement in INLINE:
            paragraph = pattern.sub(replacement, paragraph)
        paragraph = paragraph.strip()
        if is_prose(paragraph):
            paragraphs.append(paragraph)
    return paragraphs


def is_prose(paragraph: str) -> bool:
    """Whether the words of a paragraph are mostly English sentences, and not identifiers, numbers or formulas."""
    words = WORD.findall(paragraph)
    if len(words) < (5 if BULLET.match(paragraph) else 8):
        return False
    letters = sum(map(len, words)) + paragraph.count(" ")
    glue = sum(word.lower() in FUNCTION_WORDS for word in words)
    return letters >= 0.85 * len(paragraph) and glue >= 0.2 * len(words)


def drop_blocks(lines: list[str]) -> list[str]:
    """The lines without code, doctests, directives, headings and tables; parameter entries lose their types."""
    kept: list[str] = []
    position = 0
    while position < len(lines):
        for block in BLOCKS:
            replaced = block(lines, position)
            if replaced is not None:
                kept += replaced[0]
                position = replaced[1]
                break
        else:
            kept.append(lines[position])
            position += 1
    return kept


# What a block answers where it begins: (the lines to keep instead, the position after it). Elsewhere it answers None.
Replaced = tuple[list[str], int]


def indent_of(line: str) -> int:
    """Columns before the first character; large for a blank line, which belongs to any block."""
    return len(line) - len(line.lstrip()) if line.strip() else 1_000


def skip_indented(lines: list[str], position: int, indent: int) -> int:
    """Position of the first line from `position` on that is not indented by more than `indent`."""
    while position < len(lines) and indent_of(lines[position]) > indent:
        position += 1
    return position


def drop_fence(lines: list[str], position: int) -> Replaced | None:
    """A fenced code block goes, to its closing fence or, where that is missing, to the end."""
    fence = FENCE.match(lines[position])
    if not fence:
        return None
    position += 1
    while position < len(lines) and not lines[position].lstrip().startswith(fence[1]):
        position += 1
    return [""], position + 1


def drop_doctest(lines: list[str], position: int) -> Replaced | None:
    """A prompt and its output go, to the next blank line."""
    if not DOCTEST.match(lines[position]):
        return None
    while position < len(lines) and lines[position].strip():
        position += 1
    return [""], position


def drop_directive(lines: list[str], position: int) -> Replaced | None:
    """Directives, targets, footnotes and comments go with their indented body; the text of admonitions stays."""
    line = lines[position]
    directive = DIRECTIVE.match(line) or BARE_DIRECTIVE.match(line)
    if not directive:
        return None
    if directive.re is DIRECTIVE and directive[1] in ADMONITIONS:
        return ["", str(directive[2])], position + 1
    return [""], skip_indented(lines, position + 1, indent_of(line))


def drop_heading(lines: list[str], position: int) -> Replaced | None:
    """Headings go; a section of parameters loses its types, and a section of mere references goes whole."""
    line = lines[position]
    if MARKDOWN_HEADING.match(line) or SECTION_LABEL.match(line) or UNDERLINE.match(line):
        return [""], position + 1
    if position + 1 == len(lines) or not line.strip() or not UNDERLINE.match(lines[position + 1]):
        return None
    title = line.strip().lower()
    if title not in ENTRY_SECTIONS | DROPPED_SECTIONS:
        return [""], position + 2
    start = end = position + 2
    while end < len(lines) and not is_heading(lines, end):
        end += 1
    return ([""] if title in DROPPED_SECTIONS else rewrite_entries(lines[start:end])), end


def is_heading(lines: list[str], position: int) -> bool:
    """Whether a non-blank line is underlined."""
    following = lines[position + 1] if position + 1 < len(lines) else ""
    return bool(lines[position].strip() and UNDERLINE.match(following) and not UNDERLINE.match(lines[position]))


def rewrite_entries(lines: list[str]) -> list[str]:
    """A numpydoc section as "name: description" paragraphs, its types left out."""
    base = min((indent_of(line) for line in lines if line.strip()), default=0)
    rewritten: list[str] = []
    for line in lines:
        if indent_of(line) > base:
            if line.strip() and rewritten and rewritten[-1].endswith(":\f"):  # the line right after a name
                rewritten[-1] = f"{rewritten[-1][:-1]} {line.strip()}"
            else:
                rewritten.append(line)
        else:
            name, has_type, _ = line.strip().partition(" : ")
            rewritten += ["", f"{name.strip('*`')}:\f" if has_type else ""]
    return drop_blocks([line for line in rewritten if not line.endswith("\f")])


def drop_table(lines: list[str], position: int) -> Replaced | None:
    """Grid, simple and Markdown tables go, to the next blank line."""
    if not TABLE.match(lines[position]):
        return None
    while position < len(lines) and lines[position].strip():
        position += 1
    return [""], position


def drop_literal(lines: list[str], position: int) -> Replaced | None:
    """The indented block after a line that ends in two colons goes; the line keeps one."""
    line = lines[position].rstrip()
    if not line.endswith("::"):
        return None
    return [line[:-1], ""], skip_indented(lines, position + 1, indent_of(line))


BLOCKS: tuple[Callable[[list[str], int], Replaced | None], ...] = (
    drop_fence,
    drop_doctest,
    drop_directive,
    drop_table,
    drop_heading,
    drop_literal,
)


def join_lines(lines: list[str]) -> list[str]:
    """Paragraphs, unwrapped: a blank line, a list item or a parameter entry begins a new one."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        unquoted = QUOTE.sub("", line, count=1)
        start, text = begin_of_item(unquoted)
        if start or not unquoted.strip():
            paragraphs.append([])
        if text:
            paragraphs[-1].append(text)
    return [" ".join(paragraph) for paragraph in paragraphs if paragraph]


def begin_of_item(line: str) -> tuple[bool, str]:
    """Whether a line begins a list item or an entry, and its text, the entry's type left out."""
    if FIELD_TYPE.match(line):
        return True, ""
    for pattern in (FIELD_ENTRY, GOOGLE_ENTRY, PLAIN_ENTRY):
        if match := pattern.match(line):
            return True, f"{match[1]}: {line[match.end() :].strip()}"
    if match := FIELD_RESULT.match(line):
        return True, line[match.end() :].strip()
    return bool(BULLET.match(line)), line.strip()
