"""The pages of documentation, and what the tests look for in them: commands, blocks of Python, links, names of files."""

import re

from hf_helpers import REPO

NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/README.md")
PAGES = {
    name: (REPO / name).read_text(encoding="utf-8")
    for name in (*NAMES, *sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").rglob("*.md")))
}
WHOLE = ("docs/quickstart.md", "docs/concepts.md", "docs/api/index.md")
SCRIPTS = [name for name in PAGES if name.startswith("docs/tutorials/") or name in WHOLE]
"""Pages that are programs as they stand: their blocks run one after the other."""
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def indented(name):
    """The lines of a page that are set off by four spaces, without the comments behind them."""
    return re.findall(r"^    (\S.*?)(?:  +#.*)?$", FENCED.sub("", PAGES[name]), re.MULTILINE)


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE)


def script(name):
    """What a reader of a page runs, in order: pairs of a block of Python and None, or of None and a command of a shell."""
    command = r"^    ((?:lozo-kernels|torchrun|accelerate) [^\n]*?)(?:  +#[^\n]*)?$"
    found = re.findall(rf"^```python\n(.*?)^```|{command}", PAGES[name], re.DOTALL | re.MULTILINE)
    return [(block or None, line or None) for block, line in found]


def links(name):
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGES[name]))


def quoted(name):
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", PAGES[name]))


def anchors(name):
    """What a link may point to within a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", PAGES[name]), re.MULTILINE)
    described = re.findall(r"^::: (\S+)$", PAGES[name], re.MULTILINE)  # by mkdocstrings, on the site
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(described)
