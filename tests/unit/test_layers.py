"""Who may import whom, read from the source. The rules are the docstrings of the tests below."""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("services", "shared", "cli", "sim", "bench")
MAX_MODULE_LINES = 450

DECISION_MODULES = (
    "shared.core",
    "services.gateway.choice",
    "services.gateway.live_request",
    "services.gateway.stop",
    "services.kvstore.index",
    "services.placer.topology",
    "services.predictor.distribution",
    "services.predictor.predictors",
    "services.scheduler.cluster",
    "services.scheduler.recovery",
    "services.scheduler.routing",
    "services.scheduler.table",
)
"""Modules, or packages with all that is in them, that decide and do no I/O."""

REGISTRIES = frozenset({"shared.messages.CODEC"})
"""Assigned in an ``__init__.py`` because they are a list of all that it re-exports."""

NO_IO = frozenset(
    {"asyncio", "concurrent", "ctypes", "datetime", "http", "io", "logging", "multiprocessing"}
    | {"nats", "os", "secrets", "selectors", "signal", "socket", "sqlite3", "ssl", "subprocess"}
    | {"tempfile", "threading", "time", "torch", "urllib", "uuid"}
)
NO_WIRE_CODE = frozenset({"cloudpickle", "dill", "marshal", "pickle", "shelve"})
MODEL_PACKAGES = frozenset({"numpy", "safetensors", "torch", "transformers"})
STDLIB = frozenset(sys.stdlib_module_names)


@dataclass(frozen=True)
class Module:
    """One source file and its dotted name."""

    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, filename=str(self.path))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def imports(self) -> tuple[tuple[int, str], ...]:
        """(line, dotted name) of every import, those inside functions and ``if`` included."""
        return tuple(self._imports())

    def _imports(self) -> Iterator[tuple[int, str]]:
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def modules_of(root: Path) -> list[Module]:
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path))
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports_breaking(modules: list[Module], forbids: Callable[[Module, str], bool]) -> list[str]:
    return [
        f"{module.name}:{line} imports {imported}"
        for module in modules
        for line, imported in module.imports
        if forbids(module, imported)
    ]


def service_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "services" and len(parts) > 1 else None


def services_importing_each_other(modules: list[Module]) -> list[str]:
    def forbids(module: Module, imported: str) -> bool:
        own, other = service_of(module.name), service_of(imported)
        return own is not None and other not in (None, own)

    return imports_breaking(modules, forbids)


def shared_importing_upwards(modules: list[Module]) -> list[str]:
    return imports_breaking(
        [module for module in modules if within(module.name, "shared")],
        lambda _, imported: within(imported, "services", "cli", "sim", "bench", "tests"),
    )


def services_importing_tools(modules: list[Module]) -> list[str]:
    return imports_breaking(
        [module for module in modules if within(module.name, "services")],
        lambda _, imported: within(imported, "cli", "sim", "bench", "tests"),
    )


def core_importing_more_than_itself(modules: list[Module]) -> list[str]:
    return imports_breaking(
        [module for module in modules if within(module.name, "shared.core")],
        lambda module, imported: (
            imported.split(".")[0] not in STDLIB
            and not within(imported, "shared.core", "shared.errors")
        ),
    )


def model_code_importing_more_than_it_may(modules: list[Module]) -> list[str]:
    ours = ("shared.core", "shared.errors", "shared.engine", "shared.kvcache")
    return imports_breaking(
        [module for module in modules if within(module.name, "shared.engine", "shared.kvcache")],
        lambda module, imported: (
            imported.split(".")[0] not in STDLIB | MODEL_PACKAGES
            and not within(imported, *ours)
            and not (within(module.name, "shared.engine.cuda") and within(imported, "triton"))
        ),
    )


def decision_modules_doing_io(modules: list[Module]) -> list[str]:
    deciding = [module for module in modules if within(module.name, *DECISION_MODULES)]
    found = imports_breaking(deciding, lambda _, imported: imported.split(".")[0] in NO_IO)
    for module in deciding:
        found += [
            f"{module.name}:{line} imports {imported}, unseeded"
            for line, imported in module.imports
            if within(imported, "random") and imported not in ("random", "random.Random")
        ]
        found += [
            f"{module.name}:{node.lineno} uses random.{node.attr}, unseeded"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "random"
            and node.attr != "Random"
        ]
    return found


def pickles(modules: list[Module]) -> list[str]:
    return imports_breaking(modules, lambda _, name: name.split(".")[0] in NO_WIRE_CODE)


def packages_doing_more_than_reexport(modules: list[Module]) -> list[str]:
    def is_allowed(module: Module, node: ast.stmt) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return True
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        return isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name)
            and (target.id == "__all__" or f"{module.name}.{target.id}" in REGISTRIES)
            for target in node.targets
        )

    return [
        f"{module.name}/__init__.py:{node.lineno} does more than re-export"
        for module in modules
        if module.is_package
        for node in module.tree.body
        if not is_allowed(module, node)
    ]


def rooms_too_large(modules: list[Module]) -> list[str]:
    lengths = {module.name: len(module.source.splitlines()) for module in modules}
    return [
        f"{name} has {length} lines"
        for name, length in lengths.items()
        if length > MAX_MODULE_LINES
    ]


Rule = Callable[[list[Module]], list[str]]

RULES: dict[str, Rule] = {
    "a service never imports another": services_importing_each_other,
    "shared never imports who uses it": shared_importing_upwards,
    "services never import the tools around them": services_importing_tools,
    "shared/core is standard library only": core_importing_more_than_itself,
    "shared/engine and shared/kvcache run alone": model_code_importing_more_than_it_may,
    "decision modules do no I/O": decision_modules_doing_io,
    "nothing is pickled": pickles,
    "__init__.py only re-exports": packages_doing_more_than_reexport,
    f"no module is longer than {MAX_MODULE_LINES} lines": rooms_too_large,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    modules = modules_of(ROOT)
    assert modules, "no source found"
    assert rule(modules) == []


def test_every_decision_module_exists() -> None:
    names = {module.name for module in modules_of(ROOT)}
    assert [name for name in DECISION_MODULES if name not in names] == []


BREACHES: list[tuple[Rule, str, str]] = [
    (services_importing_each_other, "services/a/x.py", "from services.b import y"),
    (services_importing_each_other, "services/a/x.py", "import services.b.y"),
    (services_importing_each_other, "services/a/x.py", "from services import b"),
    (services_importing_each_other, "services/a/x.py", "from ..b import y"),
    (services_importing_each_other, "services/a/__init__.py", "from ..b import y"),
    (shared_importing_upwards, "shared/bus/x.py", "def f():\n    import services.a"),
    (shared_importing_upwards, "shared/bus/x.py", "from cli.main import main"),
    (services_importing_tools, "services/a/x.py", "import bench"),
    (core_importing_more_than_itself, "shared/core/x.py", "import msgspec"),
    (core_importing_more_than_itself, "shared/core/x.py", "from shared import messages"),
    (core_importing_more_than_itself, "shared/core/p/x.py", "from ...bus import y"),
    (model_code_importing_more_than_it_may, "shared/engine/x.py", "import msgspec"),
    (model_code_importing_more_than_it_may, "shared/kvcache/x.py", "from shared.bus import y"),
    (decision_modules_doing_io, "shared/core/x.py", "import time"),
    (decision_modules_doing_io, "shared/core/x.py", "from os import path"),
    (decision_modules_doing_io, "shared/core/x.py", "import random\nx = random.random()"),
    (decision_modules_doing_io, "shared/core/x.py", "from random import shuffle"),
    (decision_modules_doing_io, "services/scheduler/routing.py", "import asyncio"),
    (pickles, "shared/transport/x.py", "import pickle"),
    (packages_doing_more_than_reexport, "shared/bus/__init__.py", "X = 1"),
    (packages_doing_more_than_reexport, "shared/bus/__init__.py", "def f():\n    pass"),
    (rooms_too_large, "shared/bus/x.py", "\n" * (MAX_MODULE_LINES + 1)),
]


@pytest.mark.parametrize(("rule", "path", "source"), BREACHES)
def test_a_breach_is_found(tmp_path: Path, rule: Rule, path: str, source: str) -> None:
    module = tmp_path / path
    module.parent.mkdir(parents=True)
    module.write_text(source)
    assert len(rule(modules_of(tmp_path))) == 1


ALLOWED: list[tuple[str, str]] = [
    ("services/a/x.py", "from services.a.y import z\nfrom .y import z\nimport shared.bus, nats"),
    ("services/a/main.py", "import time, asyncio, random\nrandom.random()"),
    ("shared/core/x.py", "import random\nfrom shared.errors import E\nr = random.Random(7)"),
    ("shared/core/p/x.py", "from random import Random\nfrom ..y import z\nimport math"),
    ("shared/engine/x.py", "import torch, threading\nfrom shared.kvcache.pool import P"),
    ("shared/bus/__init__.py", '"""Doc."""\nfrom shared.bus.x import X\n__all__ = ["X"]'),
    ("bench/x.py", "import services.a\nimport shared.core.x"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_is_allowed_passes_every_rule(tmp_path: Path, path: str, source: str) -> None:
    module = tmp_path / path
    module.parent.mkdir(parents=True)
    module.write_text(source)
    modules = modules_of(tmp_path)
    assert modules
    assert [breach for rule in RULES.values() for breach in rule(modules)] == []
