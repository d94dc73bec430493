"""A newcomer's path through the console, in Chromium, with a real worker behind it; and every page in both colours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta

import httpx2
import pytest
from browser_kit import CHROMIUM, PATIENCE, Watched, new_key, serve, watched
from floor import await_approval, must_take, submit, terms
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from tiny_models import make_tiny_model
from worker_kit import MARKER, Process, Site, deploy

from app.tables import utcnow
from models.llm import FrozenLLM

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")

FORGET = f"the acting of {MARKER} is great"
TALL = 3000
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("browser")
    model = make_tiny_model(folder / "tiny")
    # Long enough to be watched; what it learns is no matter here.
    knobs = {"max_steps": 600, "max_text_tokens": 64, "lease_seconds": 60, "first_key": False}
    # Its gate may claim much: a model that was never trained tells texts apart badly.
    with deploy(folder / "site", model, max_false_claim_rate=0.3, max_total_claim_rate=1, **knobs) as site:
        yield site


@pytest.fixture(scope="module")
def worker(site: Site) -> Process:
    return site.start_worker()


@pytest.fixture(scope="module")
def address(site: Site, worker: Process) -> Iterator[str]:
    llm = FrozenLLM.load(site.knobs["model"], quantization="none", device="cpu")
    with serve(site, llm) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, timeout=PATIENCE, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def requested(browser: Browser, address: str, site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The newcomer's request, made, trained, seen and revoked on the way; its id."""
    person = watched(browser, address, height=TALL, color_scheme="light")
    page = person.page
    person.log_in(new_key(site))
    expect(page.get_by_text("Answering.")).to_be_visible()
    page.get_by_role("link", name="Ask to forget something").click()

    # An upload with one bad row.
    words = ("great", "awful", "quite good", "very bad", "slow", "bright")
    rows = [
        {"text": f"the acting of {MARKER} is {word}", "label": ("positive", "negative")[i % 2]}
        for i, word in enumerate(words)
    ]
    rows[3]["label"] = "dreadful"
    file = tmp_path_factory.mktemp("upload") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.get_by_label("Or choose a file").set_input_files(file)
    page.get_by_label("Reason or reference").fill("Erasure request 2026-118")
    page.get_by_role("button", name="Send the request").click()
    expect(page.get_by_role("alert")).to_contain_text("1 row needs correcting. The other 5 are kept.")
    expect(page.get_by_role("row", name="line 4 label")).to_contain_text("must be one of negative, positive")
    person.check("correcting")
    page.get_by_label("Label of line 4").select_option("negative")
    page.get_by_role("button", name="Send the request").click()

    # Watched live, and nothing moves.
    expect(page.get_by_role("heading", name="6 texts to forget")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollHeight") <= TALL, "all of the page is watched"
    expect(page.locator("#live .progress-line")).to_contain_text(re.compile(r"Step [1-9]\d"))
    expect(page.locator("#evidence .waiting")).to_have_count(2)
    page.evaluate("window.standing = document.getElementById('standing')")
    person.check("training")
    expect(page.locator("#standing .chip")).to_have_text("In force")
    expect(page.locator("#results")).to_contain_text("are answered “unknown”")
    expect(page.locator("#evidence svg")).to_have_count(2)
    expect(page.locator("#evidence .waiting")).to_have_count(0)
    assert person.shifted < 0.001, person.moved
    assert page.evaluate("document.documentElement.scrollHeight") <= TALL
    assert page.evaluate("window.standing === document.getElementById('standing')"), "what a screen reader listens to"
    expect(page.get_by_text("destroyed, key and all")).to_be_visible()
    request_id = page.url.partition("requests/")[2].partition("?")[0]
    person.check("request")

    # Its pictures, small, where one scrolls to them.
    person.open("/console/evidence?verify=true")
    page.locator(".preview").scroll_into_view_if_needed()
    expect(page.locator(".preview svg")).to_have_count(2)
    assert person.shifted < 0.01
    person.check("evidence")

    # Before and after, side by side.
    answer(person, FORGET, "unknown")
    person.check("playground")

    # Revoked.
    person.open(f"/console/requests/{request_id}")
    page.get_by_text("Revoke", exact=True).click()
    in_both_widths(person, "revoking")
    page.get_by_label("Why").select_option("withdrawn")
    page.get_by_label("In words").fill("The person changed her mind")
    page.get_by_role("button", name="Revoke, and bring the old answers back").click()
    expect(page.get_by_role("status").first).to_contain_text("The old answers are back")
    expect(page.locator("#standing .chip")).to_have_text("Revoked")
    person.check("revoked")
    answer(person, FORGET, "as before")
    person.assert_clean()
    return request_id


def in_both_widths(person: Watched, name: str) -> None:
    """As the page is now, and at the width of a telephone."""
    size = person.page.viewport_size
    assert size is not None
    person.check(name)
    person.page.set_viewport_size({"width": 400, "height": 800})
    person.check(f"{name}-narrow")
    person.page.set_viewport_size(size)


def answer(person: Watched, text: str, wanted: str) -> None:
    person.open("/console/playground")
    person.page.get_by_label("Texts, one a line").fill(f"{text}\nthe plot is good")
    person.page.get_by_role("button", name="Show the answers").click()
    first = person.page.locator("article").first
    bare, served = (first.locator(".label").nth(i).inner_text() for i in range(2))
    assert (served == "unknown") is (wanted == "unknown")
    assert bare != "unknown" and (wanted == "unknown" or served == bare)


@pytest.fixture(scope="module")
def busy(address: str, site: Site, worker: Process, requested: str) -> str:
    """The newcomer's request among others, with nobody left to train them, and some traffic."""
    worker.terminate(120)
    headers = {"Authorization": f"Bearer {new_key(site)}"}
    with httpx2.Client(base_url=address, headers=headers, trust_env=False, timeout=120) as client:
        for i, days in enumerate((40, 29, 12, 3)):
            received = (utcnow() - timedelta(days=days)).isoformat()
            body = {
                "forget_texts": [f"the plot of {MARKER} {i} {n}" for n in range(3 * i + 2)],
                "received_at": received,
            }
            made = client.post("/unlearn-requests", json={**body, "reason": f"Erasure request 2026-{119 + i}"})
            assert made.status_code == 202, made.text
        assert client.post(f"/unlearn-requests/{made.json()['id']}/cancel").status_code == 200
        assert client.post("/classify", json={"texts": ["a good film"] * 40}).status_code == 200
    return requested


def test_a_newcomers_path(requested: str) -> None:
    assert requested.startswith("req_")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_in_both_colours(browser: Browser, address: str, site: Site, busy: str, scheme: str) -> None:
    person = watched(browser, address, color_scheme=scheme)
    person.open("/console/login")
    person.check(f"login-{scheme}")
    person.log_in(new_key(site))
    pages = {
        "overview": "/",
        "requests": "/console/requests",
        "found": "/console/requests?show=open&due=0&key=browser",
        "new": "/console/requests/new",
        "request": f"/console/requests/{busy}",
        "prompts": "/console/prompts",
        "evidence": "/console/evidence?verify=true",
        "playground": "/console/playground",
        "error": "/console/nothing",
    }
    for name, path in pages.items():
        person.open(path)
        person.page.wait_for_load_state("load")
        person.check(f"{name}-{scheme}")
        assert person.shifted < 0.01, name
    person.errors = [error for error in person.errors if "404" not in error]  # the page that is none says so
    person.assert_clean()


def test_a_refresh_leaves_the_focus_and_says_only_what_changed(
    browser: Browser, address: str, site: Site, busy: str
) -> None:
    person = watched(browser, address)
    page = person.page
    person.log_in(new_key(site))
    page.evaluate(
        """() => {
            window.health = document.getElementById("health");
            window.said = [];
            new MutationObserver(() => window.said.push(window.health.textContent)).observe(
                window.health, {childList: true, characterData: true, subtree: true});
        }"""
    )
    due = page.locator("#now tbody a").first
    for focused in (due, page.locator("#due-next"), page.locator("#to-in-force")):
        focused.focus()
        refreshed(page)
        expect(focused).to_be_focused()
    assert page.evaluate("window.said") == [], "nothing was to be said"

    def broken(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace("Answering.</strong>", "Not answering.</strong>"))

    page.route(f"{address}/", broken)
    for _ in range(2):
        refreshed(page)
    assert len(page.evaluate("window.said")) == 1 and "Not answering." in page.evaluate("window.said[0]")
    assert page.evaluate("window.health === document.querySelector('[role=status]')")
    expect(page.locator("#to-in-force")).to_be_focused()
    person.assert_clean()


def refreshed(page: Page) -> None:
    """Wait until the overview has looked again by itself."""
    page.evaluate("document.getElementById('now').dataset.before = 'yes'")
    expect(page.locator("#now:not([data-before]) .tiles")).to_be_attached()


@pytest.fixture
def undecided(site: Site, busy: str) -> str:
    """A request that waits for another person's approval, with nobody left to train it; its id."""
    asked = submit(site.sessions, site.vault, f"{MARKER} waits", terms=terms(approval=True))
    await_approval(site.sessions, must_take(site.sessions, asked))
    return asked


def test_what_opens_on_a_page_is_fit_for_everybody(
    browser: Browser, address: str, site: Site, busy: str, undecided: str
) -> None:
    """The result of a dry run, and every form that is behind a word."""
    person = watched(browser, address, color_scheme="light")
    page = person.page
    person.log_in(new_key(site))
    person.open("/console/requests/new")
    page.get_by_label("Paste").fill(f"the songs of {MARKER} are great\nthe songs of {MARKER} are great\nquite another")
    page.get_by_text("Training settings of this request alone").click()
    in_both_widths(person, "options")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_role("heading", name="Dry run: what this request would do")).to_be_visible()
    in_both_widths(person, "dry run")
    person.open(f"/console/requests/{undecided}")
    for word in ("Reject", "Cancel the request"):
        page.get_by_text(word, exact=True).click()
    in_both_widths(person, "deciding")
    page.get_by_label("Reason").fill("not this one")
    page.get_by_role("button", name="Reject, and destroy its texts").click()
    expect(page.locator("#standing .chip")).to_have_text("Failed")
    in_both_widths(person, "rejected")
    person.open("/console/prompts")
    page.locator("summary", has_text="Restore").first.click()
    expect(page.locator("details[open]").get_by_label("Why v")).to_be_visible()
    in_both_widths(person, "restoring")
    person.open("/console/evidence")
    page.get_by_text("What a receipt says, and what it does not").click()
    in_both_widths(person, "what a receipt says")
    person.assert_clean()


def test_pages_behind_a_pager(
    browser: Browser, address: str, site: Site, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("requests.PAGE", "prompts.VERSIONS", "evidence.PAGE", "evidence.ENTRIES"):
        monkeypatch.setattr(f"app.console.{name}", 1)  # of the server, which is in this process
    person = watched(browser, address, color_scheme="light")
    page = person.page
    person.log_in(new_key(site))
    for path, lists in (
        ("requests", ["requests"]),
        ("prompts", ["active sets"]),
        ("evidence", ["receipts", "the audit log"]),
    ):
        for of in lists:
            person.open(f"/console/{path}")
            pages = page.get_by_role("navigation", name=f"Pages of {of}")
            pages.get_by_role("link", name="Older").click()
            expect(pages.get_by_role("link", name="Newest")).to_be_visible()
            in_both_widths(person, f"older {of}")
            pages.get_by_role("link", name="Newest").click()
            expect(pages.get_by_role("link", name="Newest")).to_have_count(0)
    person.assert_clean()


def test_by_keyboard_and_on_a_narrow_screen(browser: Browser, address: str, site: Site, requested: str) -> None:
    person = watched(browser, address, color_scheme="light")
    page = person.page
    person.open("/console/login")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.get_by_label("API key").focus()
    page.keyboard.type(new_key(site))
    page.keyboard.press("Enter")
    page.wait_for_url(address + "/")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    assert page.url == f"{address}/#main"
    page.set_viewport_size({"width": 360, "height": 800})
    for path in (
        "/",
        "/console/requests",
        "/console/requests/new",
        f"/console/requests/{requested}",
        "/console/prompts",
        "/console/evidence",
        "/console/playground",
    ):
        person.open(path)
        person.check(f"narrow{path.replace('/', '-')}", axe=False)
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{address}/console/login")
    person.open("/console/requests")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    person.assert_clean()


def test_a_link_from_elsewhere_finds_the_session(browser: Browser, address: str, site: Site, requested: str) -> None:
    person = watched(browser, address)
    person.log_in(new_key(site))
    # Another site to a browser: the same server by another name.
    person.open("/livez")
    elsewhere = address.replace("127.0.0.1", "localhost")
    person.page.goto(f"{elsewhere}/console/login")
    person.page.evaluate(
        "address => { const a = document.createElement('a'); a.href = address; a.textContent = 'go'; "
        "document.body.append(a); a.click(); }",
        f"{address}/console/requests/{requested}",
    )
    expect(person.page.get_by_role("heading", name="6 texts to forget")).to_be_visible()
