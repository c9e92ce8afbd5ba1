"""Write a report as one self-contained HTML page, whatever its texts contain."""

import base64
import html
from collections.abc import Mapping
from urllib.parse import quote

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

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #777; --mark: #b45309; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; margin-bottom: 0; }
h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--line); }
nav { columns: 15rem; font-size: .9rem; margin: 1rem 0; } nav a { display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { padding: .18rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; min-width: 3.5rem; }
th.n, td.n { text-align: right; white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
dl { display: grid; grid-template-columns: minmax(10rem, max-content) 1fr; gap: .1rem 1.2rem; font-size: .92rem; }
dt { color: var(--quiet); } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.source { color: var(--quiet); font-size: .85rem; }
.missing { border-left: 3px solid var(--mark); padding-left: .7rem; }
code { background: var(--soft); padding: 0 .25rem; border-radius: 3px; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption { color: var(--quiet); font-size: .85rem; }
.turn { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .3rem .7rem; }
.turn b { color: var(--quiet); font-size: .8rem; } .turn.assistant { background: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .1rem 0; font-size: .85rem; }
"""


def write_html(document: Document, plots: Mapping[str, bytes]) -> str:
    """The whole document; `plots` holds each figure's SVG by its name."""
    links = "".join(f'<a href="#{section.slug}">{escape_text(section.title)}</a>' for section in document.sections)
    body = "\n".join(write_section(section, plots) for section in document.sections)
    title = escape_text(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="source">{escape_text(document.subtitle)}</p>\n'
        f"<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def write_section(section: Section, plots: Mapping[str, bytes]) -> str:
    """A heading and its blocks."""
    blocks = "\n".join(write_block(block, plots) for block in section.blocks)
    return f'<section id="{section.slug}">\n<h2>{escape_text(section.title)}</h2>\n{blocks}\n</section>'


def write_block(block: Block, plots: Mapping[str, bytes]) -> str:
    """One block as an element."""
    match block:
        case Paragraph(text):
            return f"<p>{escape_text(text)}</p>"
        case Facts(rows, caption):
            pairs = "".join(f"<dt>{escape_text(key)}</dt><dd>{escape_text(value)}</dd>" for key, value in rows)
            return (f"<p><b>{escape_text(caption)}</b></p>" if caption else "") + f"<dl>{pairs}</dl>"
        case Table():
            return _write_table(block)
        case NotRun(reason, _, what):
            text = escape_text(f"{what} not run: {reason}".strip())
            spans = [(escape_text(part), is_code) for part, is_code in block.how_spans]
            how = "".join(f"<code>{part}</code>" if is_code else part for part, is_code in spans)
            return f'<p class="missing">{text}{". To get it: " if how else ""}{how}</p>'
        case Source(file, details, command):
            ending = "" if command is None else f", made by <code>{escape_text(command)}</code>"
            link = f'<a href="{escape_text(quote(file))}">{escape_text(file)}</a>'
            return f'<p class="source">From {link} ({escape_text(details)}){ending}</p>'
        case Transcript(caption, turns):
            return f"<p><b>{escape_text(caption)}</b></p>" + "".join(_write_turn(*turn) for turn in turns)
        case Figure(name, caption):
            data = base64.b64encode(plots[name]).decode()
            text = escape_text(caption)
            image = f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'
            return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _write_turn(role: str, text: str) -> str:
    kind = " assistant" if role in ("assistant", "completion") else ""
    shown = html.escape(show_controls(text))
    return f'<div class="turn{kind}"><b>{escape_text(role)}</b><pre>\n{shown}</pre></div>'


def _write_table(table: Table) -> str:
    kinds = ["" if i < table.num_text_columns else ' class="n"' for i in range(len(table.header))]

    def write_row(cells: tuple[str, ...], tag: str) -> str:
        columns = zip(cells, kinds, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape_text(cell)}</{tag}>" for cell, kind in columns) + "</tr>"

    caption = f"<caption>{escape_text(table.caption)}</caption>" if table.caption else ""
    rows = "\n".join(write_row(row, "td") for row in table.rows)
    head = write_row(table.header, "th")
    return f'<div class="scroll"><table>{caption}<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def escape_text(text: str) -> str:
    """Text that a browser shows as it is; line breaks are kept."""
    return html.escape(show_controls(text)).replace("\n", "<br>")
