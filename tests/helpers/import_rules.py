"""The rules of how files depend on each other, checked on their syntax trees. Nothing that is checked is imported.

Every rule takes a `Source` and returns one line for each place that breaks it. An import inside a function counts like
one at the top of a file: importing late hides a cycle, but does not remove it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FOLDERS = ("minivlm", "weights", "eval", "scripts")
# Each layer may import itself and those before it. `minivlm` alone is minivlm/__init__.py, which re-exports.
LAYERS = (
    "minivlm.errors",
    "minivlm.files",
    "minivlm.schema",
    "minivlm.tensor_files",
    "minivlm.transfer",
    "minivlm.model",
    "minivlm.inputs",
    "minivlm.cache",
    "minivlm.generation",
    "minivlm.app",
    "minivlm",
    "weights",
    "eval",
    "scripts",
)
CACHE, POLICIES = "minivlm.cache", "minivlm.cache.policies"
USES_TRANSFORMERS = "eval.speed.peer_transformers"
PROGRAM = "minivlm.inputs.template_sandbox"  # also a program, which is started without any path
SCRIPT_LINES = 35


@dataclass(frozen=True)
class Import:
    importer: str  # the module that imports
    imported: str  # a module of this repository, or the dotted name of another one
    place: str  # FILE:LINE
    relative: bool


@dataclass(frozen=True)
class Source:
    """The Python files below some folders of `root`."""

    root: Path
    folders: tuple[str, ...] = FOLDERS

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Module names, such as `minivlm.cache` and `scripts.generate`, and their files."""
        paths = sorted(path for folder in self.folders for path in (self.root / folder).rglob("*.py"))
        return {self._module_name(path): path for path in paths}

    def _module_name(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in self.modules.items()}

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of every module; one that takes several names from the same module is listed once."""
        imports = (each for module, tree in self.trees.items() for each in self._imports_of(module, tree))
        return list(dict.fromkeys(imports))

    def _imports_of(self, module: str, tree: ast.Module) -> Iterator[Import]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(module, self._resolve(alias.name), self.place(module, node), relative=False)
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    imported = self._resolve(f"{origin}.{alias.name}", origin)
                    yield Import(module, imported, self.place(module, node), relative=node.level > 0)
            elif isinstance(node, ast.Call) and _names(node.func) & {"import_module", "__import__"}:
                for name in (each.value for each in node.args[:1] if isinstance(each, ast.Constant)):
                    yield Import(module, self._resolve(str(name)), self.place(module, node), relative=False)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """What stands between `from` and `import`, as an absolute name."""
        if not node.level:
            return node.module or ""
        is_package = self.modules[module].name == "__init__.py"
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def _resolve(self, *names: str) -> str:
        """The first of `names` that is a module here, or else the last of them.

        A script sees its own folder without a prefix, so `demo_training` may be `scripts.demo_training`.
        """
        for name in names:
            if name in self.modules:
                return name
            if name.split(".")[0] not in sys.stdlib_module_names and f"scripts.{name}" in self.modules:
                return f"scripts.{name}"
        return names[-1]

    def place(self, module: str, node: ast.stmt | ast.expr) -> str:
        return f"{self.modules[module].relative_to(self.root).as_posix()}:{node.lineno}"


def layer(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "minivlm" else parts[0]


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _own_imports(source: Source) -> Iterator[Import]:
    return (each for each in source.imports if each.imported.split(".")[0] in source.folders)


def unknown_layers(source: Source) -> list[str]:
    """Files that no layer has."""
    return [f"{module} is in no layer of LAYERS" for module in source.modules if layer(module) not in LAYERS]


def wrong_directions(source: Source) -> list[str]:
    """Imports of a later layer."""
    rank = {name: index for index, name in enumerate(LAYERS)}
    return [
        f"{each.place}: {layer(each.importer)} may not import {each.imported}"
        for each in _own_imports(source)
        if rank.get(layer(each.imported), len(LAYERS)) > rank.get(layer(each.importer), -1)
    ]


def policies_known_to_the_cache(source: Source) -> list[str]:
    """Imports of policies in the rest of the cache, but for its `__init__.py`, which may re-export them."""
    return [
        f"{each.place}: only the policies' own folder may import {each.imported}"
        for each in source.imports
        if is_within(each.importer, CACHE)
        and not is_within(each.importer, POLICIES)
        and each.importer != CACHE
        and is_within(each.imported, POLICIES)
    ]


def import_cycles(source: Source) -> list[str]:
    """One cycle between files, if there is any."""
    graph: dict[str, set[str]] = {module: set() for module in source.modules}
    for each in _own_imports(source):
        graph[each.importer].add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["import cycle: " + " <- ".join(error.args[1])]
    return []


def relative_imports(source: Source) -> list[str]:
    return [f"{each.place}: relative import of {each.imported}" for each in source.imports if each.relative]


def transformers_imports(source: Source) -> list[str]:
    """Imports of transformers, which is an oracle for the tests and a peer to be measured, and nothing else."""
    return [
        f"{each.place}: {each.imported} may be imported only in {USES_TRANSFORMERS}"
        for each in source.imports
        if is_within(each.imported, "transformers") and each.importer != USES_TRANSFORMERS
    ]


def tricks(source: Source) -> list[str]:
    """Uses of TYPE_CHECKING, which hides a cycle, and of `sys.path`, which makes an import depend on who ran before."""
    lines = []
    for module, tree in source.trees.items():
        forbidden = {"TYPE_CHECKING"} if module == PROGRAM else {"TYPE_CHECKING", "sys.path"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute | ast.ImportFrom):
                names = _names(node) & forbidden
                lines += [f"{source.place(module, node)}: {name}" for name in names]
    return lines


def _names(node: ast.AST) -> set[str]:
    """The names that a node uses or imports: `x`, `module.x`, and for `from module import x` both."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        base = node.value.id if isinstance(node.value, ast.Name) else ""
        return {node.attr, f"{base}.{node.attr}"}
    if isinstance(node, ast.ImportFrom):
        return {name for alias in node.names for name in (alias.name, f"{node.module}.{alias.name}")}
    return set()


def long_scripts(source: Source) -> list[str]:
    """Files directly in scripts/ that do more than parse and call."""
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (source.root / "scripts").glob("*.py")
    }
    return [
        f"scripts/{path.name} has {length} lines (at most {SCRIPT_LINES})"
        for path, length in sorted(lengths.items())
        if length > SCRIPT_LINES
    ]


def tests_imported_by_tests(source: Source) -> list[str]:
    """Imports of one test file by another; what two of them need belongs in tests/helpers."""
    return [
        f"{each.place}: {each.imported} is a test, not a helper"
        for each in source.imports
        if any(part.startswith("test_") for part in each.imported.split("."))
    ]
