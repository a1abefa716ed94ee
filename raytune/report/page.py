"""What all pages share: one HTML file that needs neither network nor server, and its figures beside it as PNG files.

Nothing can be fetched, and nothing runs but a script of ours: everything is escaped, and the policy in the head of a page allows
its style sheet and its script, by hash, and images that are part of it.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from raytune.printable import printable
from raytune.storage import write_bytes

PAGE, FIGURES = "report.html", "figures"
STYLE = "page.css"


@dataclass(frozen=True, slots=True)
class PageFigure:
    """A figure as a page shows it; `light` and `dark` are URLs that hold the images."""

    title: str
    caption: str
    light: str
    dark: str
    width: int
    height: int


def page_figure(title: str, caption: str, light: bytes, dark: bytes) -> PageFigure:
    return PageFigure(title, caption, _data_url(light), _data_url(dark), *_png_size(light))


def page(template: str, *, script: str | None = None, **shown: Any) -> str:
    """A page as HTML.

    Args:
        template: file beside this one, with `page_head.html` in its head; gets `policy`, `style` and `script` besides what is
            shown.
        script: file beside this one.
    """
    style, code = _own(STYLE), _own(script) if script else ""
    rules = ["default-src 'none'", "img-src data:", f"style-src {_hash(style)}"]
    rules += [f"script-src {_hash(code)}"] * bool(code) + ["base-uri 'none'", "form-action 'none'"]
    return _template(template).render(policy="; ".join(rules), style=Markup(style), script=Markup(code), **shown)


def write_page(folder: str, html: str, figures: Mapping[str, bytes]) -> str:
    """Write a page and its figures into a folder, local or on an object store.

    Returns:
        The path of the page.
    """
    folder = folder.rstrip("/")
    for name, image in figures.items():
        write_bytes(f"{folder}/{FIGURES}/{name}.png", image)
    path = f"{folder}/{PAGE}"
    write_bytes(path, html.encode())
    return path


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _png_size(image: bytes) -> tuple[int, int]:
    """Width and height, which a PNG file names in its first chunk."""
    return int.from_bytes(image[16:20]), int.from_bytes(image[20:24])


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FunctionLoader(_own), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, finalize=_fit
    )
    return environment.get_template(name)


def _fit(value: object) -> object:
    """What stands in a template, before it is escaped: no text of a stranger turns the page's lines round."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _own(name: str) -> str:
    """A file that lies beside this one."""
    return files("raytune.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The word by which a policy allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
