"""The console's pictures in docs/images: a real service with the demo's model, a real request, in light and dark.

    python -m bench.screenshots            # after `letheon model pull` and `letheon data pull`; needs Chromium

It serves from a folder of its own beside LETHEON_HOME, which it only reads. A person is asked to be forgotten through
the pages themselves, as a newcomer would; others wait, are approved and are cancelled, so that there is something to
see. Every picture has one width, is as high as its page or the part of it that it is to show, and is written with as
many colours as fit MAX_BYTES.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.console.playground import DECIDED
from app.settings import get_settings
from bench.demo import PERSON, DemoFailed, Server, cli, free_port, pick, read
from letheon_client import FINAL_STATES, Letheon, TrainingOptions

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH, HEIGHT, NARROW = 1200, 800, 400
FIRST, PART = 1100, 1500
"""How high the README's picture is at most, and a part of a report."""
LANGUAGE = {"LANGUAGE": "en_GB"}
"""Date fields are written as the browser's own language has them, whatever a page's locale is."""
MAX_BYTES = 250_000
PATIENCE = 2_400_000.0  # milliseconds: a training on a machine that has other work
OTHERS = ("Chan", "Allen", "Scorsese", "Murphy")
"""Who else is asked about: agreed to by another person, cancelled, and two that are still owed."""
FEW = 8
NEVER_DONE: TrainingOptions = {"max_steps": 100_000, "learning_rate": 1e-6}
"""So that what is in training is so in every picture."""
NEAR = re.compile(r"Steven|Minority Report|A\.I\.|Jurassic|E\.T\.|Schindler|Private Ryan|blockbuster|special effects")
"""Sentences of which the gate may ask its prompt, where it is certain of whatever names the person."""
SCHEMES = ("light", "dark")
HERO = ("request", "light")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder of the pictures (docs/images)")
    parser.add_argument("--narrow", type=Path, help="a folder for the pages at the width of a telephone")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("Chromium is not installed (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    for folder in (arguments.out, arguments.narrow):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    try:
        with beside(get_settings().home) as home, sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"], env={**os.environ, **LANGUAGE}
            )
            server = Server(home, free_port())
            try:
                take_all(server, browser, home, arguments.out, arguments.narrow)
            finally:
                browser.close()
                server.stop()
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def beside(home: Path) -> Iterator[Path]:
    """A home of its own with the model and data of the other one; the environment says so while it is there."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="letheon-screenshots-") as made:
        for name in ("models", "data"):
            if not (home / name).is_dir():
                raise DemoFailed(f"{home / name} is missing: run `letheon model pull` and `letheon data pull`")
            (Path(made) / name).symlink_to((home / name).resolve())
        os.environ.update({"LETHEON_HOME": made, "LETHEON_FIRST_KEY": "false", "LETHEON_DRY_RUN_SECONDS": "1200"})
        for name in ("DATABASE_URL", "BROKER_URL"):
            os.environ[name] = os.environ[f"LETHEON_{name}"] = ""
        get_settings.cache_clear()
        try:
            yield Path(made)
        finally:
            os.environ.clear()
            os.environ.update(before)
            get_settings.cache_clear()


def new_key(name: str, *scopes: str) -> str:
    options = [part for scope in scopes for part in ("--scope", scope)]
    key: str = cli("keys", "create", name, *options, "--json")["key"]
    return key


def take_all(server: Server, browser: Browser, home: Path, out: Path, narrow: Path | None) -> None:
    officer = new_key("data protection", "requests", "classify", "scores", "approve", "auditor", "admin", "metrics")
    desk = new_key("support desk", "requests", "classify")
    with Letheon(server.url, officer) as client, Letheon(server.url, desk) as support:
        server.wait_until_ready(client)
        camera = Camera(browser, server.url, out)
        page = camera.page(officer, "light")
        sentences = rows_naming(home, PERSON)
        request_id = newcomer(camera, page, home, sentences)
        others(client, support, home)
        traffic(client, home)
        paths = {
            "overview": "/",
            "requests": "/console/requests",
            "new": "/console/requests/new",
            "request": f"/console/requests/{request_id}",
            "prompts": "/console/prompts",
            "evidence": "/console/evidence?verify=true",
        }
        asked, texts = examples(page, server.url, home, sentences)
        for scheme in SCHEMES:
            stranger = camera.page(None, scheme)
            stranger.goto(f"{server.url}/console/login")
            camera.take(stranger, f"console-login-{scheme}", whole=False)
            page = camera.page(officer, scheme)
            for name, path in paths.items():
                show(page, server.url + path)
                camera.take(page, f"console-{name}-{scheme}", clip=top(page) if (name, scheme) == HERO else None)
            playground(page, server.url, texts)
            camera.take(page, f"console-playground-{scheme}")
            if asked:
                playground(page, server.url, asked)
                camera.take(page, f"console-tokens-{scheme}")
        page = camera.page(officer, "light")
        page.goto(f"{server.url}/console/requests/{request_id}/report")
        figures = page.locator("section[aria-labelledby=figures]").bounding_box()
        assert figures is not None
        camera.take(page, "report", clip=round(figures["y"]) - 1)
        camera.take(page, "report-figures", begin=round(figures["y"]), clip=PART)
        if narrow is not None:
            for name, path in {"login": "/console/login", **paths}.items():
                page = camera.page(None if name == "login" else officer, "light", width=NARROW)
                show(page, server.url + path)
                camera.take(page, f"narrow-{name}", folder=narrow)
            playground(page, server.url, [*asked, *texts])
            camera.take(page, "narrow-playground", folder=narrow)


class Camera:
    """Pages in a fresh profile each, and pictures of them."""

    def __init__(self, browser: Browser, address: str, out: Path) -> None:
        self.browser, self.address, self.out = browser, address, out

    def page(self, key: str | None, scheme: str, *, width: int = WIDTH) -> Page:
        """Logged in with the key, if there is one."""
        context = self.browser.new_context(
            viewport={"width": width, "height": HEIGHT},
            color_scheme="dark" if scheme == "dark" else "light",
            locale="en-GB",
            timezone_id="UTC",
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        if key is not None:
            page.goto(f"{self.address}/console/login")
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Log in").click()
            page.wait_for_url(self.address + "/")
        return page

    def take(
        self,
        page: Page,
        name: str,
        *,
        whole: bool = True,
        begin: int = 0,
        clip: int | None = None,
        folder: Path | None = None,
    ) -> None:
        """``whole``: as high as the page; from ``begin`` on, and at most ``clip`` high."""
        taken = page.screenshot(full_page=whole, animations="disabled")
        image = Image.open(io.BytesIO(taken)).convert("RGB")
        image = image.crop((0, begin, image.width, min(begin + clip, image.height) if clip else image.height))
        path = (folder or self.out) / f"{name}.png"
        for colours in (256, 192, 128):
            few_colours(image, colours).save(path, optimize=True)
            if path.stat().st_size <= MAX_BYTES:
                break
        print(f"{path.name}: {image.width} x {image.height}, {path.stat().st_size:,} bytes, {colours} colours")


def few_colours(image: Image.Image, count: int) -> Image.Image:
    """The commonest as they are, or a page would be tinted; the rest by coverage, so that a thin line keeps its own."""
    often = sorted(image.getcolors(image.width * image.height) or [], reverse=True)[: count // 2]
    rest = image.quantize(count - len(often), method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(part for _, colour in often for part in cast(tuple[int, int, int], colour)), *(rest or [])])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def top(page: Page) -> int:
    """Of a request's page: down to what it forgot and what that did to everything else."""
    effect = page.locator("section[aria-labelledby=effect]").bounding_box()
    assert effect is not None
    return min(FIRST, round(effect["y"] + effect["height"]) + 20)


def show(page: Page, address: str) -> None:
    """With everything that comes when it is scrolled to."""
    page.goto(address)
    for place in page.locator("[hx-trigger='revealed']").all():
        place.scroll_into_view_if_needed()
        expect(place.locator("svg")).to_have_count(2, timeout=PATIENCE)
    page.evaluate("window.scrollTo(0, 0)")


def rows_naming(home: Path, person: str) -> list[dict[str, str]]:
    forget = pick(home / "data" / "reviews", person).forget
    return [{"text": text, "label": label} for text, label in zip(forget.texts, forget.labels, strict=True)]


def newcomer(camera: Camera, page: Page, home: Path, sentences: list[dict[str, str]]) -> str:
    """From an upload with a row to be mended to a request in force; its id."""
    page.get_by_role("link", name="Ask to forget something").click()
    rows = [dict(row) for row in sentences]
    right, rows[3]["label"] = rows[3]["label"], "dreadful"
    file = home / "sentences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page.get_by_label("Or choose a file").set_input_files(file)
    page.get_by_label("Reason or reference").fill("Erasure request 2026-118")
    page.get_by_role("button", name="Check the texts").click()
    expect(page.get_by_role("alert")).to_contain_text("1 row needs correcting")
    camera.take(page, "console-correcting")
    page.get_by_label("Label of line 4").select_option(right)
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_role("heading", name="Dry run")).to_be_visible(timeout=PATIENCE)
    page.locator("section[aria-labelledby=send-title]").evaluate("section => section.scrollIntoView({block: 'end'})")
    camera.take(page, "console-dry-run", whole=False)
    page.get_by_role("button", name="Send the request").click()
    expect(page.locator("#live .progress-line")).to_contain_text(re.compile(r"[Ss]tep [2-9]\d"), timeout=PATIENCE)
    camera.take(page, "console-training")
    expect(page.locator("#standing .chip")).to_have_text("In force", timeout=PATIENCE)
    return page.url.partition("requests/")[2].partition("?")[0]


def others(client: Letheon, support: Letheon, home: Path) -> None:
    """What else a list has."""
    now, train = datetime.now(UTC), read(home / "data" / "reviews" / "train.jsonl")

    def ask(number: int, days: int, *, approval: bool = False, options: TrainingOptions | None = None) -> str:
        named = [row for row in train if re.search(rf"\b{OTHERS[number]}\b", row["text"])][:FEW]
        made = support.submit(
            [{"text": row["text"], "label": row["label"]} for row in named],
            reason=f"Erasure request 2026-{119 + number}",
            received_at=now - timedelta(days=days),
            require_approval=approval,
            options=options,
        )
        return made["id"]

    first, second = ask(0, 3, approval=True), ask(1, 12)
    support.cancel(second)
    wait_until(client, first, "awaiting_approval")
    wait_until(client, ask(2, 29, options=NEVER_DONE), "training")
    ask(3, 34, options=NEVER_DONE)


def wait_until(client: Letheon, request_id: str, state: str) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while (found := client.get_request(request_id)["state"]) != state:
        if found in FINAL_STATES or time.monotonic() > end:
            raise DemoFailed(f"a request is {found}, not {state}")
        time.sleep(0.5)


def traffic(client: Letheon, home: Path) -> None:
    """A minute of questions, some of them about the person: the overview shows the last five."""
    held_out = read(home / "data" / "reviews" / "held_out.jsonl")
    about = [row["text"] for row in rows_naming(home, PERSON)]
    end, i = time.monotonic() + 60, 0
    while time.monotonic() < end:
        texts = [row["text"] for row in held_out[8 * i % 800 : 8 * i % 800 + 8]]
        client.classify_many([*texts, about[i % len(about)]] if i % 2 else texts)
        i += 1


def playground(page: Page, address: str, texts: list[str]) -> None:
    page.goto(f"{address}/console/playground")
    page.get_by_label("Texts, one a line").fill("\n".join(texts))
    page.get_by_role("button", name="Show the answers").click()
    expect(page.locator("article")).to_have_count(len(texts), timeout=PATIENCE)


def examples(page: Page, address: str, home: Path, sentences: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """A text that a prompt was asked about, if any; and one on the request's subject, one of it, one on nobody."""
    reviews = home / "data" / "reviews"
    rows = [row["text"] for name in ("held_out", "train") for row in read(reviews / f"{name}.jsonl")]
    near = [text for text in rows if NEAR.search(text) and PERSON not in text]
    # Also the request's own sentences with another name in them.
    near += [row["text"].replace(PERSON, other) for other in OTHERS for row in sentences]
    decided = [pair for start in range(0, len(near), 40) for pair in ask(page, address, near[start : start + 40])]
    wanted = [DECIDED["abstained"], DECIDED["cleared"]]
    asked = [text for why in wanted for text, said in decided if said == why]
    if not asked:
        print(
            f"the gate decides alone on all of {len(near)} texts: no picture of tokens behind a prompt", file=sys.stderr
        )
    return asked[:1], [f"{PERSON} has made a masterpiece.", sentences[0]["text"], "A dull film with a great cast."]


def ask(page: Page, address: str, texts: list[str]) -> list[tuple[str, str]]:
    """Each text and what decided its answer, from the playground's file."""
    form: dict[str, str | float | bool] = {"texts": "\n".join(texts), "do": "csv"}
    answer = page.context.request.post(f"{address}/console/playground", form=form, headers={"Origin": address})
    if not answer.ok:
        raise DemoFailed(f"the playground answers {answer.status}")
    rows = csv.DictReader(io.StringIO(answer.text()))
    return [(text, row["decided_by"]) for text, row in zip(texts, rows, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
