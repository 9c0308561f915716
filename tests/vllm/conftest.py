"""What every test with a vLLM in its environment needs before torch and vLLM are imported."""

import os

# More OpenMP threads than idle cores spin instead of computing; and nothing may be asked of a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
