"""What every test with an SGLang in its environment needs before torch and SGLang are imported, and its children.

Without a GPU, the shim beside this file fills in what SGLang lacks then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from examples.serving_sglang import cpu_environment, cpu_only

SHIM = Path(__file__).resolve().parent / "shim"

# SGLang compiles its page hash with the ninja that lies beside this Python.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A rank of several would compile one small function of SGLang's, which takes each process of a test ten seconds.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

if cpu_only():
    os.environ.update(cpu_environment())
    if str(SHIM) not in sys.path:
        sys.path.insert(0, str(SHIM))
    from umbp_cpu_shim import torchvision_ops

    torchvision_ops.install()
