"""What README and docs point to is there: files, places in files, programs, presets, and the options of the latter."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
PROGRAM = re.compile(r"\b(?:scripts|recipes|docs|tests|chatmodel)/[\w/.-]*\.(?:py|sh|yaml|md|png|jinja)\b")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, place in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not place or place in anchors(file), f"{target}#{place}"


@pytest.mark.parametrize("page", [PAGES[0], ROOT / "docs" / "chat.md"], ids=lambda page: page.name)
def test_programs_and_presets_are_there(page):
    text = page.read_text(encoding="utf-8")
    for path in PROGRAM.findall(text):
        assert (ROOT / path).exists(), path
    for preset in re.findall(r"PRESET=(\w+)", text):
        assert preset == "my_preset" or (ROOT / "recipes" / "configs" / preset / "eval.yaml").is_file(), preset
    for preset in re.findall(r"recipes/configs/(\w+)", text):
        assert (ROOT / "recipes" / "configs" / preset).is_dir(), preset


def test_what_the_readme_makes_is_not_committed():
    ignored = (ROOT / ".gitignore").read_text().split()
    made = {"runs/", ".venv/", "/out/", "/my_preset/", "/eval_bundle.zip"}
    assert made <= set(ignored)
