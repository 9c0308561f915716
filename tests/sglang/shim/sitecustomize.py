"""TEST-ONLY.  Runs at the start of every Python that has this folder on ``PYTHONPATH``."""

from umbp_cpu_shim import torchvision_ops

torchvision_ops.install()
