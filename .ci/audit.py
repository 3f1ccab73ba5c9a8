"""Known weaknesses of the packages that are installed here: ``make audit``.

An advisory database that is not reached, or a mirror that has no advisories, would make every
package look sound. So each is first asked about a release that is known to be weak; where none
knows of it, nothing is audited, and that is said.

Exit code: 0 for no known weakness or nothing audited, 1 for weaknesses, 2 where nothing was audited
and ``--required`` was given. What else is given goes to pip-audit (``--ignore-vuln ID``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# CVE-2016-10745 and others.
KNOWN_WEAK = "jinja2==2.4.1"
DATABASES = ("pypi", "osv")

Ask = Callable[[Sequence[str]], list[dict[str, Any]]]


def pip_audit(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit reports of each package; nothing where it fails."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=300, check=False
        )
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError):
        return []
    return packages


def working_database(ask: Ask) -> str | None:
    """The first database that knows of a weakness everybody knows of."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(KNOWN_WEAK + "\n")
        for database in DATABASES:
            arguments = ["--vulnerability-service", database, "--timeout=10"]
            arguments += ["--no-deps", "--disable-pip", "--requirement", str(requirements)]
            if any(package.get("vulns") for package in ask(arguments)):
                return database
    return None


def audit(arguments: Sequence[str], ask: Ask = pip_audit) -> int:
    """Print what is found; the exit code."""
    required = "--required" in arguments
    database = working_database(ask)
    if database is None:
        print(
            f"audit skipped: no advisory database that knows of {KNOWN_WEAK} can be reached "
            f"(tried {', '.join(DATABASES)})"
        )
        return 2 if required else 0
    passed_on = [one for one in arguments if one != "--required"]
    packages = ask(["--local", "--vulnerability-service", database, *passed_on])
    weak = [(one, found) for one in packages for found in one.get("vulns", ())]
    for package, found in weak:
        fixed = ", ".join(found.get("fix_versions") or ()) or "no release yet"
        print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    unknown = [one["name"] for one in packages if "skip_reason" in one]
    print(
        f"{len(packages) - len(unknown)} packages audited with {database}, "
        f"{len(weak)} known weaknesses"
        + (f"; not in its index: {', '.join(unknown)}" if unknown else "")
    )
    if len(packages) == len(unknown):
        print("nothing was audited")
        return 2 if required else 0
    return 1 if weak else 0


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1:]))
