"""Guides that ship with the package: Markdown files in `docs/`, named as their files are."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

GUIDES = "guides"
"""The subject under which `explain` lists them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    name: str
    title: str
    """Its first heading."""
    summary: str
    """The first sentence below that."""
    text: str
    """All of it, Markdown."""


@cache
def guides() -> dict[str, Guide]:
    """All guides by name, in the order of their names."""
    found = sorted(files("raytune").joinpath("docs").iterdir(), key=lambda file: file.name)
    return {
        guide.name: guide
        for file in found
        if file.name.endswith(".md")
        for guide in [_guide(file.name.removesuffix(".md"), file.read_text(encoding="utf-8"))]
    }


def guides_text() -> str:
    """The list of guides for people."""
    width = max(map(len, guides()))
    lines = [f"  {guide.name:{width}}  {guide.title}: {guide.summary}" for guide in guides().values()]
    return "\n".join([*lines, "", "`raytune explain facts` shows one."])


def _guide(name: str, text: str) -> Guide:
    heading, _, rest = text.partition("\n")
    first = " ".join(rest.strip().partition("\n\n")[0].split())
    return Guide(name=name, title=heading.removeprefix("# "), summary=f"{first.partition('. ')[0].rstrip('.')}.", text=text)
