"""What hadolint does not know of the Dockerfile: that it copies what exists, pins what we pin, and drops root."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) in order; continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(instruction, arguments) for instruction, arguments in pairs]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == instruction]


def test_the_base_is_the_container_of_the_documentation() -> None:
    (base,) = arguments_of("FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/nemo:\d\d\.\d\d", base)
    assert f"`{base}`" in (ROOT / "docs" / "gpu.md").read_text()


def test_nothing_comes_from_an_address_and_every_source_exists_and_is_in_the_context() -> None:
    assert not arguments_of("ADD")
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for arguments in arguments_of("COPY"):
        *sources, _ = arguments.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source.removeprefix("./"), pattern) for pattern in allowed), f"{source} is ignored"


def test_packages_are_pinned_as_in_the_lock_file() -> None:
    locked = {_normal(line) for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()}
    pinned = [word for run in arguments_of("RUN") for word in run.split() if "==" in word]
    assert {_normal(pin) for pin in pinned} <= locked and len(pinned) == 2
    assert all("--no-deps" in run for run in arguments_of("RUN") if "pip install" in run), "the container's own stack"


def test_the_image_runs_the_training_command_and_not_as_root() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry_point,) = arguments_of("ENTRYPOINT")
    assert json.loads(entry_point)[0] in scripts
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(number for number, name in enumerate(names) if name in ("RUN", "COPY"))
    (user,) = arguments_of("USER")
    assert all(int(number) > 0 for number in user.split(":"))


@pytest.mark.heavy
def test_any_user_has_a_name_and_may_write_the_caches() -> None:
    environment = dict(pair.split("=", 1) for pair in " ".join(arguments_of("ENV")).split())
    nameless = "import getpass, pwd; pwd.getpwuid = {}.__getitem__; print(getpass.getuser())"  # as for an unknown uid
    name = subprocess.check_output([sys.executable, "-c", nameless], env=environment, text=True).strip()
    assert f" {name} " in " ".join(arguments_of("RUN")), "the name of the image's own user"
    caches = {variable: path for variable, path in environment.items() if variable.endswith(("HOME", "_DIR"))}
    assert caches.keys() == {"HOME", "HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert all(path.startswith("/tmp/home") for path in caches.values())


def _normal(pin: str) -> str:
    return pin.lower().replace("_", "-")
