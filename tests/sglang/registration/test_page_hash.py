"""SGLang's page hash: what it is compiled with, and what the tests use where it cannot be compiled."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from sglang.srt.mem_cache.cpp_utils import native_hash

from umbp_sglang import page_hash

pytest.importorskip("umbp_cpu_shim", reason="a machine with a GPU runs SGLang without the shim")
from umbp_cpu_shim.page_hash import PythonPageHash, compiled_or_python

NUMBERS = [0, 1, 2**31, 2**32 - 1, *range(9, 19)]


RECORDED = json.loads(Path(__file__).with_name("page_hashes.json").read_text(encoding="utf-8"))
"""What SGLang 0.5.23's compiled hash answers: a SHA-256 over the digests of each case below."""


@pytest.mark.parametrize("page_size", [None, 4, 7])
@pytest.mark.parametrize("prior", [None, bytes(range(32))])
@pytest.mark.parametrize(("bigram", "width"), [(False, 1), (False, 2), (True, 2)])
@pytest.mark.parametrize("wide", [False, True])
def test_the_stand_in_computes_the_same(
    page_size: int | None, prior: bytes | None, bigram: bool, width: int, wide: bool
) -> None:
    numbers = [*NUMBERS[:6], 2**32, *NUMBERS[6:]] if wide else NUMBERS
    raw = array("Q", numbers)
    length = len(raw) - 1 if bigram else len(raw) // width
    arguments = (raw, length, width, bigram, prior, page_size)
    digests = PythonPageHash.get_hash(*arguments)
    case = f"{page_size} {'prior' if prior else 'root'} {'bigram' if bigram else width} {'wide' if wide else 'narrow'}"
    assert (
        hashlib.sha256(" ".join([digests] if isinstance(digests, str) else digests).encode()).hexdigest()
        == RECORDED[case]
    )
    if not page_hash.missing():
        assert digests == native_hash._load_native_hash_module().get_hash(*arguments)


def test_the_stand_in_is_used_where_the_compiler_fails() -> None:
    def fails() -> None:
        raise RuntimeError("Failed to load HiCache native hash extension") from OSError("no compiler")

    assert compiled_or_python(fails)() is PythonPageHash
    assert compiled_or_python(lambda: "compiled")() == "compiled"


def compiler(folder: Path, without: str) -> str:
    """A compiler that does not find one header."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\nif grep -q '{without}'; then exit 1; fi\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("header", page_hash.HEADERS)
def test_a_missing_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, header))
    assert page_hash.missing() == f"the header {header} is missing"


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "nothing like this"))
    assert page_hash.missing() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert page_hash.missing() == "ninja is not on the PATH"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert page_hash.missing() == "there is no C++ compiler (no-such-compiler)"


def test_the_module_says_what_to_install(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "none")}
    command = [sys.executable, "-m", "umbp_sglang.page_hash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "no C++ compiler" in done.stderr
    assert "libssl-dev" in done.stderr
