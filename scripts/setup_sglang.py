"""Makes a virtual environment with an SGLang that runs without a GPU, this package (editable) and what its tests need.

Needs nothing but the standard library and may be run again at any time: what is there already is kept.  SGLang has no
wheel for the CPU; its ordinary one serves there when it is installed without its CUDA dependencies, and with the test
suite's shim (``tests/sglang/shim``) in the place of its kernels.  Therefore:

* torch is the CPU build, which is older than the one SGLang asks for and works;
* what a server imports is named here one by one, with the versions that SGLang pins;
* packages that are imported but never used without a GPU come without what they depend on.

SGLang compiles its page hash at the first use.  Where a compiler or a header is missing for that, it is said which, and
the shim's slower hash takes its place in the tests.
"""

from __future__ import annotations

import sys

from engine_environment import (
    REPOSITORY,
    TORCH,
    Environment,
    SetupError,
    check_machine,
    install,
    install_project,
    make,
    reason,
)

SGLANG_VERSION = "0.5.23"
NEEDED_BYTES = 5 << 30
STAMP = "installed.txt"
SHIM = REPOSITORY / "tests" / "sglang" / "shim"
BARE = (f"sglang=={SGLANG_VERSION}", "triton==3.9.0", "torchvision==0.28.0", "xgrammar==0.2.7", "anthropic")
"""Installed without dependencies."""
IMPORTED = (
    *("IPython", "PyYAML", "aiohttp", "apache-tvm-ffi==0.1.11", "blobfile==3.0.0", "build", "datasets", "distro"),
    *("compressed-tensors==0.18.0", "easydict", "einops", "fastapi", "gguf", "interegular", "kernels>=0.14.1,<0.15"),
    *("llguidance>=1.7.6,<2.0.0", "mistral_common>=1.11.5", "modelscope", "msgspec", "ninja", "numba==0.65.1", "numpy"),
    *("nvidia-ml-py", "openai-harmony==0.0.4", "openai==2.8.0", "orjson", "outlines==0.1.11", "packaging", "pillow"),
    *("partial_json_parser", "prometheus-client>=0.20.0", "psutil", "pybase64", "pydantic", "python-dateutil<3"),
    *("python-multipart", "pyzmq>=25.1.2", "regex", "requests", "scipy", "sentencepiece==0.2.1", "setproctitle"),
    *("soundfile==0.13.1", "tiktoken", "tokenizers==0.23.2", "tqdm", "transformers==5.19.0", "uvicorn>=0.51", "uvloop"),
    *("watchfiles", "xxhash", "zstandard"),
)
"""What a server without a GPU imports."""


def check(env: Environment) -> None:
    """Refuse early what would fail after minutes."""
    check_machine(env.folder, NEEDED_BYTES, "SGLang", "use a Linux machine")


def wanted() -> str:
    """Everything that is installed besides this package."""
    return "\n".join((TORCH, *IMPORTED, *BARE))


def is_ready(env: Environment) -> bool:
    """Whether an earlier run installed the same and found that it works."""
    stamp = env.folder / STAMP
    return stamp.exists() and stamp.read_text(encoding="utf-8") == wanted()


def install_sglang(env: Environment) -> None:
    """Install torch, what SGLang imports, and SGLang."""
    if is_ready(env):
        return
    env.say(f"installing SGLang {SGLANG_VERSION} and torch (3.8 GB on disk, two to ten minutes); log: {env.log}")
    install(env, TORCH, *IMPORTED)
    install(env, "--no-deps", *BARE)


def check_hash(env: Environment) -> None:
    """Say what is missing for SGLang to compile its page hash."""
    done = env.run("-m", "umbp_sglang.page_hash")
    if done.returncode:
        env.say(f"SGLang cannot compile its page hash here: {reason(done)}")
        env.say("the tests use a slower one of their own instead; a server without the tests' shim has no L3 here")


def check_result(env: Environment) -> None:
    """Import once what a server's process imports: what is broken should show here, not in the first test."""
    if not is_ready(env):
        program = (
            f"import os, sys; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'; sys.path.insert(0, {str(SHIM)!r}); "
            "import sitecustomize; from sglang.srt.managers import scheduler, detokenizer_manager"
        )
        done = env.run("-c", program)
        if done.returncode:
            raise SetupError(f"SGLang was installed but cannot be imported:\n{reason(done)}\nSee {env.log}.")
        (env.folder / STAMP).write_text(wanted(), encoding="utf-8")
    env.say(f"SGLang {SGLANG_VERSION} is ready in {env.folder}")


STEPS = (check, Environment.create, install_sglang, install_project, check_hash, check_result)

if __name__ == "__main__":
    sys.exit(make("sglang", (__doc__ or "").splitlines()[0], STEPS))
