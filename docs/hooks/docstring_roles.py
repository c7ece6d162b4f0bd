"""Docstrings as the site shows them.

They name each other with the roles of reStructuredText, which become links where the reference has the name. The help of fields of
a dataclass, from which the command line has its own, becomes the description of its attributes.
"""

import re

from griffe import AliasResolutionError, Extension, NameResolutionError

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(?P<short>~?)(?P<target>[\w.]+)`")
TOGETHER = re.compile(r"^ +\w+(?:, \w+)+: ", re.MULTILINE)
HELP = re.compile(r"metadata=\{'help': (?P<text>'[^']*'|\"[^\"]*\")\}")
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

        def joined(names):
            """Attributes that share a line; after a space griffe expects a type."""
            return names.group()[:-1].replace(", ", ",\N{NO-BREAK SPACE}") + " "

        text = TOGETHER.sub(joined, ROLE.sub(link, obj.docstring.value))
        obj.docstring.value = EXAMPLE.sub(fenced, text)

    def on_class_members(self, *, cls, **_):
        """Called when all that is in a class is known."""
        helped = {name: HELP.search(str(attribute.value)) for name, attribute in cls.attributes.items()}
        lines = [f"    {name}: {found['text'][1:-1]}" for name, found in helped.items() if found]
        if lines and cls.docstring is not None:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
