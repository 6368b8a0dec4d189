"""`make audit`: the lock against the advisory databases, by pip-audit. What was not looked up is not called safe.

Exit code 0: every package was looked up and has no known advisory. 1: at least one advisory. 5: the database could not
be reached, or does not know some package, so nothing is said of those.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def audit(pip_audit: Path, lock: Path) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's account of each package of `lock`, and what it said where there is none."""
    command = [pip_audit, "--requirement", lock, "--no-deps", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"], done.stderr
    except (ValueError, KeyError):
        return [], done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pip_audit", type=Path)
    parser.add_argument("lock", type=Path)
    arguments = parser.parse_args()
    packages, said = audit(arguments.pip_audit, arguments.lock)
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    looked_up = len(packages) - len(skipped)
    found = [(package, one) for package in packages for one in package.get("vulns", [])]
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no version"
        print(f"ADVISORY {package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    print(f"{looked_up} packages of {arguments.lock} looked up, {len(found)} advisories")
    if found:
        return 1
    if not looked_up:
        reasons = [package["skip_reason"] for package in packages if "skip_reason" in package] or said.splitlines()
        reason = reasons[0][:200] if reasons else "pip-audit said nothing"
        print(f"NOT AUDITED: the advisory database could not be reached, or answered nothing ({reason})")
        return 5
    if skipped:
        print(f"NOT AUDITED: {', '.join(skipped)}: the database does not know them")
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
