"""Pages as tests read them."""

import base64
import hashlib
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, the text of each kind of tag, and the rows of tables."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        self.text.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("meta", "link", "img", "source"):
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_needs_nothing_else(page: Page, *, has_script: bool) -> None:
    """Nothing is fetched, and nothing runs but a script of the page's own, if it has one."""
    policies = [tag["content"] or "" for tag in page.attributes("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert ("script-src" in rules) == has_script
    for kind in ("script", "style")[not has_script :]:
        assert len(page.text[kind]) == 1
        digest = base64.b64encode(hashlib.sha256(page.text[kind][0].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.tags:
        assert not any(attribute.startswith("on") or attribute == "style" for attribute in attributes), tag
        for attribute in ("src", "srcset", "href", "data", "action"):
            value = attributes.get(attribute)
            assert value is None or re.match(r"#|\./|data:(image/png;base64)?,", value), value
    assert not re.search(
        r"url\(|@import|fetch|XMLHttp|innerHTML|eval", page.text["style"][0] + "".join(page.text.get("script", []))
    )
