"""Code size and dependency counts, on folders made for the purpose."""

import importlib.metadata
import subprocess

from chatmodel.report.code_size import (
    CodeSize,
    close_requirements,
    count_constraints,
    find_repository,
    list_code_files,
    measure_parts,
    read_requirements,
    sum_sizes,
)


def make_checkout(root):
    files = {
        "pyproject.toml": '[project]\ndependencies = ["jinja2>=3", "markupsafe"]\n',
        "pkg/a.py": "x = 1\ny = 2\n",
        "pkg/b.py": "é\n",
        "pkg/weights.bin": "0" * 1000,
        "runs/cpu/report.md": "not code",
        ".venv/lib/c.py": "not code",
        "Makefile": "all:\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_measure_without_git(tmp_path):
    make_checkout(tmp_path)
    parts = measure_parts(tmp_path)
    assert parts == {".": CodeSize(58, 3, 2), "pkg": CodeSize(14, 3, 2)}  # é is one character
    total = sum_sizes(parts.values())
    assert (total, total.tokens) == (CodeSize(72, 6, 4), 18)


def test_git_decides_what_counts(tmp_path):
    make_checkout(tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "pkg/a.py", "pkg/weights.bin", "Makefile"], check=True)
    assert list_code_files(tmp_path) == [tmp_path / "Makefile", tmp_path / "pkg/a.py"]
    (tmp_path / "pkg/a.py").unlink()
    assert list_code_files(tmp_path) == [tmp_path / "Makefile"]


def test_installed_package_counts_itself_only(tmp_path):
    for name in ("chatmodel/a.py", "torch/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1\n")
    assert measure_parts(tmp_path) == {"chatmodel": CodeSize(2, 1, 1)}


def test_dependencies(tmp_path):
    make_checkout(tmp_path)
    assert read_requirements(tmp_path) == ["jinja2>=3", "markupsafe"]
    assert close_requirements(["Jinja2>=3"]) == {"jinja2", "markupsafe"}
    assert close_requirements(['jinja2; python_version < "3"', "no-such-package-here", "not a requirement!"]) == set()
    assert count_constraints(tmp_path) is None
    (tmp_path / "constraints.txt").write_text("# pinned\n\njinja2==3.1\nmarkupsafe==3\n")
    assert count_constraints(tmp_path) == 2


def test_extras_are_followed(monkeypatch):
    declared = {"a": ["b; extra == 'x'", "c"], "b": ["a[x]"], "c": None}
    monkeypatch.setattr(importlib.metadata, "requires", declared.__getitem__)
    assert close_requirements(["a"]) == {"a", "c"}
    assert close_requirements(["a[x]"]) == {"a", "b", "c"}


def test_this_repository_is_found():
    parts = measure_parts(find_repository())
    assert parts["chatmodel"].files > 10
    assert len(close_requirements(read_requirements(find_repository()))) > 20
