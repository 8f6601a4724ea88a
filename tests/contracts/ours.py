"""What our code takes from Megatron-Core, vLLM and Transformer Engine, found in its source without importing it.

    for use in uses(): ...      # nemo_ssopd/megatron/policy.py:90 calls megatron.core.optimizer.ChainedOptimizer.step

Names are followed through imports, and objects through annotations, constructors, isinstance and `TYPES`: the types
that the source does not say. An attribute of an attribute whose type nobody knows is a `problem`, not a gap.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nemo_ssopd.models.family import families
from tests.contracts.tables import CALLBACKS, FORWARDS, MIXED_INTO, NARROWER, PACKAGES, TYPES, Callback

ROOT = Path(__file__).parents[2]
FOLDERS = ("nemo_ssopd", "benchmarks", "scripts", "tools")


def callbacks(root: str) -> list[Callback]:
    """Those that a package makes; `root` is its import name."""
    return [each for each in CALLBACKS if is_under(each.scope, root)]


@dataclass(frozen=True)
class Use:
    """A place in our code that needs a name of a package, and how it calls it."""

    place: str
    name: str
    shape: str | None = None
    """The arguments, as `call_shape` writes them; None where the name is not called."""


@dataclass(frozen=True)
class Override:
    """A method of ours in the place of one of a package's class."""

    place: str
    name: str
    base: str
    signature: ast.arguments


def is_under(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def _is_theirs(name: str) -> bool:
    return any(is_under(name, root) for root in PACKAGES.values())


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def call_shape(
    arguments: Sequence[ast.expr], keywords: Sequence[ast.keyword], more: Sequence[str] | None = None
) -> str:
    """`(_, *_, name=_, **_)`. `more`: the keys of the mappings behind `**`, where they are known."""
    parts = ["*_" if isinstance(argument, ast.Starred) else "_" for argument in arguments]
    names = sorted({*(keyword.arg for keyword in keywords if keyword.arg), *(more or ())})
    parts += [f"{name}=_" for name in names]
    if more is None and any(keyword.arg is None for keyword in keywords):
        parts.append("**_")
    return f"({', '.join(parts)})"


# ---- Our classes and functions ---------------------------------------------------------------------------------------


@dataclass
class _Class:
    place: str
    bases: list[str]
    methods: dict[str, ast.FunctionDef]
    members: set[str]


@dataclass
class _Module:
    name: str
    path: str
    tree: ast.Module
    imported: dict[str, str] = field(default_factory=dict)
    classes: dict[str, _Class] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)

    def dotted(self, expression: ast.expr | None) -> str | None:
        """The full name that an expression such as `torch.nn.Module` stands for."""
        if isinstance(expression, ast.Name):
            if expression.id in self.classes or expression.id in self.functions:
                return f"{self.name}.{expression.id}"
            return self.imported.get(expression.id)
        if isinstance(expression, ast.Attribute) and (owner := self.dotted(expression.value)):
            return f"{owner}.{expression.attr}"
        return None


@cache
def _modules() -> dict[str, _Module]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    modules = {}
    for file in files:
        path = file.relative_to(ROOT)
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        modules[name] = _module(_Module(name, str(path), ast.parse(file.read_text())))
    return modules


def _module(module: _Module) -> _Module:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name if alias.asname else alias.name.partition(".")[0]
                module.imported[alias.asname or root] = root
        elif isinstance(node, ast.ImportFrom):
            module.imported.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef):
            module.functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            module.classes[node.name] = _Class(f"{module.path}:{node.lineno}", [], {}, set())
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            about = module.classes[node.name]
            about.bases += MIXED_INTO.get(f"{module.name}.{node.name}", ())
            about.bases += filter(None, map(module.dotted, node.bases))
            about.methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
            about.members = {*about.methods, *_own_attributes(node)}
    return module


def _own_attributes(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            yield inner.attr
        elif isinstance(inner, ast.AnnAssign | ast.Assign) and inner in node.body:
            yield from (ast.unparse(t) for t in (inner.targets if isinstance(inner, ast.Assign) else [inner.target]))


def _our_class(name: str) -> _Class | None:
    module, _, last = name.rpartition(".")
    about = _modules().get(module)
    return about.classes.get(last) if about else None


def our_signature(name: str) -> ast.arguments | str:
    """What a function, method or constructor of ours takes; or the name of the package's that it inherits."""
    owner, _, last = name.rpartition(".")
    if about := _our_class(name):  # a constructor
        return about.methods["__init__"].args if "__init__" in about.methods else about.bases[0]
    if about := _our_class(owner):
        return about.methods[last].args if last in about.methods else f"{about.bases[0]}.{last}"
    return _modules()[owner].functions[last].args


def overrides() -> Iterator[Override]:
    """Methods of our classes that may take the place of a package's. Constructors are called by ourselves."""
    for module in _modules().values():
        for name, about in module.classes.items():
            bases = [base for base in about.bases if _is_theirs(base)]
            for method, node in about.methods.items():
                full = f"{module.name}.{name}.{method}"
                if method != "__init__" and full not in NARROWER:
                    place = f"{module.path}:{node.lineno}"
                    yield from (Override(place, full, f"{base}.{method}", node.args) for base in bases)


# ---- Uses ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """An expression that stands for a module, class or function."""

    name: str


@dataclass(frozen=True)
class _Object:
    """An expression whose value is of a class; or an attribute, called by its own name, of which no type is known."""

    type: str


@dataclass(frozen=True)
class _Several:
    """A tuple's elements, or what an object or `super()` may be."""

    each: tuple[_Value, ...]


_Value = _Named | _Object | _Several | None


class _Finder(ast.NodeVisitor):
    """Collects the uses of one module. Visiting an expression returns what it stands for."""

    def __init__(self, module: _Module, attributes: dict[str, _Value]) -> None:
        """`attributes`: those of our own objects, as far as assignments to them were seen; what is seen is added."""
        self.module, self.uses, self.problems = module, list[Use](), list[str]()
        self._attributes = attributes
        self._names: list[dict[str, _Value]] = [{}]
        self._inside: list[str] = [module.name]
        self._functions: list[ast.FunctionDef] = []

    def _use(self, node: ast.AST, name: str, shape: str | None = None) -> None:
        if _is_theirs(name):
            self.uses.append(Use(f"{self.module.path}:{node.lineno}", name, shape))  # type: ignore[attr-defined]

    def _problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(f"{self.module.path}:{node.lineno}: {text}")  # type: ignore[attr-defined]

    # Statements.

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._use(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._use(node, f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            self.visit(base)
        with self._scope(node.name):
            self._visit_all(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_all([*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)])
        owner = ".".join(self._inside)
        with self._scope(node.name):
            self._functions.append(node)
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                self._bind(argument.arg, self._annotated(argument.annotation))
            if _our_class(owner) and node.args.args:
                self._bind(node.args.args[0].arg, _Object(owner))
            self._visit_all(node.body)
            self._functions.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        with self._scope("lambda"):
            for argument in node.args.args:
                self._bind(argument.arg, None)
            self.visit(node.body)

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.visit(node.value)
        for target in node.targets:
            self._assign(target, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        value = self.visit(node.value) if node.value else None
        self._assign(node.target, value or self._annotated(node.annotation))

    def visit_For(self, node: ast.For) -> None:
        self._assign(node.target, self._element(node.iter, self.visit(node.iter)))
        self._visit_all([*node.body, *node.orelse])

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._assign(node.target, self._element(node.iter, self.visit(node.iter)))
        self._visit_all(node.ifs)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        with self._scope("comprehension"):
            self._inside.pop()  # its variables are looked up in TYPES as the function's
            self._visit_all(node.generators)
            self._visit_all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
            self._inside.append("comprehension")

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension

    def visit_Assert(self, node: ast.Assert) -> None:
        self.generic_visit(node)
        self._narrow(node.test)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before = dict(self._names[-1])
        self._narrow(node.test)
        self._visit_all(node.body)
        self._names[-1].update(before)
        self._visit_all(node.orelse)

    def _narrow(self, test: ast.expr) -> None:
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance" and isinstance(test.args[0], ast.Name):
            if name := self.module.dotted(test.args[1]):
                self._names[-1][test.args[0].id] = _Object(name)

    def _visit_all(self, nodes: Sequence[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    @contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        self._names.append(dict(self._names[-1]))
        self._inside.append(name)
        yield
        self._names.pop()
        self._inside.pop()

    def _bind(self, name: str, value: _Value) -> None:
        full = ".".join([*self._inside, name])
        self._names[-1][name] = _declared(full, otherwise=value)

    def _assign(self, target: ast.expr, value: _Value) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            same = isinstance(value, _Several) and len(value.each) == len(target.elts)
            only = self._element(target, value) if isinstance(value, _Object) else None
            for i, element in enumerate(target.elts):
                self._assign(element, value.each[i] if same and isinstance(value, _Several) else only)
        elif isinstance(target, ast.Name):
            self._bind(target.id, value)
        elif isinstance(target, ast.Attribute):
            owner = self.visit(target.value)
            self._member(owner, target.attr, target)
            if isinstance(owner, _Object) and isinstance(value, _Object) and _our_class(owner.type):
                self._attributes.setdefault(f"{owner.type}.{target.attr}", value)
        else:
            self.visit(target)

    def _element(self, node: ast.AST, value: _Value) -> _Value:
        if not isinstance(value, _Object) or not _is_theirs(value.type):
            return None
        if f"{value.type}[]" not in TYPES:
            self._problem(node, f"what does {value.type} hold? Say so in TYPES, as {value.type}[]")
        return _declared(f"{value.type}[]")

    def _annotated(self, annotation: ast.expr | None) -> _Value:
        if isinstance(annotation, ast.BinOp):  # X | None
            return self._annotated(annotation.left)
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "tuple":
            elements = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else []
            return _Several(tuple(self._annotated(element) for element in elements))
        name = self.module.dotted(annotation)
        return _Object(name) if name and (_is_theirs(name) or _our_class(name)) else None

    # Expressions.

    def visit_Name(self, node: ast.Name) -> _Value:
        if node.id in self._names[-1]:
            return self._names[-1][node.id]
        name = self.module.dotted(node)
        return _Named(name) if name else None

    def visit_Attribute(self, node: ast.Attribute) -> _Value:
        return self._member(self.visit(node.value), node.attr, node)

    def visit_Tuple(self, node: ast.Tuple) -> _Value:
        return _Several(tuple(self.visit(element) for element in node.elts))

    def visit_IfExp(self, node: ast.IfExp) -> _Value:
        self.visit(node.test)
        values = [self.visit(node.body), self.visit(node.orelse)]
        return next(filter(None, values), None)

    def visit_BoolOp(self, node: ast.BoolOp) -> _Value:
        values = [self.visit(value) for value in node.values]
        return next(filter(None, values), None)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> _Value:
        value = self.visit(node.value)
        self._assign(node.target, value)
        return value

    def visit_Subscript(self, node: ast.Subscript) -> _Value:
        self.visit(node.slice)
        return self._element(node, self.visit(node.value))

    def visit_Call(self, node: ast.Call) -> _Value:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            about = _our_class(".".join(self._inside[:-1]))
            return _Several(tuple(_Object(base) for base in about.bases)) if about else None
        function = self.visit(node.func)
        arguments = [self.visit(argument) for argument in node.args]
        self._visit_all([keyword.value for keyword in node.keywords])
        called = function.each if isinstance(function, _Several) else (function,)
        results = [self._called(node, each) for each in called]
        if isinstance(node.func, ast.Name) and self.module.imported.get(node.func.id) == "dataclasses.replace":
            if isinstance(arguments[0], _Object):
                self._use(node, arguments[0].type, call_shape([], node.keywords, self._unpacked(node))[:-1] + ", **_)")
        return next(filter(None, results), None)

    def _called(self, node: ast.Call, function: _Value) -> _Value:
        shape = call_shape(node.args, node.keywords, self._unpacked(node))
        if isinstance(function, _Object):
            is_instance = _is_class(function.type)
            name = f"{function.type}.forward" if is_instance else function.type
        elif isinstance(function, _Named):
            name = function.name.removesuffix(".__init__")
        else:
            return None
        self._use(node, name, shape)
        if f"{name}()" in TYPES:
            return _declared(f"{name}()")
        if isinstance(function, _Named) and (_our_class(name) or (_is_class(name) and _is_theirs(name))):
            return _Object(name)
        return self._returned(name)

    def _returned(self, name: str) -> _Value:
        """By the annotation of a function of ours."""
        owner, _, last = name.rpartition(".")
        module = _modules().get(owner)
        function = module.functions.get(last) if module else None
        return _Finder(module, {})._annotated(function.returns) if module and function else None

    def _member(self, owner: _Value, name: str, node: ast.AST) -> _Value:
        if name.startswith("__") and name != "__init__":  # of every class, or function
            return None
        if isinstance(owner, _Several):
            return _Several(tuple(self._member(each, name, node) for each in owner.each))
        if isinstance(owner, _Named):
            self._use(node, f"{owner.name}.{name}")
            return _Named(f"{owner.name}.{name}")
        if not isinstance(owner, _Object):
            return None
        full = f"{owner.type}.{name}"
        if about := _our_class(owner.type):
            if full in TYPES or full in self._attributes:
                return _declared(full, otherwise=self._attributes.get(full))
            bases = [base for base in about.bases if _is_theirs(base)]
            inherited = [] if name in about.members else [self._member(_Object(b), name, node) for b in bases]
            return _Several(tuple(inherited)) if inherited else None
        if not _is_theirs(full):
            return None
        if not _is_class(owner.type):
            self._problem(node, f"what is {owner.type}? Say so in TYPES, or None where it is torch's")
            return None
        if name == "__init__":
            return _Named(owner.type)
        self._use(node, full)
        return _declared(full, otherwise=_Object(full))

    def _unpacked(self, node: ast.Call) -> list[str] | None:
        """The keys of all mappings behind `**`; None when one of them is not written out."""
        keys: list[str] = []
        for keyword in node.keywords:
            if keyword.arg is None:
                found = list(self._keys(keyword.value))
                if not found:
                    return None
                keys += found
        return keys

    def _keys(self, mapping: ast.expr) -> Iterator[str]:
        if isinstance(mapping, ast.Name) and self._functions:
            for node in ast.walk(self._functions[-1]):
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if mapping.id in map(ast.unparse, targets):
                        yield from _literal_keys(node.value)
        elif isinstance(mapping, ast.Call) and isinstance(mapping.func, ast.Name):
            if function := self.module.functions.get(mapping.func.id):
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value:
                        yield from _literal_keys(node.value)


def _literal_keys(expression: ast.expr) -> Iterator[str]:
    for node in ast.walk(expression):
        if isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _declared(key: str, otherwise: _Value = None) -> _Value:
    """What TYPES says of an expression; entries that are read are noted, to find those that nothing needs."""
    if key not in TYPES:
        return otherwise
    _read_types.add(key)
    types = TYPES[key]
    if isinstance(types, tuple):
        return _Several(tuple(_Object(each) for each in types))
    return _Object(types) if types else None


_read_types: set[str] = set()


def unread_types() -> list[str]:
    """The entries of TYPES that no expression in our code needs."""
    uses()
    return sorted(set(TYPES) - _read_types)


def find(name: str, source: str) -> _Finder:
    """The uses and problems of one module's source."""
    finder = _Finder(_module(_Module(name, name, ast.parse(source))), {})
    finder.visit(finder.module.tree)
    return finder


def in_tables() -> list[_Finder]:
    """The names of Megatron-Core's that stand as text in the families' tables, each table as code that uses them."""
    finders = []
    for family in families().values():
        fields = _literal_keys(ast.parse(inspect.getsource(family.megatron)))
        lines = [
            "from megatron.core.models.gpt import GPTModel",
            "from megatron.core.transformer import TransformerConfig",
            "from megatron.core.transformer.transformer_layer import TransformerLayer",
            f"TransformerConfig({', '.join(f'{field}=0' for field in fields)})",
            "def look_up(model: GPTModel, layer: TransformerLayer): (",
            *(f"model.{weight.parameter}," for weight in (family.embedding, family.final_norm, family.output)),
            *(f"layer.{weight.parameter}," for weight in family.layer),
            ")",
        ]
        finders.append(find(f"the table of {family.architecture}", "\n".join(lines)))
    return finders


@cache
def uses() -> tuple[Use, ...]:
    """Every place where our code needs a name of a package."""
    return tuple(use for finder in _found() for use in finder.uses)


def problems() -> list[str]:
    """Attributes of objects whose type the source does not say, nor TYPES."""
    return [problem for finder in _found() for problem in finder.problems]


@cache
def _found() -> list[_Finder]:
    """In two rounds: an object's attributes may be assigned further down than they are used, or in another file."""
    attributes: dict[str, _Value] = {}
    for _ in range(2):
        finders = [_Finder(module, attributes) for module in _modules().values()]
        for finder in finders:
            finder.visit(finder.module.tree)
    return finders + in_tables()


def wanted_names(root: str) -> list[str]:
    """The names of a package that the test looks up."""
    names = {use.name for use in uses()} | {override.base for override in overrides()}
    names |= {target for each in CALLBACKS for target in each.targets}
    names |= {base for target in names if not _is_theirs(target) for base in _inherited_name(target)}
    names |= set(FORWARDS.values())
    return sorted(name for name in names if is_under(name, root))


def _inherited_name(target: str) -> list[str]:
    signature = our_signature(target)
    return [signature] if isinstance(signature, str) else []


def needed_names(root: str) -> set[str]:
    """Everything that is recorded of a package."""
    return {*wanted_names(root), *(callback.key for callback in callbacks(root))}
