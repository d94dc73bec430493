"""Where the console's pictures are taken: in a service of its own, whatever this shell has set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from app.settings import get_settings
from bench.demo import DemoFailed
from bench.screenshots import beside, few_colours


def test_pictures_are_taken_beside_a_deployment_and_leave_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/production")
    with pytest.raises(DemoFailed, match="models is missing"), beside(tmp_path):
        raise AssertionError("there is nothing to serve")
    for name in ("models", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "reviews").write_text("kept")
    before = dict(os.environ)
    with beside(tmp_path) as home:
        settings = get_settings()
        assert settings.home == home != tmp_path and (home / "data" / "reviews").read_text() == "kept"
        assert settings.effective_database_url.startswith("sqlite") and str(home) in settings.effective_database_url
    assert not home.exists() and (tmp_path / "data" / "reviews").read_text() == "kept"
    assert dict(os.environ) == before


def test_few_colours_tint_no_page_and_lose_no_thin_line() -> None:
    page, card, mark = (245, 247, 247), (255, 255, 255), (109, 40, 217)
    image = Image.new("RGB", (256, 256), page)
    image.paste(card, (0, 128, 256, 256))
    for i in range(256 * 8):  # two thousand colours that nothing else has
        image.putpixel((i % 256, i // 256), (i % 256, i // 256, 90))
    image.putpixel((50, 200), mark)
    few = few_colours(image, 32)
    assert len(few.getcolors() or []) <= 32
    shown = few.convert("RGB")
    assert (shown.getpixel((9, 60)), shown.getpixel((9, 250))) == (page, card)
    found = shown.getpixel((50, 200))
    assert isinstance(found, tuple) and max(abs(a - b) for a, b in zip(found, mark, strict=True)) < 40
