"""Whether links of the built site hold: MkDocs calls this once it is built.

MkDocs itself sees links of Markdown alone; these are those of the HTML, generated ones too.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError


class Page(HTMLParser):
    """What a page points to, and the anchors that it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str | None] = set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called of each tag."""
        of = dict(attrs)
        self.anchors |= {of.get("id"), of.get("name")}
        self.links += [link for link in (of.get("href"), of.get("src")) if link]


def on_post_build(config: Any) -> None:
    """Refuse a site of which a page points to nothing."""
    # The page of what is not found may be shown anywhere, so its links begin at the root.
    files = [f for f in Path(config.site_dir).rglob("*.html") if f.name != "404.html"]
    pages = {file.resolve(): Page(file) for file in files}
    for file, page in pages.items():
        for link in page.links:
            if not _holds(link, file, pages):
                raise PluginError(f"{file.relative_to(config.site_dir)} links to {link}: not there")


def _holds(link: str, file: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    target = target / "index.html" if target.is_dir() else target
    anchor = unquote(parts.fragment)
    return target.is_file() and (
        not anchor or target not in pages or anchor in pages[target].anchors
    )
