"""Whether SGLang can compile its page hash, which names every page that a storage holds: ``python -m`` this module.

It does so at the first use, in the middle of a request; what is missing then takes the storage's threads down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig

HEADERS = ("Python.h", "openssl/sha.h")
ADVICE = (
    "install a C++ compiler, ninja and the headers of Python and OpenSSL "
    "(Debian: apt-get install g++ ninja-build python3-dev libssl-dev)"
)
_TIMEOUT_S = 60


def missing() -> str:
    """What is not there, for a reader; empty when all is there.

    Raises ``OSError`` or ``subprocess.TimeoutExpired`` when the compiler does not run.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if shutil.which("ninja") is None:
        return "ninja is not on the PATH"
    command = [compiler, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
    for header in HEADERS:
        text = f"#include <{header}>\n"
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            return f"the header {header} is missing"
    return ""


if __name__ == "__main__":
    lacking = missing()
    sys.exit(f"{lacking}; {ADVICE}" if lacking else None)
