"""How big is the code, and how much does it lean on? The seed calls it bloat."""

import importlib.metadata
import subprocess
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

CODE_SUFFIXES = frozenset({".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".jinja", ".html", ".css", ".js"})
CODE_NAMES = frozenset({"Makefile"})
CHARS_PER_TOKEN = 4  # rule of thumb for code, as in the seed report
SKIPPED_FOLDERS = frozenset({"runs", "build", "dist", "node_modules", "__pycache__"})


@dataclass(frozen=True)
class CodeSize:
    """Totals over source, configuration and documentation files."""

    characters: int
    lines: int
    files: int

    @property
    def tokens(self) -> int:
        """About how many tokens a language model would read."""
        return self.characters // CHARS_PER_TOKEN


def find_repository() -> Path:
    """The folder that holds the package: the checkout for an editable installation."""
    return Path(__file__).resolve().parents[2]


def list_code_files(root: Path) -> list[Path]:
    """Files of `root` that count as code: what git tracks, else (no git, nothing tracked) what lies there.

    A folder without pyproject.toml is no checkout (but site-packages, say): only its `chatmodel/` counts.
    """
    if not (root / "pyproject.toml").exists():
        root = root / "chatmodel"
    paths = _list_tracked(root) or [
        path
        for path in root.rglob("*")
        if not any(part.startswith(".") or part in SKIPPED_FOLDERS for part in path.relative_to(root).parts)
    ]
    return sorted(
        path for path in paths if (path.suffix in CODE_SUFFIXES or path.name in CODE_NAMES) and path.is_file()
    )


def _list_tracked(root: Path) -> list[Path]:
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [root / name.decode(errors="surrogateescape") for name in found.split(b"\0") if name]


def measure_code(paths: Iterable[Path]) -> CodeSize:
    """Characters, lines and number of the files."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return CodeSize(sum(map(len, texts)), sum(len(text.splitlines()) for text in texts), len(texts))


def measure_parts(root: Path) -> dict[str, CodeSize]:
    """Code size per top-level folder, files at the top under `.`; largest first."""
    parts: dict[str, list[Path]] = {}
    for path in list_code_files(root):
        relative = path.relative_to(root)
        parts.setdefault(relative.parts[0] if len(relative.parts) > 1 else ".", []).append(path)
    sizes = {name: measure_code(paths) for name, paths in parts.items()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1].characters))


def sum_sizes(sizes: Iterable[CodeSize]) -> CodeSize:
    """The total of several parts."""
    sizes = list(sizes)
    return CodeSize(sum(s.characters for s in sizes), sum(s.lines for s in sizes), sum(s.files for s in sizes))


def read_requirements(root: Path) -> list[str]:
    """The requirements the package declares (extras left out): from pyproject.toml, else from its installation."""
    path = root / "pyproject.toml"
    if path.exists():
        return list(tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("dependencies", []))
    try:
        declared = importlib.metadata.requires("chatmodel") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text for text in declared if "extra ==" not in text]


def close_requirements(requirements: Iterable[str]) -> set[str]:
    """Names of the installed packages that `requirements` need, directly or through others, on this machine."""
    waiting = [(text, "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    installed: set[str] = set()
    while waiting:
        text, extra = waiting.pop()
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # old packages declare what no longer parses; pip skips it as well
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                waiting += [(inner, wanted) for inner in importlib.metadata.requires(name) or []]
            except importlib.metadata.PackageNotFoundError:
                continue
            installed.add(name)
    return installed


def count_constraints(root: Path) -> int | None:
    """Packages pinned in `constraints.txt`; None without that file."""
    path = root / "constraints.txt"
    if not path.exists():
        return None
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))
