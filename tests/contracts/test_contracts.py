"""Every call between our code and Megatron-Core, vLLM and Transformer Engine binds, in every version that we support.

None of them is imported: `ours` finds the calls in our source, `record` has written down what the versions take.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator

import pytest

from tests.contracts import ours
from tests.contracts.record import of_version, read_signatures
from tests.contracts.tables import FORWARDS, PACKAGES, USED_FROM, Callback

TABLE = read_signatures()
VERSIONS = [(package, version) for package, versions in TABLE.items() for version in versions]

# What our objects inherit from classes of other packages: torch does not rename these.
_MODULE = frozenset(
    "forward get_parameter get_submodule load_state_dict modules named_modules named_parameters parameters "
    "register_forward_hook requires_grad_ state_dict to".split()
)
INHERITED = {
    "torch.nn.Module": _MODULE,
    "transformer_engine.pytorch.Linear": _MODULE,
    "torch.distributed.checkpoint.DefaultSavePlanner": {"lookup_object"},
}


def entry(package: str, version: str, name: str) -> str:
    """What was recorded for a name; where it is inherited from a class outside, `outside`."""
    text = TABLE[package][version].get(name, "not recorded")
    owner = text.removeprefix("outside: ")
    return "outside" if name.rpartition(".")[2] in INHERITED.get(owner, ()) else text


def parameters(arguments: ast.arguments, *, drop_first: bool = False) -> inspect.Signature:
    kinds = inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    found = []
    for i, argument in enumerate(plain):
        kind = kinds.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        found.append(kinds(argument.arg, kind, default=kinds.empty if i < required else None))
    found = found[drop_first:]
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def parse(text: str) -> inspect.Signature:
    """A recorded signature, in which nothing stands for a default."""
    (function,) = ast.parse(f"def f{re.sub(r'=(?=[,)])', '=0', text)}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return parameters(function.args)


def bind(signature: inspect.Signature, shape: str, bound: tuple[str, ...] = ()) -> str | None:
    """Why a call does not fit, or None. With `*_` or `**_` in it, only what is written out is looked at."""
    call = ast.parse(f"f{shape}", mode="eval").body
    assert isinstance(call, ast.Call)
    is_open = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
    positional = [None for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = dict.fromkeys([*(k.arg for k in call.keywords if k.arg), *bound])
    try:
        (signature.bind_partial if is_open else signature.bind)(*positional, **keywords)
    except TypeError as error:
        return str(error)
    return None


def is_met(name: str, version: str) -> bool:
    """Whether our code meets the class of a name in this version of its package."""
    first = next((first for owner, first in USED_FROM.items() if ours.is_under(name, owner)), version)
    return [*map(int, version.split("."))] >= [*map(int, first.split("."))]


def misfit(package: str, version: str, name: str, shape: str | None) -> str | None:
    """Why a use of a name fails, or None."""
    text = entry(package, version, name)
    if text == "not recorded":
        return f"was not recorded: python -m tests.contracts.record {package}"
    if text == "absent" or text.startswith("outside:"):
        return f"is {text}"
    if shape is None or text == "outside":
        return None
    if not text.startswith("("):
        return f"is no function, but {text}"
    problem = bind(parse(text), shape)
    further = FORWARDS.get(name)
    if problem is None and further:
        taken = parse(text).parameters
        keywords = [k for k in re.findall(r"(\w+)=_", shape) if k not in taken]
        problem = bind(parse(entry(package, version, further)), f"({', '.join(f'{k}=_' for k in keywords)})")
    return problem


def narrowed(base: inspect.Signature, override: inspect.Signature) -> str | None:
    """What callers of the base may pass and the override does not take, or None."""
    kinds = inspect.Parameter
    accepted = override.parameters
    is_kind = {parameter.kind for parameter in accepted.values()}
    plain = [p for p in accepted.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    passed = 0
    for name, parameter in base.parameters.items():
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            continue
        has_name = name in accepted or kinds.VAR_KEYWORD in is_kind
        if parameter.kind is kinds.KEYWORD_ONLY:
            if not has_name:
                return f"takes no {name}"
            continue
        place = plain[passed].name if passed < len(plain) else None
        if place is None and kinds.VAR_POSITIONAL not in is_kind:
            return f"takes no {name}"
        if place is not None and place != name:
            return f"has {place} where the base has {name}"
        passed += 1
    extra = [p.name for p in plain[passed:] if p.default is kinds.empty]
    return f"asks for {', '.join(extra)}, which the base does not have" if extra else None


def _fail_if(failures: list[str]) -> None:
    if failures:
        pytest.fail("\n".join(dict.fromkeys(failures)), pytrace=False)


@pytest.mark.parametrize(("package", "version"), VERSIONS)
def test_our_calls_bind(package: str, version: str) -> None:
    uses = [use for use in ours.uses() if ours.is_under(use.name, PACKAGES[package]) and is_met(use.name, version)]
    failures = []
    for use in uses:
        if why := misfit(package, version, use.name, use.shape):
            called = f", called with {use.shape}" if use.shape else ""
            failures.append(f"{use.place}: {use.name} of {package} {version} {why}{called}")
    _fail_if(failures)


@pytest.mark.parametrize(("package", "version"), VERSIONS)
def test_our_overrides_take_what_the_base_takes(package: str, version: str) -> None:
    failures = []
    for override in ours.overrides():
        text = TABLE[package][version].get(override.base, "absent")
        if ours.is_under(override.base, PACKAGES[package]) and text.startswith("("):
            if why := narrowed(parse(text), parameters(override.signature, drop_first=True)):
                failures.append(
                    f"{override.place}: {override.name} {why}: {override.base}{text} of {package} {version}"
                )
    _fail_if(failures)


@pytest.mark.parametrize(("package", "version"), VERSIONS)
def test_their_calls_bind(package: str, version: str) -> None:
    """Of our code, and of each other's classes, between which our layer specification is the link."""
    failures = []
    for callback in ours.callbacks(PACKAGES[package]):
        recorded = entry(package, version, callback.key)
        shapes = re.findall(r"\(.*?\)", recorded)
        assert shapes, f"{callback.key} of {package} {version}: {recorded}"
        for target, where in _targets(callback, package, version):
            problems = [bind(where, shape, _bound(target)) for shape in shapes]
            if all(problems) if callback.some else any(problems):
                why = next(filter(None, problems))
                failures.append(f"{target}{where} {why}: {package} {version} calls {callback.key}{recorded}")
    _fail_if(failures)


def _targets(callback: Callback, package: str, version: str) -> Iterator[tuple[str, inspect.Signature]]:
    """Where a call ends up, and what is taken there, in every version of the other package."""
    for target in callback.targets:
        name: ast.arguments | str = target if _package(target) else ours.our_signature(target)
        if isinstance(name, ast.arguments):
            yield target, parameters(name, drop_first=_has_self(name))
            continue
        of = _package(name)
        assert of is not None, f"{target} is neither ours nor theirs"
        for other in [version] if of == package else TABLE[of]:
            text = entry(of, other, name)
            if text == "outside":
                continue
            assert text.startswith("("), f"{name} of {of} {other}: {text}"
            yield f"{target} ({of} {other})", parse(text)


def _has_self(arguments: ast.arguments) -> bool:
    return arguments.args[0].arg == "self"


def _package(name: str) -> str | None:
    return next((package for package, root in PACKAGES.items() if ours.is_under(name, root)), None)


def _bound(target: str) -> tuple[str, ...]:
    """Arguments that `functools.partial` has given before the call arrives."""
    return {
        "nemo_ssopd.megatron.policy.MegatronPolicy._forward_step": ("loss",),
        "nemo_ssopd.megatron.policy.MegatronPolicy._loss": (
            *("packed", "inputs", "examples", "token_loss", "aux_losses", "denominators"),
        ),
    }.get(target, ())


def test_every_receiver_is_known() -> None:
    _fail_if(ours.problems())


def test_types_are_all_used() -> None:
    assert not ours.unread_types(), "remove these from TYPES"


def test_supported_ranges_begin_and_end_at_recorded_versions() -> None:
    gpu = tomllib.loads((ours.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    for package in ("megatron-core", "vllm"):
        (required,) = [each for each in gpu if each.startswith(package)]
        bounds = re.fullmatch(rf"{package}>=(\d+)\.(\d+),<(\d+)\.(\d+)", required)
        assert bounds, required
        first, end = [tuple(map(int, pair)) for pair in (bounds.groups()[:2], bounds.groups()[2:])]
        recorded = sorted(tuple(map(int, version.split(".")[:2])) for version in TABLE[package])
        assert recorded[0] == first, f"{required}, but the first version recorded is {recorded[0]}"
        assert (recorded[-1][0], recorded[-1][1] + 1) == end, f"{required}, but the last recorded is {recorded[-1]}"


def test_signatures_hold_what_is_needed_and_no_more() -> None:
    for package, root in PACKAGES.items():
        needed = ours.needed_names(root)
        assert TABLE[package], package
        for version, names in TABLE[package].items():
            missing = sorted(needed - {name for name, text in names.items() if text != "not recorded"})
            assert not missing, f"python -m tests.contracts.record {package} {version}   # for {missing}"
            unused = sorted(set(names) - needed)
            assert not unused, f"python -m tests.contracts.record {package} --prune   # for {unused}"


# ---- The test's own parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signature", "shape", "why"),
    [
        ("(a, b=)", "(_)", None),
        ("(a, b=)", "(_, c=_)", "got an unexpected keyword argument 'c'"),
        ("(a, *, b)", "(_, _)", "too many positional arguments"),
        ("(a, *, b)", "(_)", "missing a required"),
        ("(a, *, b)", "(_, **_)", None),
        ("(a, *, b)", "(_, c=_, **_)", "got an unexpected keyword argument 'c'"),
        ("(*args, **kwargs)", "(_, _, c=_)", None),
    ],
)
def test_bind(signature: str, shape: str, why: str | None) -> None:
    found = bind(parse(signature), shape)
    assert found is None if why is None else why in (found or "")


@pytest.mark.parametrize(
    ("base", "override", "why"),
    [
        ("(a, b)", "(a, b)", None),
        ("(a, b, c=)", "(a, b)", "takes no c"),
        ("(a, b, c=)", "(a, *rest)", None),
        ("(a, b)", "(b, a)", "has b where the base has a"),
        ("(a, *, b=)", "(a)", "takes no b"),
        ("(a, *, b=)", "(a, **more)", None),
        ("(a)", "(a, b)", "asks for b"),
        ("(a)", "(a, b=)", None),
    ],
)
def test_narrowed(base: str, override: str, why: str | None) -> None:
    found = narrowed(parse(base), parse(override))
    assert found is None if why is None else why in (found or "")


def test_the_finder_follows_objects() -> None:
    """An attribute of a known class is a use; what is of no known type, and is used further, is a problem."""
    source = """
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig as Config

def f(model: GPTModel | None, **more):
    options = {"a": 1} if model else {"b": 2}
    config = Config(1, num_layers=2, **options)
    config.no_sync_func = model.decoder.layers
    for layer in model.decoder.layers:
        layer.mlp.linear_fc1.bias.zero_()
    model.rotary_pos_emb.inv_freq.to("cpu")
    return model(config, **more)
"""
    found = ours.find("nemo_ssopd.example", source)
    used = {(use.name.removeprefix("megatron.core."), use.shape) for use in found.uses}
    assert used >= {
        ("transformer.TransformerConfig", "(_, a=_, b=_, num_layers=_)"),
        ("transformer.TransformerConfig.no_sync_func", None),
        ("transformer.transformer_layer.TransformerLayer.mlp", None),
        ("tensor_parallel.ColumnParallelLinear.bias", None),
        ("models.gpt.GPTModel.forward", "(_, **_)"),
    }
    (problem,) = found.problems
    assert "what is megatron.core.models.gpt.GPTModel.rotary_pos_emb?" in problem


def test_a_class_that_is_met_later() -> None:
    ((later, first),) = USED_FROM.items()
    assert is_met(f"{later}.get_model", first) and is_met(f"{later}.get_model", "0.100.0")
    assert not is_met(f"{later}.get_model", "0.20.1") and is_met("vllm.LLM.generate", "0.20.1")


def test_entries_per_version() -> None:
    assert of_version("(a)", "1.0") == "(a)"
    assert of_version({"(a)": "1.0 1.1", "absent": "2.0"}, "2.0") == "absent"
    assert of_version({"(a)": "1.0"}, "3.0") == "not recorded"
