"""What the source may not contain, and who may look into a run's folder. Secrets in real runs: tests/faults."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("nemo_ssopd", "scripts") for file in (ROOT / folder).rglob("*.py"))

# Calls that run what a file or a string says.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "marshal.loads", "shelve.open"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "dill.load", "joblib.load"),
    *("np.load", "numpy.load", "importlib.import_module", "pkgutil.resolve_name", "runpy.run_path", "runpy.run_module"),
}
# The user's own reward function, which the config names: imported in a grading worker, never in the trainer.
ALLOWED = {("nemo_ssopd/rollout/user_function.py", "importlib.import_module")}


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(n.func), n) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]


def argument(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_what_a_file_says(file: Path) -> None:
    for name, call in calls(file):
        is_allowed = (str(file.relative_to(ROOT)), name) in ALLOWED if file.is_relative_to(ROOT) else False
        assert is_allowed or name not in FORBIDDEN, f"{file}: {ast.unparse(call)}"
        assert name != "torch.load" or argument(call, "weights_only") == "True", f"{file}: {ast.unparse(call)}"
        assert argument(call, "shell") in (None, "False"), f"{file}: {ast.unparse(call)}"
        # A setting that is off by default, never a constant.
        assert argument(call, "trust_remote_code") != "True", f"{file}: {ast.unparse(call)}"


def test_the_scan_sees_calls(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\npickle.load(open('x'))\n")
    with pytest.raises(AssertionError, match=r"pickle\.load"):
        test_nothing_runs_what_a_file_says(bad)


def test_remote_code_is_off_in_every_shipped_config() -> None:
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert "trust_remote_code: true" not in file.read_text(), file
