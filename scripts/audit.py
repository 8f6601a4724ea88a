"""Ask pip-audit for known vulnerabilities of a lock file: python scripts/audit.py requirements/cpu.txt

Exit code 1 when there are any. When pip-audit cannot reach its data, it reports no vulnerability; this script then says
that nothing was audited. It finds out with one package first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(lock: Path) -> int:
    lines = [line for line in lock.read_text().splitlines() if "==" in line]
    if not audited(lines[:1]):
        print(f"not audited: the vulnerability data cannot be reached from here ({len(lines)} packages in {lock})")
        return 0
    packages = audited(lines)
    found = [(package, problem) for package in packages for problem in package["vulns"]]
    for package, problem in found:
        fixed = ", ".join(problem["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {problem['id']}, fixed in {fixed}")
    print(f"audited {len(packages)} of {len(lines)} packages: {len(found)} known vulnerabilities")
    return 1 if found else 0


def audited(lines: list[str]) -> list[dict[str, Any]]:
    """Return pip-audit's answer about these packages; it leaves out packages that it could not look up."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
        done = subprocess.run(
            [*command, "--format=json", f"--requirement={file.name}"], capture_output=True, text=True, timeout=1800
        )
    if not done.stdout.startswith("{"):
        print(done.stderr, file=sys.stderr)
        return []
    return [package for package in json.loads(done.stdout)["dependencies"] if "vulns" in package]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
