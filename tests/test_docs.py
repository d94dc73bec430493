"""What the documentation says, held against the code: settings, commands, links, and pages that are generated."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from app import cli, keystore
from app.settings import Settings
from app.tables import Base
from docs import generate
from docs.generate_api import anchor

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "client/README.md", "bench/adapters/README.md")),
]
HISTORY = {DOCS / "LOG.md", ROOT / "CHANGELOG.md"}
"""What was true when it was written."""
CONFIGURATION = [
    *(ROOT / name for name in ("docker-compose.yml", "docker-compose.gpu.yml", ".env.example")),
    *(path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".yml", ".py", ".cfg")),
]


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_generated_pages_are_those_of_the_code() -> None:
    assert not list(generate.stale()), "run `make docs`"


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_setting_is_described_and_stands_in_one_part_of_the_page() -> None:
    listed = [name for _, _, names in generate.sections() for name in names]
    assert sorted(listed) == sorted(Settings.model_fields)
    for name in Settings.model_fields:
        said = generate.description(name)
        assert said[0].isupper() or said[0] == "`", name
        assert said[-1] == "." and len(said) > 20, name


def test_who_reads_a_setting() -> None:
    """A setting that is said to be one process's alone is not named in the other's own code."""
    assert not generate.API & generate.WORKER
    assert set(Settings.model_fields) >= generate.API | generate.WORKER
    api = [*(ROOT / "app").glob("routes/*.py"), *(ROOT / "app").glob("console/*.py")]
    api += [ROOT / "app" / f"{name}.py" for name in ("main", "serving", "submission", "dry_run", "limits")]
    worker = [*(ROOT / "worker").glob("*.py")]
    for paths, others in ((api, generate.WORKER), (worker, generate.API)):
        read = {name for path in paths for name in re.findall(r"settings\.(\w+)", path.read_text(encoding="utf-8"))}
        assert not read & others


@named([path for path in [*PAGES, *CONFIGURATION] if path not in HISTORY])
def test_every_variable_that_is_named_exists(path: Path) -> None:
    known = {variable for name in Settings.model_fields for variable in re.findall(r"\w+", generate.variable(name))}
    known |= {name for name, _, _ in generate.OTHERS}
    found = set(re.findall(r"LETHEON_[A-Z][A-Z_]*[A-Z](?![A-Z_])", path.read_text(encoding="utf-8")))
    assert found <= known


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_every_table_is_on_the_page_on_what_is_kept() -> None:
    page = (DOCS / "explanation" / "what-is-kept.md").read_text(encoding="utf-8")
    kept = {*Base.metadata.tables, *keystore._METADATA.tables}
    assert len(kept) > 20
    assert not {name for name in kept if f"`{name}`" not in page}


# --- commands --------------------------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of every block of code, fenced or indented."""
    block: list[str] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and line.strip()):
            block.append(line)
            continue
        if block:
            yield block
        block = []


def typed(block: list[str]) -> Iterator[str]:
    """The command lines of a block: what follows a prompt, or all of it where there is none."""
    prompted = any(line.lstrip().startswith("$ ") for line in block)
    goes_on = False
    whole = ""
    for line in block:
        line = line.strip()
        if prompted and not (goes_on or line.startswith("$ ")):
            continue
        whole += line.removeprefix("$ ").removesuffix("\\")
        goes_on = line.endswith("\\")
        if not goes_on:
            yield whole
            whole = ""


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each ``letheon`` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    arguments: list[str] | None = None
    words = list(lexer)
    for place, word in enumerate([*words, ";"]):
        if set(word) <= set("();<>|&") and word:
            if arguments is not None:
                redirected = word[0] == ">" and arguments[-1:] in (["1"], ["2"])
                yield arguments[:-1] if redirected else arguments
            arguments = None
        elif arguments is not None:
            arguments.append(word)
        elif word == "letheon" and all(
            "=" in before or set(before) <= set("();<>|&") or before in ("export", "exec", "until", "api", "--")
            for before in words[max(0, place - 1) : place]
        ):
            arguments = []


def parse(arguments: list[str]) -> None:
    """Raises what the command line would end with; runs nothing."""
    command: Any = typer.main.get_command(cli.app)
    context = command.context_class(command, info_name="letheon")
    rest = list(arguments)
    while hasattr(command, "commands"):
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no such command: {name}"
        command = found
        if hasattr(command, "commands"):
            context = command.context_class(command, info_name=name, parent=context)
    command.make_context(name, rest, parent=context)


def test_commands_are_found_in_shell() -> None:
    line = "letheon model pull && X=1 letheon serve > log 2>&1 & export K=$(letheon keys create me) # letheon no"
    assert list(calls(line)) == [["model", "pull"], ["serve"], ["keys", "create", "me"]]
    assert list(calls("letheon receipt get req_1 2> log | wc")) == [["receipt", "get", "req_1"]]
    assert list(typed(["$ letheon a \\", "    b", "output", "$ c"])) == ["letheon a b", "c"]
    for wrong in (["nothing"], ["keys", "create", "me", "--nothing"], ["requests", "report"], ["serve", "--port", "x"]):
        with pytest.raises(Exception, match=r"\S"):
            parse(wrong)


@named([path for path in PAGES if path not in {*HISTORY, DOCS / "cli.md"}])  # which says what may be typed
def test_every_command_line_parses(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        for line in typed(block):
            if re.search(r"\bletheon\b", line):
                for arguments in calls(line):
                    if "…" in arguments[:1]:
                        continue
                    try:
                        parse(arguments)
                    except Exception as error:
                        raise AssertionError(f"{line}: {error}") from error


# --- links, as the repository shows them -----------------------------------------------------------------------------


def prose(text: str) -> str:
    """Without code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE):
        name = anchor(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title))
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@named(PAGES)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = prose(path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)$", text, re.MULTILINE):
        place, _, name = "".join(target).partition("#")
        if "://" in place or place.startswith("mailto:"):
            continue
        found = (path.parent / place).resolve() if place else path
        assert found.exists() and found.is_relative_to(ROOT), f"{place} is not there"
        assert not name or name in anchors(found), f"{place} has no heading #{name}"
