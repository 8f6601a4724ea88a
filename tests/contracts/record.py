"""Record the signatures that we depend on from a released wheel into signatures.json.

    python -m tests.contracts.record vllm 0.33.0      # pip downloads the wheel (330 MB), which is then removed
    python -m tests.contracts.record megatron-core    # all its recorded versions again
    python -m tests.contracts.record vllm --prune     # without a download: drop what our code no longer uses

To support another version of a package: run the first line, run `pytest tests/contracts`, fix what no longer binds, and
move the range in pyproject.toml. When our code begins to use something that was not recorded, the test names it and the
second line adds it. `--remove` forgets a version that is no longer supported.

The sources in the wheel are parsed, never imported. A name's entry is one text, or a text per group of versions:

    "(config, hidden_size, eps=)"       what a function, a method without `self`, or a constructor takes
    "attribute", "module"               exists, and is not called
    "outside: torch.nn.Module"          not in the package, but it may be inherited from there
    "a subclass of enum.Enum"           exists, and its constructor is inherited from there
    "absent"
    "(_, _, config=_) (_, **_)"         for `MODULE -> CALLEE`: how the package itself calls something, in every place
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.contracts.ours import call_shape, callbacks, needed_names, wanted_names
from tests.contracts.tables import PACKAGES

SIGNATURES = Path(__file__).with_name("signatures.json")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "any")
WRAPPERS = ("build_module", "apply_module", "not_none")  # Megatron's: they call, or return, their first argument
NOT_A_BASE = ("object", "abc.ABC", "typing.Generic", "typing.Protocol")
FIELDS_ARE_PARAMETERS = ("msgspec.Struct", "pydantic.BaseModel")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Table = dict[str, dict[str, dict[str, str]]]


@dataclass(frozen=True)
class Found:
    """A definition, and the module whose names it uses."""

    module: str
    node: ast.AST | None
    """None: the module itself."""


@dataclass(frozen=True)
class Outside:
    """Imported from another package."""

    path: str


class Sources:
    """The Python modules of a wheel, by dotted name."""

    def __init__(self, wheel: Path) -> None:
        self._archive = zipfile.ZipFile(wheel)
        self._files: dict[str, str] = {}
        self._followed: set[tuple[str, str]] = set()
        for file in self._archive.namelist():
            if file.endswith(".py"):
                self._files[file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = file

    @cache  # noqa: B019 -- one object, as long as the process
    def tree(self, module: str) -> ast.Module:
        return ast.parse(self._archive.read(self._files[module]))

    def resolve(self, path: str) -> Found | Outside | None:
        """The definition of a dotted name, through re-exports; None when there is none."""
        parts = path.split(".")
        outermost = next((n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in self._files), None)
        if outermost is None:
            return Outside(path) if not any(file.startswith(f"{parts[0]}.") for file in self._files) else None
        found: Found | Outside | None = Found(".".join(parts[:outermost]), None)
        for name in parts[outermost:]:
            if not isinstance(found, Found):
                return Outside(f"{found.path}.{name}") if found else None
            found = self._member(found, name)
        return found

    def entry(self, path: str) -> str:
        """The text that is recorded for a name."""
        found = self.resolve(path)
        if found is None:
            return "absent"
        if isinstance(found, Outside):
            return f"outside: {found.path}"
        if found.node is None:
            return "module"
        if isinstance(found.node, ast.ClassDef):
            return self._constructor(found)
        if not isinstance(found.node, Function) or _decorators(found.node) & {"property", "cached_property"}:
            return "attribute"
        parent = self.resolve(path.rpartition(".")[0])
        is_method = isinstance(parent, Found) and isinstance(parent.node, ast.ClassDef)
        return _signature(found.node, drop_first=is_method and "staticmethod" not in _decorators(found.node))

    def calls(self, scope: str, callees: tuple[str, ...]) -> str:
        """How the code of a module or class calls one of the expressions."""
        found = self.resolve(scope)
        if not isinstance(found, Found):
            return "absent"
        calls = [n for n in ast.walk(found.node or self.tree(found.module)) if isinstance(n, ast.Call)]
        shapes = {call_shape(*called) for call in calls if (called := _without_wrapper(call, callees))}
        return " ".join(sorted(shapes)) or "absent"

    # Where a name comes from.

    def _member(self, parent: Found, name: str) -> Found | Outside | None:
        if parent.node is None:
            return self._global(parent.module, name)
        if isinstance(parent.node, ast.ClassDef):
            return self._inherited(parent, name)
        return None

    def _global(self, module: str, name: str) -> Found | Outside | None:
        """Definitions come before imports, and those before assignments: the latter are often placeholders."""
        statements = list(_statements(self.tree(module).body))
        for node in reversed(statements):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Found(module, node)
        if found := self._through_imports(module, statements, name):
            return found
        for node in statements:
            if name in _assigned(node):
                value = getattr(node, "value", None)
                known = isinstance(value, ast.Name) and value.id != name
                return (known and self._global(module, value.id)) or Found(module, node)
        return Found(f"{module}.{name}", None) if f"{module}.{name}" in self._files else None

    def _through_imports(self, module: str, statements: list[ast.stmt], name: str) -> Found | Outside | None:
        """None also where packages import each other in a circle."""
        if (module, name) in self._followed:
            return None
        self._followed.add((module, name))
        targets = [target for node in statements for target in self._imported(module, node, name)]
        found = next(filter(None, map(self.resolve, targets)), None)
        self._followed.remove((module, name))
        return found

    def _imported(self, module: str, node: ast.stmt, name: str) -> Iterator[str]:
        """The dotted names that an import statement may bind `name` to."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    yield alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            is_package = self._files[module].endswith("__init__.py")
            package = module.split(".")[: None if is_package else -1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    yield f"{source}.{alias.name}"
                elif alias.name == "*" and source in self._files and source != module:
                    yield f"{source}.{name}"

    def _bases(self, owner: Found) -> list[Found | Outside]:
        assert isinstance(owner.node, ast.ClassDef)
        bases = []
        for expression in owner.node.bases:
            while isinstance(expression, ast.Subscript):
                expression = expression.value
            first, *rest = ast.unparse(expression).split(".")
            base: Found | Outside | None = self._global(owner.module, first) or Outside(first)
            for name in rest:
                base = self._member(base, name) if isinstance(base, Found) else Outside(f"{base.path}.{name}")
                base = base or Outside(ast.unparse(expression))
            bases.append(base)
        return [base for base in bases if not (isinstance(base, Outside) and base.path in NOT_A_BASE)]

    def _inherited(self, owner: Found, name: str) -> Found | Outside | None:
        assert isinstance(owner.node, ast.ClassDef)
        own = [node for node in _statements(owner.node.body) if isinstance(node, Function)]
        for node in reversed(own):
            if node.name == name and not _decorators(node) & {"overload", "setter"}:
                return Found(owner.module, node)
        bodies = [*_statements(owner.node.body), *(inner for method in own for inner in ast.walk(method))]
        for node in bodies:
            if name in _assigned(node) or f"self.{name}" in _assigned(node):
                return Found(owner.module, node)
        outside = None
        for base in self._bases(owner):
            found = self._inherited(base, name) if isinstance(base, Found) and base.node else base
            if isinstance(found, Found):
                return found
            outside = outside or found
        return outside

    # What a class is called with.

    def _constructor(self, owner: Found) -> str:
        for name in ("__init__", "__new__"):
            found = self._inherited(owner, name)
            if isinstance(found, Found) and isinstance(found.node, Function) and not self._has_fields(owner, found):
                return _signature(found.node, drop_first=True)
        fields = self._fields(owner)
        if fields is None:
            outside = self._inherited(owner, "__init__")
            return f"a subclass of {outside.path}" if isinstance(outside, Outside) else "()"
        ordered = [name for name, (_, keyword) in fields.items() if not keyword]
        by_keyword = [name for name, (_, keyword) in fields.items() if keyword]
        parts = [f"{name}{'' if fields[name][0] else '='}" for name in ordered]
        parts += ["*"] * bool(by_keyword)
        parts += [f"{name}{'' if fields[name][0] else '='}" for name in by_keyword]
        return f"({', '.join(parts)})"

    def _has_fields(self, owner: Found, constructor: Found) -> bool:
        """Whether a dataclass decorator replaces the inherited constructor."""
        assert isinstance(owner.node, ast.ClassDef)
        is_own = constructor.node in ast.walk(owner.node)
        return not is_own and _dataclass(owner.node) is not None

    def _fields(self, owner: Found) -> dict[str, tuple[bool, bool]] | None:
        """Field -> (is required, is for keywords only), in the order of the constructor; None for other classes."""
        assert isinstance(owner.node, ast.ClassDef)
        decorator, bases = _dataclass(owner.node), self._bases(owner)
        inherited = [self._fields(base) for base in bases if isinstance(base, Found) and base.node]
        is_struct = any(isinstance(base, Outside) and base.path in FIELDS_ARE_PARAMETERS for base in bases)
        if decorator is None and not is_struct and not any(inherited):
            return None
        fields = {name: field for each in reversed(inherited) for name, field in (each or {}).items()}
        keyword = _keyword(decorator, "kw_only") or _keyword(owner.node, "kw_only")
        if decorator is None and not is_struct and not any(self._is_struct(base) for base in bases):
            return fields  # an undecorated subclass of a dataclass adds no field
        for node in owner.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if "ClassVar" in ast.unparse(node.annotation) or _keyword(node.value, "init") is False:
                    continue
                if ast.unparse(node.annotation) in ("KW_ONLY", "dataclasses.KW_ONLY"):
                    keyword = True
                    continue
                fields[node.target.id] = (not _has_default(node.value), bool(keyword))
        return fields

    def _is_struct(self, base: Found | Outside) -> bool:
        if isinstance(base, Outside):
            return base.path in FIELDS_ARE_PARAMETERS
        return isinstance(base.node, ast.ClassDef) and any(self._is_struct(b) for b in self._bases(base))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Also those under if, try and with."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _assigned(node: ast.AST) -> set[str]:
    """The names and `self.` attributes that a statement gives a value, or an annotation."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return set()
    each = [leaf for target in targets for leaf in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {ast.unparse(leaf) for leaf in each if isinstance(leaf, ast.Name | ast.Attribute)}


def _decorators(node: Function | ast.ClassDef) -> set[str]:
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in called}


def _dataclass(node: ast.ClassDef) -> ast.expr | None:
    """Its decorator; vLLM's own is called `config`."""
    for decorator in node.decorator_list:
        name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator).rpartition(".")[2]
        if name in ("dataclass", "config"):
            return decorator
    return None


def _keyword(node: ast.AST | None, name: str) -> object:
    """The constant that a call, or the head of a class, gives a keyword."""
    for keyword in getattr(node, "keywords", []):
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in ("field", "Field"):
        return bool(value.args) or any(k.arg in ("default", "default_factory") for k in value.keywords)
    return value is not None


def _signature(node: Function, *, drop_first: bool) -> str:
    """As in the source, without annotations and with nothing for every default."""
    arguments = node.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    first_default = len(positional) - len(arguments.defaults)
    parts = [name if i < first_default else f"{name}=" for i, name in enumerate(positional)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    parts = parts[drop_first:]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(argument.arg if default is None else f"{argument.arg}=")
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(parts)})"


def _without_wrapper(call: ast.Call, callees: tuple[str, ...]) -> tuple[list[ast.expr], list[ast.keyword]] | None:
    """The arguments of `f(...)`, `build_module(f, ...)` or `apply_module(f)(...)`, where f is one of the callees."""
    function, arguments = call.func, call.args
    if isinstance(function, ast.Call) and ast.unparse(function.func) in WRAPPERS:
        (function,) = function.args
    elif ast.unparse(function) == "build_module":
        function, arguments = call.args[0], call.args[1:]
    return (arguments, call.keywords) if ast.unparse(function) in callees else None


# ---- The file --------------------------------------------------------------------------------------------------------


def read_signatures() -> Table:
    """{package: {version: {name: text}}}"""
    stored = json.loads(SIGNATURES.read_text())
    return {
        package: {
            version: {name: of_version(entry, version) for name, entry in about["names"].items()}
            for version in about["versions"].split()
        }
        for package, about in stored.items()
    }


def of_version(entry: str | dict[str, str], version: str) -> str:
    """The text that an entry of the file has for a version."""
    if isinstance(entry, str):
        return entry
    return next((text for text, versions in entry.items() if version in versions.split()), "not recorded")


def write_signatures(table: Table) -> None:
    """A text where all versions agree, otherwise the versions of each text."""
    stored: dict[str, dict[str, object]] = {}
    for package, versions in sorted(table.items()):
        ordered = sorted(versions, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
        names: dict[str, object] = {}
        for name in sorted({name for entries in versions.values() for name in entries}):
            texts: dict[str, list[str]] = {}
            for version in ordered:
                if name in versions[version] and versions[version][name] != "not recorded":
                    texts.setdefault(versions[version][name], []).append(version)
            by_text = {text: " ".join(of) for text, of in texts.items()}
            names[name] = next(iter(texts)) if [*texts.values()] == [ordered] else by_text
        stored[package] = {"versions": " ".join(ordered), "names": names}
    SIGNATURES.write_text(json.dumps(stored, indent=1) + "\n")


def record(package: str, wheel: Path) -> dict[str, str]:
    """The entries of one version of a package: what `ours` wants of it, and nothing else."""
    sources, root = Sources(wheel), PACKAGES[package]
    names = {name: sources.entry(name) for name in wanted_names(root)}
    return names | {each.key: sources.calls(each.scope, each.callees) for each in callbacks(root)}


def _download(package: str, version: str, folder: str) -> Path:
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", *platforms, "--dest", folder, f"{package}=={version}"]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the signatures that we depend on from released wheels.")
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("versions", nargs="*", help="default: all that were recorded")
    parser.add_argument("--wheels", type=Path, help="a folder with PACKAGE-VERSION.whl, instead of a download")
    parser.add_argument("--remove", action="store_true", help="forget these versions")
    parser.add_argument("--prune", action="store_true", help="download nothing, and drop names that are not used")
    arguments = parser.parse_args()
    table = read_signatures()
    recorded = table.setdefault(arguments.package, {})
    if arguments.prune:
        needed = needed_names(PACKAGES[arguments.package])
        for version, names in recorded.items():
            recorded[version] = {name: text for name, text in names.items() if name in needed}
    for version in [] if arguments.prune else arguments.versions or list(recorded):
        recorded.pop(version, None)
        if arguments.remove:
            continue
        with tempfile.TemporaryDirectory() as folder:
            here = arguments.wheels and arguments.wheels / f"{arguments.package}-{version}.whl"
            recorded[version] = record(arguments.package, here or _download(arguments.package, version, folder))
        write_signatures(table)
    write_signatures(table)


if __name__ == "__main__":
    main()
