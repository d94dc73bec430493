"""Which problems docs/problems.md calls answers of the API, held against what its handlers may come to raise."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import Program

from app.errors import LetheonError
from docs import generate_api

ROOT = Path(__file__).resolve().parent.parent
HANDLERS = ("app.routes", "app.console", "app.middleware", "app.problems", "app.http_limits")
CAUGHT = {"receipt-invalid": "app.console.receipt_check", "not-configured": "app.dry_run"}
"""Raised below this module alone, which catches it and says so in words of its own."""
UNHEARD = {"client-gone"}


def handler(module: str, function: str) -> bool:
    return module.startswith(HANDLERS) or (module, function) == ("app.main", "_model_error")


def below(base: type[LetheonError]) -> Iterator[type[LetheonError]]:
    yield base
    for kind in base.__subclasses__():
        yield from below(kind)


@pytest.fixture(scope="module")
def api() -> Program:
    return Program(ROOT, ("app", "models", "worker"), "app.main")


@pytest.fixture(scope="module")
def classes() -> dict[str, set[str]]:
    """The classes of each code."""
    found = defaultdict(set)
    assert generate_api.kinds()  # imports all of them
    for kind in below(LetheonError):
        found[kind.code].add(kind.__name__)
    return found


def test_every_answer_may_come_from_a_handler_and_nothing_else_does(api: Program, classes: dict[str, set[str]]) -> None:
    made = api.made(handler)
    for code in generate_api.kinds():
        may = bool(classes[code] & made)
        assert may == (code not in generate_api.INSIDE or code in CAUGHT or code in UNHEARD), code


def test_what_is_caught_comes_from_nowhere_else(api: Program, classes: dict[str, set[str]]) -> None:
    for code, module in CAUGHT.items():
        assert not classes[code] & api.made(handler, without=module)
        caught = [node.type for node in ast.walk(api.modules[module].tree) if isinstance(node, ast.ExceptHandler)]
        names = {name.id for kind in caught if kind for name in ast.walk(kind) if isinstance(name, ast.Name)}
        assert classes[code] <= names


def test_the_page_lists_each_kind_once_and_no_status_where_nobody_is_answered() -> None:
    answers, inside = generate_api.problems_page().split("## Not answers of the API")
    for code in generate_api.kinds():
        assert (f"## {code}\n" in answers) == (code not in generate_api.INSIDE)
        assert (f"| `{code}` | " in inside.split("## ")[0]) == (code in generate_api.INSIDE)
    assert generate_api.INSIDE.keys() <= generate_api.kinds().keys() >= generate_api.ANYWHERE.keys()
    assert "No operation of the API" not in answers


def test_calls_are_followed(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.py").write_text(
        "from p import b\nfrom p.b import Thing as T\n"
        "def go(x: 'b.Hinted'):\n    try:\n        b.make()\n    except b.Caught:\n        x.method()\n"
        "def idle():\n    T()\n"
    )
    (tmp_path / "p" / "b.py").write_text(
        "class Thing: pass\nclass Made: pass\nclass Caught: pass\nclass Hinted: pass\nclass Deep:\n"
        "    def __init__(self):\n        Made()\n"
        "class Other:\n    def method(self):\n        Deep()\ndef make():\n    return isinstance(1, Hinted)\n"
    )
    program = Program(tmp_path, ("p",), "p.a")
    assert program.made(lambda module, function: function == "go") == {"Deep", "Made"}
    assert program.made(lambda module, function: function == "idle") == {"Thing"}
    assert program.made(lambda module, function: True, without="p.b") == set()
