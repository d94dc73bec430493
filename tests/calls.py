"""What the source of a program may come to call, from some functions on: read, not run.

Names and ``module.name`` are followed by the imports. Of anything else that has a dot in front, ``x.name``, every
method of that name counts, so more is found than can happen, and hardly less.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_CALL = {"isinstance", "issubclass", "suppress", "problems"}
"""What is given to these is not made there."""


@dataclass(frozen=True, eq=False)
class Module:
    name: str
    tree: ast.Module

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        found: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {name.asname or name.name.split(".")[0]: (name.name, None) for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {name.asname or name.name: (node.module, name.name) for name in node.names}
        return found

    @cached_property
    def definitions(self) -> dict[str, Function | ast.ClassDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, (*FUNCTION, ast.ClassDef))}

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, FUNCTION)]

    @cached_property
    def methods(self) -> list[Function]:
        classes = (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))
        return [node for found in classes for node in found.body if isinstance(node, FUNCTION)]


class Program:
    """Modules of these packages that ``start`` imports, directly or not."""

    def __init__(self, root: Path, packages: Iterable[str], start: str) -> None:
        paths = [path for package in packages for path in (root / package).rglob("*.py")]
        dotted = (".".join(path.relative_to(root).with_suffix("").parts) for path in paths)
        names = dict(zip((name.removesuffix(".__init__") for name in dotted), paths, strict=True))
        self.modules: dict[str, Module] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name in names and name not in self.modules:
                self.modules[name] = module = Module(name, ast.parse(names[name].read_text(encoding="utf-8")))
                for source, inner in module.imports.values():
                    waiting += [source, f"{source}.{inner}"]

    def made(self, root: Callable[[str, str], bool], *, without: str = "") -> set[str]:
        """Names of the classes that functions for which ``root(module, function)`` holds may come to make."""
        modules = [module for name, module in self.modules.items() if name != without]
        methods = defaultdict(list)
        for module in modules:
            for method in module.methods:
                methods[method.name].append((module, method))
        waiting: list[tuple[Module, Function | ast.ClassDef]]
        waiting = [(module, f) for module in modules for f in module.functions if root(module.name, f.name)]
        seen: set[ast.AST] = set()
        while waiting:
            module, node = waiting.pop()
            if node in seen or module.name == without:
                continue
            seen.add(node)
            if isinstance(node, ast.ClassDef):
                waiting += [(module, f) for f in node.body if isinstance(f, FUNCTION) and f.name.startswith("__")]
                continue
            for used in _used(node):
                found = self._named(module, used)
                if found is not None:
                    waiting.append(found)
                elif isinstance(used, ast.Attribute) and not used.attr.startswith("__"):  # these come with their class
                    waiting += methods[used.attr]
        return {node.name for node in seen if isinstance(node, ast.ClassDef)}

    def _named(self, module: Module, used: ast.expr) -> tuple[Module, Function | ast.ClassDef] | None:
        if isinstance(used, ast.Attribute):
            place = self._resolve(module, used.value.id) if isinstance(used.value, ast.Name) else None
            if not isinstance(place, Module):
                return None
            module, name = place, used.attr
        else:
            assert isinstance(used, ast.Name)
            name = used.id
        found = self._resolve(module, name)
        return None if isinstance(found, Module) else found

    def _resolve(self, module: Module, name: str) -> Module | tuple[Module, Function | ast.ClassDef] | None:
        while name not in module.definitions:
            source, inner = module.imports.get(name, ("", None))
            whole = source if inner is None else f"{source}.{inner}"
            if whole in self.modules:
                return self.modules[whole]
            if inner is None or source not in self.modules or self.modules[source] is module:
                return None
            module, name = self.modules[source], inner
        return module, module.definitions[name]


def _used(function: Function) -> Iterator[ast.expr]:
    """Names and attributes in its body, without annotations and what is only compared with."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTION, ast.ExceptHandler)):
            waiting += node.body
        elif isinstance(node, ast.AnnAssign):
            waiting += [node.value] if node.value else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NO_CALL:
            continue
        else:
            if isinstance(node, ast.Name | ast.Attribute):
                yield node
            waiting += ast.iter_child_nodes(node)
