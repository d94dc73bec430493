from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.row_cache import CacheFolder, RowCache

WIDTH = 3


class Computed:
    """What a text's vector is, and which texts it was asked for."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return torch.tensor([[len(t), ord(t[0]), 0.1] for t in texts])


def _cache(texts: list[str], file: Path | None, key: bytes = b"key") -> RowCache:
    if file is None:
        return RowCache(texts, WIDTH, None, "none")
    return RowCache(texts, WIDTH, CacheFolder(file.parent, key), file.stem)


def _filled(texts: list[str], file: Path | None) -> RowCache:
    cache = _cache(texts, file)
    cache.rows(range(len(texts)), Computed())
    cache.save()
    return cache


def _asked(texts: list[str], file: Path | None) -> list[str]:
    """The texts that a new cache on ``file`` does not know; all its vectors must be right."""
    computed = Computed()
    found = _cache(texts, file).rows(range(len(texts)), computed)
    assert torch.equal(found, Computed()(texts))
    return computed.texts


def test_only_what_is_missing_is_computed_and_each_text_once() -> None:
    texts, computed = ["a", "bb", "a", "ccc"], Computed()
    cache = _cache(texts, None)
    assert cache.rows([], computed).shape == (0, WIDTH)
    found = cache.rows([2, 1, 0], computed)
    assert computed.texts == ["a", "bb"], "equal texts share a place"
    assert torch.equal(found, Computed()(["a", "bb", "a"]))
    assert torch.equal(cache.rows([3, 0], computed), Computed()(["ccc", "a"]))
    assert computed.texts == ["a", "bb", "ccc"]


def test_what_is_given_out_is_a_copy() -> None:
    cache = _filled(["a", "bb"], None)
    cache.rows([0, 1], Computed()).zero_()
    assert torch.equal(cache.rows([0, 1], Computed()), Computed()(["a", "bb"]))


@given(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=12), st.data())
def test_any_order_of_asking_gives_the_texts_own_vectors(texts: list[str], data: st.DataObject) -> None:
    texts = [t for t in texts if t.isprintable()] or ["a"]
    cache, computed = _cache(texts, None), Computed()
    for _ in range(3):
        indices = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=6))
        if indices:
            assert torch.equal(cache.rows(indices, computed), Computed()([texts[i] for i in indices]))
    assert len(computed.texts) == len(set(computed.texts))


def test_a_file_serves_a_set_in_another_order_and_with_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["a", "bb", "ccc"], file)
    assert _asked(["ccc", "new", "a"], file) == ["new"]


def test_a_row_that_is_gone_is_gone_from_the_file_with_the_next_save(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["a", "bb", "ccc"], file)
    _cache(["a", "ccc"], file).save()  # nothing was computed, and yet there is something to save
    assert np.load(file)["names"].shape == (2, 16)
    assert _asked(["a", "bb", "ccc"], file) == ["bb"]


def test_without_news_the_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["a", "bb"], file)
    before = file.stat()
    _filled(["bb", "a"], file)
    assert file.stat().st_ino == before.st_ino


def test_what_was_not_computed_is_not_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    cache = _cache(["a", "bb", "ccc"], file)
    cache.rows([1], Computed())
    cache.save()
    assert _asked(["a", "bb", "ccc"], file) == ["a", "ccc"]


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "gate-m.npz"
    old = os.umask(0)
    try:
        _filled(["a"], file)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [f.name for f in file.parent.iterdir()] == ["gate-m.npz"]


def test_no_text_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["MARKER-of-a-person"], file)
    assert b"MARKER" not in file.read_bytes()


def test_nobody_without_the_key_can_try_a_text(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    texts = ["MARKER-of-a-person", "a"]
    _filled(texts, file)
    data = file.read_bytes()
    for text in texts:
        guesses = (digest(text.encode()).digest() for digest in (hashlib.sha256, hashlib.sha1, hashlib.md5))
        assert not any(guess[:8] in data for guess in guesses)
        assert hmac.digest(b"another", text.encode(), "sha256")[:8] not in data
        assert hmac.digest(b"key", text.encode(), "sha256")[:16] in data, "and with it, it is found"
    assert "key" not in repr(CacheFolder(tmp_path, b"key"))


def test_names_of_another_key_leave_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["a", "bb"], file)
    other = _cache(["a", "bb"], file, key=b"another")
    computed = Computed()
    other.rows([0], computed)
    assert computed.texts == ["a"], "what it does not know it computes"
    other.save()
    with np.load(file) as stored:
        assert [name.tobytes() for name in stored["names"]] == [hmac.digest(b"another", b"a", "sha256")[:16]]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"not an archive",
        b"\x80\x04N.",  # a pickle
        "half",
        {"names": np.zeros((2, 16), np.uint8)},
        {"names": np.zeros((2, 8), np.uint8), "vectors": np.zeros((2, WIDTH), np.float32)},
        {"names": np.zeros((3, 16), np.uint8), "vectors": np.zeros((2, WIDTH), np.float32)},
        {"names": np.zeros((2, 16), np.uint8), "vectors": np.zeros((2, WIDTH + 1), np.float32)},
        {"names": np.zeros((2, 16), np.uint8), "vectors": np.float32(1)},
        np.zeros((2, WIDTH), np.float32),
    ],
    ids=["empty", "text", "pickle", "half", "no-vectors", "short-keys", "rows", "width", "scalar", "npy"],
)
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, damage: bytes | str | dict[str, np.ndarray] | np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["a", "bb"], file)
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif isinstance(damage, dict):
        np.savez(file, allow_pickle=False, **damage)
    elif isinstance(damage, str):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        with file.open("wb") as handle:
            np.save(handle, damage)
    with caplog.at_level(logging.WARNING, "letheon.models"):
        assert _asked(["a", "bb"], file) == ["a", "bb"]
    assert "gate-m.npz is damaged" in caplog.text
    _filled(["a", "bb"], file)
    assert _asked(["a", "bb"], file) == []


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 1 << 20), value=st.integers(0, 255))
def test_a_flipped_byte_neither_stops_the_reader_nor_changes_a_vector(
    tmp_path: Path, position: int, value: int
) -> None:
    file = tmp_path / "gate-m.npz"
    file.unlink(missing_ok=True)
    _filled(["a", "bb"], file)
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(data)
    _asked(["a", "bb"], file)


def test_a_compression_that_nobody_knows_is_damage_too(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    _filled(["a"], file)
    data = bytearray(file.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 10] = 99  # zipfile: NotImplementedError
    file.write_bytes(data)
    assert _asked(["a"], file) == ["a"]


def test_without_its_folder_a_cache_is_kept_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in-the-way").write_text("a file")
    file = tmp_path / "in-the-way" / "gate-m.npz"
    with caplog.at_level(logging.WARNING, "letheon.models"):
        cache = _filled(["a", "bb"], file)
    assert "gate-m.npz is not kept" in caplog.text
    computed = Computed()
    assert torch.equal(cache.rows([1, 0], computed), Computed()(["bb", "a"]))
    assert computed.texts == []


def test_a_folder_that_goes_away_costs_the_file_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    cache = _cache(["a"], folder / "gate-m.npz")
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "letheon.models"):
        cache.rows([0], Computed())
        cache.save()
    assert "gate-m.npz is not kept" in caplog.text
    assert torch.equal(cache.rows([0], Computed()), Computed()(["a"]))


def test_of_two_writers_the_last_ones_file_stays_whole(tmp_path: Path) -> None:
    file = tmp_path / "gate-m.npz"
    one, two = (_cache(["a", "bb", "ccc"], file) for _ in range(2))
    one.rows([0, 1], Computed())
    two.rows([2], Computed())
    one.save()
    two.save()
    assert _asked(["a", "bb", "ccc"], file) == ["a", "bb"]


def test_two_kinds_in_a_folder_let_each_other_live_and_other_models_files_go(tmp_path: Path) -> None:
    gate, teacher = tmp_path / "gate-m.npz", tmp_path / "teacher-m.npz"
    _filled(["a"], tmp_path / "gate-other.npz")
    stale, fresh = tmp_path / "gate-1.partial", tmp_path / "gate-2.partial"
    for partial in (stale, fresh):
        partial.write_bytes(b"of a writer that died, or of one at work")
    long_ago = time.time() - 2 * 3600
    os.utime(stale, (long_ago, long_ago))
    _filled(["a"], gate)
    _filled(["bb"], teacher)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gate-2.partial", "gate-m.npz", "teacher-m.npz"]
    assert _asked(["a"], gate) == []
    assert _asked(["bb"], teacher) == []
