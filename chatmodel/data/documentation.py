"""Which prose do the installed packages and the standard library carry: docstrings, topics, README files?"""

import ast
import importlib.metadata
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatmodel.data.prose import BULLET, clean_markup

STANDARD_LIBRARY = "python"
# Folders without prose, or with other projects' prose, and files that say the same in every package. The last ones,
# modular_*, are what Transformers generates its modelling files from, and hold the same docstrings.
SKIPPED_FOLDERS = {
    *(
        "tests",
        "test",
        "testing",
        "_testing",
        "idle_test",
        "benchmarks",
        "_vendor",
        "vendor",
        "vendored",
        "third_party",
    ),
    *("externals", "_pyrepl", "lib2to3", "encodings", "ensurepip", "site-packages", "dist-packages", "__pycache__"),
}
SKIPPED_FILES = re.compile(
    r"licen[cs]e|copying|notice|author|contribut|credits|requirements|entry_points|top_level|sources?\.txt"
    r"|installed-files|cmakelists|changes?log|__version__|conftest|security|code_of_conduct|^test_|^modular_",
    re.I,
)
MIN_QUOTED_SHARE = (
    0.08  # files with a smaller share of docstrings hold 2 % of the text, and parsing them takes 20 % longer
)
TEXT_SUFFIXES = {".rst", ".md", ".txt"}
MAX_FILE_BYTES = 3_000_000
LONG_LITERAL = 400  # characters from which a string handed to a function at module level counts as documentation
DOCUMENT_CHARS = 1_000  # a class is cut after so much, which a row of 256 tokens holds; see `BestFitPlan` for why
MIN_DOCUMENT_WORDS = 40


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and the package it belongs to."""

    package: str
    path: Path
    size: int


def find_files(package: str) -> list[SourceFile]:
    """The Python and text files of an installed distribution (of the standard library: `STANDARD_LIBRARY`), sorted."""
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [root / path for path in sorted(p.relative_to(root) for p in root.rglob("*.py")) if is_wanted(path)]
    else:
        distribution = importlib.metadata.distribution(package)
        listed = sorted(Path(str(path)) for path in distribution.files or [] if is_wanted(Path(str(path))))
        paths = [Path(str(distribution.locate_file(path))) for path in listed]
    found = [(path, path.stat().st_size) for path in paths if path.is_file()]
    return [SourceFile(package, path, size) for path, size in found if size <= MAX_FILE_BYTES]


def is_wanted(path: Path) -> bool:
    """Whether a path inside a package can hold documentation."""
    if path.name == "METADATA":
        return True
    if SKIPPED_FOLDERS.intersection(path.parts) or SKIPPED_FILES.search(path.name):
        return False
    if any(part.endswith((".dist-info", ".data")) or part == ".." for part in path.parts):
        return False
    return path.suffix == ".py" or path.suffix in TEXT_SUFFIXES


def read_documents(file: SourceFile) -> list[str]:
    """The documents of one file: paragraphs joined by blank lines, list items by line ends."""
    content = file.path.read_bytes()
    if file.path.suffix == ".py":
        quoted = sum(len(part) for quotes in (b'"""', b"'''") for part in content.split(quotes)[1::2])
        if quoted <= MIN_QUOTED_SHARE * len(content):
            return []
        units = read_docstrings(content)
    else:
        text = content.decode("utf-8", errors="replace")
        # METADATA is a mail: headers, a blank line, the README.
        units = iter([[text.partition("\n\n")[2] if file.path.name == "METADATA" else text]])
    return [document for unit in units for document in compose_documents(unit)]


def read_topics() -> list[str]:
    """The language reference's topics that `help()` shows."""
    return [document for topic in pydoc_data.topics.topics.values() for document in compose_documents([topic])]


def read_docstrings(source: bytes) -> Iterator[list[str]]:
    """For the module, each top-level class or function and each long literal handed to a call: its texts, in order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield [ast.get_docstring(tree) or ""]
    for position, node in enumerate(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield list(docstrings_of(node))
        elif position > 0:  # a literal in first place is the module's docstring
            yield list(long_literals_of(node))


def long_literals_of(statement: ast.stmt) -> Iterator[str]:
    """The documentation in `add_docstring(name, "...")` or `NOTES = "..."` at module level."""
    if not isinstance(statement, ast.Expr | ast.Assign):
        return
    value = statement.value
    for node in value.args if isinstance(value, ast.Call) else [value]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= LONG_LITERAL:
            yield node.value


def docstrings_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstring of a definition, then those of the definitions inside it."""
    yield ast.get_docstring(node) or ""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings_of(inner)


def compose_documents(texts: list[str]) -> list[str]:
    """Clean the texts and join them into documents of about `DOCUMENT_CHARS`; one that stays too short is dropped."""
    documents = [""]
    previous = ""
    for paragraph in (paragraph for text in texts for paragraph in clean_markup(text)):
        if len(documents[-1]) >= DOCUMENT_CHARS:
            documents.append("")
        follows_item = BULLET.match(paragraph) and BULLET.match(previous)
        separator = "" if not documents[-1] else "\n" if follows_item else "\n\n"
        documents[-1] += separator + paragraph
        previous = paragraph
    if len(documents) > 1 and not is_long_enough(documents[-1]):
        documents[-2:] = ["\n\n".join(documents[-2:])]
    return [document for document in documents if is_long_enough(document)]


def is_long_enough(document: str) -> bool:
    """Whether a document has the words to be one."""
    return len(document.split()) >= MIN_DOCUMENT_WORDS
