"""vLLM's own offline benchmark with the flag, as a user would run it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from examples.serving import cpu_environment
from tests.vllm.engine.local import BLOCK

EXTRA = "--kv-transfer-config.kv_connector_extra_config"


@pytest.mark.slow
def test_bench_throughput_with_the_connector(llama: Path, tmp_path: Path) -> None:
    """``vllm bench latency`` takes the same flag, but draws token ids that a tiny vocabulary does not have."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput", "--model", str(llama)]
    command += ["--dataset-name", "random", "--random-input-len", str(3 * BLOCK + 4), "--random-output-len", "64"]
    command += ["--num-prompts", "40", "--max-num-seqs", "8", "--output-json", str(result)]
    command += ["--kv-connector", "umbp", f"{EXTRA}.ssd_dir", str(tmp_path / "ssd"), f"{EXTRA}.ssd_capacity", "16MiB"]
    command += [f"{EXTRA}.dram_capacity", "16MiB", f"{EXTRA}.dram_prefault", "false"]
    command += ["--enforce-eager", "--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "256"]
    environment = {
        **os.environ,
        **cpu_environment(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    figures = json.loads(result.read_text())
    assert figures["num_requests"] == 40
    assert figures["requests_per_second"] > 0
    assert "umbp: pool open for 1 rank(s)" in run.stdout + run.stderr
    (catalogue,) = (tmp_path / "ssd").rglob("catalogue-*.sqlite")
    with closing(sqlite3.connect(catalogue)) as connection:
        (stored,) = connection.execute("SELECT count(*) FROM objects").fetchone()
    assert stored > 0, "what the benchmark computed is on SSD"
