"""Links of a page to files outside of docs/ lead to the repository on the site, and pictures from there are part of the site.

A link whose text is the name of a page, which is what one reads in the repository, shows the title of that page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Adds the pictures of bench/results, under their path in the repository."""
    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def title_of(path):
    """The first heading of a page. A page that is not there is a warning of mkdocs."""
    page = ROOT / path
    return page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") if page.is_file() else posixpath.basename(path)


def on_page_markdown(markdown, page, config, **_):
    """Rewrites links, but not those that are shown in a block of code."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def rewritten(link):
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if path.startswith("docs/") and link["text"] == posixpath.basename(path):
            return f"[{title_of(path)}]({link['target']}{link['anchor'] or ''})"
        if path.startswith(("docs/", "..")):
            return link.group()
        if link["mark"]:
            return f"![{link['text']}]({posixpath.relpath(path, folder.removeprefix('docs').lstrip('/') or '.')})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri} links to {link['target']}, which is not in the repository")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{link['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{link['anchor'] or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
