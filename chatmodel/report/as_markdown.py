"""Write a report as Markdown (CommonMark with tables), whatever its texts contain."""

import re

from chatmodel.report.document import (
    Block,
    Document,
    Facts,
    Figure,
    NotRun,
    Paragraph,
    Section,
    Source,
    Table,
    Transcript,
)
from chatmodel.report.formats import show_controls


def write_markdown(document: Document) -> str:
    """The whole document; figures are links to `plots/<name>.svg`."""
    parts = [f"# {escape_text(document.title)}", escape_text(document.subtitle)]
    parts += [write_section(section) for section in document.sections]
    return "\n\n".join(parts) + "\n"


def write_section(section: Section) -> str:
    """A heading and its blocks."""
    return "\n\n".join([f"## {escape_text(section.title)}", *(write_block(block) for block in section.blocks)])


def write_block(block: Block) -> str:
    """One block, without an empty line before or after it."""
    match block:
        case Paragraph(text):
            return escape_text(text)
        case Facts(rows, caption):
            return _captioned(caption, "\n".join(f"- {escape_text(k)}: {escape_text(v)}" for k, v in rows))
        case Table():
            return _captioned(block.caption, _write_table(block))
        case NotRun(reason, _, what):
            text = f"{escape_text(what)} not run: {escape_text(reason)}".strip()
            how = "".join(quote_code(part) if is_code else escape_text(part) for part, is_code in block.how_spans)
            return f"{text}. To get it: {how}" if how else text
        case Source(file, details, command):
            text = f"From [{escape_text(file)}]({file.replace(' ', '%20')}) ({escape_text(details)})"
            return text if command is None else f"{text}, made by {quote_code(command)}"
        case Transcript(caption, turns):
            return _captioned(caption, fence_text("\n\n".join(f"{role}: {text}" for role, text in turns)))
        case Figure(name, caption):
            return f"![{escape_text(caption)}](plots/{name}.svg)"


def _captioned(caption: str, text: str) -> str:
    return f"**{escape_text(caption)}**\n\n{text}" if caption else text


def _write_table(table: Table) -> str:
    rules = ["---" if i < table.num_text_columns else "---:" for i in range(len(table.header))]
    lines = [table.header, tuple(rules), *table.rows]
    return "\n".join(
        f"| {' | '.join(row if number == 1 else map(escape_text, row))} |" for number, row in enumerate(lines)
    )


def escape_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line of source; line breaks become `<br>`."""
    text = show_controls(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is no emphasis
    return text.replace("\n", "<br>")


def quote_code(text: str) -> str:
    """An inline code span that survives backticks in the text."""
    text = " ".join(show_controls(text).split())
    fence = "`" * (_longest_backticks(text) + 1)
    padding = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def fence_text(text: str) -> str:
    """A code block with a fence longer than any in the text."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}text\n{show_controls(text)}\n{fence}"


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
