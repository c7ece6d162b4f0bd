"""Docstrings name each other with the roles of reStructuredText; on the site these are links, where the reference has the name."""

import re

from griffe import AliasResolutionError, Extension, NameResolutionError

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(?P<short>~?)(?P<target>[\w.]+)`")
EXAMPLE = re.compile(r"^(?P<said>[^\n]*)::\n\n(?P<code>(?:    [^\n]*(?:\n|\Z)|\n)+)", re.MULTILINE)


def path_of(name, described):
    """The full name of what a docstring means by a name."""
    name = name.lstrip(".")
    if name.startswith("lozo_kernels"):
        return name
    first, _, rest = name.partition(".")
    try:
        found = described.resolve(first)
    except (NameResolutionError, AliasResolutionError):
        return name
    return f"{found}.{rest}" if rest else found


class Roles(Extension):
    """Rewrites the docstrings of all that is loaded."""

    def on_object(self, *, obj, **_):
        """Called for every module, class, function and attribute."""
        if obj.is_alias or obj.docstring is None:
            return

        def link(role):
            shown = role["target"].lstrip(".")
            shown = shown.rpartition(".")[2] if role["short"] else shown
            return f'<autoref optional identifier="{path_of(role["target"], obj)}"><code>{shown}</code></autoref>'

        def fenced(example):
            code = "\n".join(line[4:] for line in example["code"].rstrip().splitlines())
            return f"{example['said']}:\n\n```python\n{code}\n```\n"

        obj.docstring.value = EXAMPLE.sub(fenced, ROLE.sub(link, obj.docstring.value))
