"""What pyproject.toml cannot say: the page of a package index is the README without its own links.

A link or picture relative to the README leads nowhere from such a page. Links become text with the
name of the file, which is in the source distribution; pictures are left out.
"""

import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def plain(link: re.Match[str]) -> str:
    """A link or picture of the README as it stands on an index page."""
    picture, label, target = link.groups()
    if re.match(r"https?:", target):
        return link[0]
    if picture:
        return ""
    file = target.partition("#")[0]
    return label if file in ("", label) else f"{label} ({file})"


parts = BLOCK.split((Path(__file__).parent / "README.md").read_text(encoding="utf-8"))
parts[::2] = [LINK.sub(plain, part) for part in parts[::2]]  # between them, blocks of code
setup(long_description="".join(parts), long_description_content_type="text/markdown")
