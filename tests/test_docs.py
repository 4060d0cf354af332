"""Every relative link, anchor and path of the repository in the documentation exists."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(REPO).as_posix()
    for pattern in ("*.md", "docs/*.md", "scripts/comparing/pages/vendor/*.md")
    for path in REPO.glob(pattern)
)
# the changelog names files as they were called then, and the walk names files that it makes (tests follow it)
PAGES_OF_TODAY = sorted({*PAGES} - {"CHANGELOG.md", "docs/adding-a-strategy.md"})
SOURCES = [path for folder in ("train", "launch", "scripts") for path in (REPO / folder).rglob("*.py")]

BLOCK = re.compile(r"^```(?s:.*?)^```$|^    .*$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(
    r"(?<![\w/.*~-])(?:train|launch|scripts|tests|configs|docs)/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|md|yaml|sh|png))?"
)


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page: lower case, no punctuation, a hyphen for each space."""
    headings = HEADING.findall(re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str) -> list[str]:
    broken = []
    for target in LINK.findall(BLOCK.sub("", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (REPO / page).parent / name if name else REPO / page
        if not file.exists() or (anchor and anchor not in anchors(file.resolve().relative_to(REPO).as_posix())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_of_a_page_exist(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES_OF_TODAY)
def test_paths_that_a_page_names_exist(page):
    assert [path for path in PATH.findall(text_of(page)) if not (REPO / path).exists()] == []


def test_pages_that_the_code_names_exist():
    named = {name for path in SOURCES for name in re.findall(r"\bdocs/[\w-]+\.md", path.read_text(encoding="utf-8"))}
    assert named, "this could not have failed"
    assert [name for name in sorted(named) if not (REPO / name).exists()] == []


def test_every_page_can_be_reached_from_the_readme():
    linked = {target.partition("#")[0] for target in LINK.findall(text_of("README.md"))}
    assert [page for page in PAGES if page.startswith("docs/") and page not in linked] == []
