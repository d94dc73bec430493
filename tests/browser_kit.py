"""The console in a real Chromium, watched: errors, other hosts, what moves, what a screen reader would miss."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from api_kit import wait_until
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from worker_kit import Site

from app import keys
from app.main import create_app, make_server
from models.llm import FrozenLLM

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120_000  # milliseconds, for machines that have other work
_SHIFTS = """
window.shifted = 0;
window.moved = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (entry.hadRecentInput) continue;
    window.shifted += entry.value;
    window.moved.push(entry.sources.map((one) => one.node && (one.node.id || one.node.className || one.node.nodeName)));
  }
}).observe({type: "layout-shift", buffered: true});
"""


@contextmanager
def serve(site: Site, llm: FrozenLLM) -> Iterator[str]:
    """The real server of a deployment on a loopback port; its address."""
    app = create_app(site.settings, llm)
    server = make_server(app, site.settings)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), seconds=120)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


def new_key(site: Site, *scopes: str) -> str:
    with site.sessions.begin() as session:
        return keys.create_key(session, name="browser", scopes=scopes or keys.SCOPES, actor="test")[1]


@dataclass
class Watched:
    """A page, and everything about it that should not have happened."""

    page: Page
    address: str
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.add_init_script(_SHIFTS)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def open(self, path: str) -> None:
        self.page.goto(self.address + path)

    def log_in(self, key: str) -> None:
        self.open("/console/login")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url(self.address + "/")

    @property
    def shifted(self) -> float:
        """Cumulative layout shift that nobody's click or key has caused."""
        shifted: float = self.page.evaluate("window.shifted")
        return shifted

    @property
    def moved(self) -> list[list[str]]:
        """What has, by id or class."""
        moved: list[list[str]] = self.page.evaluate("window.moved")
        return moved

    def check(self, name: str, *, axe: bool = True) -> None:
        """What every page has to keep."""
        found = Axe().run(self.page).response["violations"] if axe else []
        self.errors += [
            f"{name}: {one['id']}: {[node['html'][:200] for node in one['nodes']]}"
            for one in found
            if one["impact"] in ("moderate", "serious", "critical")
        ]
        if self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            self.errors.append(f"{name}: wider than the window")

    def assert_clean(self) -> None:
        assert not self.errors, "\n".join(self.errors)
        assert self.hosts == {urlsplit(self.address).netloc}


def watched(browser: Browser, address: str, *, height: int = 800, **context: Any) -> Watched:
    """A fresh browser profile, 1200 wide. What moves below the window's edge nobody sees, and nor does the observer."""
    made = browser.new_context(viewport={"width": 1200, "height": height}, locale="en-GB", timezone_id="UTC", **context)
    return Watched(made.new_page(), address)
