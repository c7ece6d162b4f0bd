"""The pages of documentation, and what the tests look for in them: commands, blocks of Python, links, names of files."""

import re

from hf_helpers import REPO

NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/README.md")
PAGES = {
    name: (REPO / name).read_text(encoding="utf-8")
    for name in (*NAMES, *sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").glob("*.md")))
}
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def indented(name):
    """The lines of a page that are set off by four spaces, without the comments behind them."""
    return re.findall(r"^    (\S.*?)(?:  +#.*)?$", FENCED.sub("", PAGES[name]), re.MULTILINE)


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE)


def links(name):
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGES[name]))


def quoted(name):
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", PAGES[name]))


def anchors(name):
    """What a link may point to within a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", PAGES[name]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
