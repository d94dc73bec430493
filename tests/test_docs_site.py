"""The site as it is built: no warning, no dead link or anchor, no page that nothing leads to, no other host's files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LOADED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
"""Of a <link>: what a browser asks for by itself."""


@dataclass
class Page(HTMLParser):
    """Ids, links, and files that a browser loads."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and LOADED & set(found.get("rel", "").split()):
            self.files.append(found["href"])
        if tag not in ("a", "link"):
            self.files += [found[name] for name in ("src", "href", "data", "poster") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d", str(out / "doctrees")]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {}
    for path in site.rglob("*.html"):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        found[path] = page
    assert len(found) > len(list(DOCS.rglob("*.md")))  # and search and index
    return found


def inner(page: Path, addresses: list[str]) -> Iterator[tuple[Path, str]]:
    """File and anchor of each address that is the site's own."""
    for address in addresses:
        parts = urlsplit(address)
        if not (parts.scheme or parts.netloc):
            yield (page.parent / unquote(parts.path)).resolve() if parts.path else page, unquote(parts.fragment)


def test_no_link_is_dead(pages: dict[Path, Page]) -> None:
    dead = [
        f"{path.name}: {target.name}#{name}"
        for path, page in pages.items()
        for target, name in inner(path, page.links + page.files)
        if not target.is_file() or (name and target in pages and name not in pages[target].ids)
    ]
    assert not dead


def test_every_page_is_in_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    """Sphinx warns of pages outside every table of contents; this is what a reader sees of it."""
    found = {target for target, _ in inner(site / "index.html", pages[site / "index.html"].links)}
    assert set(pages) - found <= {site / name for name in ("genindex.html", "search.html")}


def test_it_needs_no_other_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [address for address in page.files if re.match(r"(https?:)?//", address)], path.name
    styles = list(site.rglob("*.css"))
    assert styles
    for path in styles:
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path.name
