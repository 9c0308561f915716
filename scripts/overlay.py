"""Makes a folder that, on PYTHONPATH, adds this package to a Python that already has a vLLM.

The environment of that Python is the user's: nothing in it is changed.  The folder holds this package and
those of its dependencies (and of its tests') that the environment lacks, and nothing that it has.

    overlay.py PYTHON FOLDER        run by a Python whose pip is 22.3 or newer
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# Runs in the user's Python with the folder on its path; prints the requirements that nothing satisfies.
FIND_MISSING = """
import importlib.metadata as metadata
from packaging.requirements import Requirement
seen, missing, todo = set(), set(), [Requirement("umbp-connectors[test]")]
while todo:
    requirement = todo.pop()
    key = (requirement.name.lower(), frozenset(requirement.extras))
    if key in seen:
        continue
    seen.add(key)
    try:
        found = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        missing.add(requirement.name + str(requirement.specifier))
        continue
    for line in found.requires or ():
        child = Requirement(line)
        extras = requirement.extras or {""}
        if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
            todo.append(child)
print("\\n".join(sorted(missing)))
"""

HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None and 'there is no vLLM in it')"


class OverlayError(Exception):
    """The folder cannot be made; the message says what to do."""


def run(command: list[str], folder: Path) -> str:
    """The standard output of ``command``, with ``folder`` on its Python path."""
    env = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=env)
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise OverlayError(f"{command[0]}: {reason}")
    return done.stdout


def install(python: str, folder: Path, requirements: list[str]) -> None:
    """Put ``requirements`` into ``folder`` as ``python`` would run them, and nothing that they require."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), *requirements], folder)


def make(python: str, folder: Path) -> None:
    """Fill ``folder`` from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install(python, folder, [str(REPOSITORY)])
    while missing := run([python, "-c", FIND_MISSING], folder).split():
        print(f"[vllm] beside {python}, not in it: {', '.join(missing)}", flush=True)
        install(python, folder, missing)


def main() -> int:
    """Make the folder; 0 when it is ready."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", help="the Python that has vLLM")
    parser.add_argument("folder", type=Path, help="what will go on PYTHONPATH")
    arguments = parser.parse_args()
    python = shutil.which(arguments.python)
    try:
        if python is None:
            raise OverlayError(f"VLLM_PYTHON={arguments.python} is not a program that can be run")
        run([python, "-c", HAS_VLLM], arguments.folder)
        make(python, arguments.folder.absolute())
    except (OverlayError, subprocess.TimeoutExpired) as error:
        print(f"[vllm] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
