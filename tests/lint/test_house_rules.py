"""The rules that no linter has: sizes, broad excepts, and what must not be named in the repository."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("umbp_connectors", "core/umbp_core", "vllm_plugin/umbp_vllm", "sglang_plugin/umbp_sglang")
FILES = sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
MAX_FILE = 400
MAX_FUNCTION = 60

BROAD_EXCEPTS = {
    "umbp_connectors/client/master_client.py": (1, "top of the client's thread: a snapshot may raise anything"),
    "umbp_connectors/debug/door.py": (1, "boundary of a question: what cannot be said must not cost the rest"),
    "umbp_connectors/daemon/companions.py": (1, "thread top: a plug-in's policy may raise, the pools go on"),
    "umbp_connectors/daemon/follower.py": (1, "thread top: the engine goes on, what the daemon holds is not told"),
    "umbp_connectors/daemon/server.py": (1, "top of a client's thread: the others are served on"),
    "umbp_connectors/master/native_connection.py": (2, "a call of the native door: it fails, the master serves on"),
    "umbp_connectors/plugins.py": (4, "hook call sites: a plug-in may raise anything"),
    "umbp_connectors/pool/catalogue.py": (1, "top of the catalogue's writer thread"),
    "umbp_connectors/pool/demoter.py": (2, "top of a demotion thread; a write to any tier"),
    "umbp_connectors/pool/io.py": (1, "boundary of a job for the disk: who waits for it is told, the thread lives"),
    "umbp_connectors/pool/sharing/server.py": (1, "top of a reader's thread: the others are served on"),
    "umbp_connectors/pool/trimming.py": (1, "thread top: a plug-in's policy may raise, the pool goes on"),
    "umbp_connectors/reporting/feed.py": (1, "producer boundary: a list that cannot be had must not reach the engine"),
    "umbp_connectors/reporting/reader.py": (1, "producer boundary: what one source says wrongly costs that source"),
    "umbp_connectors/reporting/reporter.py": (1, "producer boundary: capacities that cannot be had are not told"),
    "umbp_connectors/transfer/jobs.py": (2, "op boundary of a transfer worker: the op fails, the worker lives"),
    "umbp_connectors/transfer/lanes.py": (1, "top of a transfer thread"),
    "sglang_plugin/umbp_sglang/clearing.py": (1, "engine boundary: what cannot be cleared stays due"),
    "sglang_plugin/umbp_sglang/doors.py": (1, "engine boundary: a storage call is a miss"),
    "sglang_plugin/umbp_sglang/reporting_hooks.py": (
        1,
        "engine boundary: a hook of reporting costs what it would tell",
    ),
    "sglang_plugin/umbp_sglang/__init__.py": (1, "engine boundary: an entry point never raises"),
    "vllm_plugin/umbp_vllm/__init__.py": (2, "engine boundary: an entry point never raises"),
    "vllm_plugin/umbp_vllm/adapters.py": (1, "op boundary: an adapter whose files break their reader is not shared"),
    "vllm_plugin/umbp_vllm/cli_flags.py": (1, "engine boundary: an unknown vLLM costs the flags only"),
    "vllm_plugin/umbp_vllm/connector.py": (3, "engine boundary: the facade"),
    "vllm_plugin/umbp_vllm/host_talk.py": (1, "thread top: vLLM's leader goes on without the daemon"),
    "vllm_plugin/umbp_vllm/early.py": (1, "engine boundary: an unknown vLLM costs the keyword only"),
    "vllm_plugin/umbp_vllm/registration.py": (1, "engine boundary: an unknown vLLM costs the flags only"),
}
"""Where ``except Exception`` may stand, how often, and why.  Everything else names what it catches."""

BOUNDARY = re.compile(
    r"# (noqa: BLE001 - )?(engine boundary|hook call site|op boundary|thread top|producer boundary): "
)
"""How the comment beside each of them begins, as CONTRIBUTING.md has it."""

# Put together here, so that this file does not name them either.
FORBIDDEN = {
    "a package registry's host": re.compile("py" + r"pi\.org|python" + r"hosted|npm" + r"js\.|deb" + r"ian\.org"),
    "a path of one machine": re.compile(r"(?<![\w.~])/(?:wo" + r"rk|ro" + r"ot|tmp/" + r"w)/"),
}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".yaml", ".yml", ".cfg", ".txt", ".json", ""}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def tracked() -> list[Path]:
    """The text files of the repository; in an unpacked source distribution, all of them."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = done.stdout.split("\0") if done.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    paths = [ROOT / name for name in names if name]
    return [path for path in paths if path.suffix in TEXT_SUFFIXES and path.is_file()]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    sizes = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions(ast.parse(text))}
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_broad_excepts_stand_at_named_boundaries_only(path: Path) -> None:
    broad = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type)
    ]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in broad if not BOUNDARY.search(lines[line - 1])] == [], "the comment names the boundary"
    allowed, _ = BROAD_EXCEPTS.get(name_of(path), (0, ""))
    assert len(broad) == allowed, f"lines {broad}; a boundary that is right is named in BROAD_EXCEPTS, with its reason"


def test_every_named_boundary_exists() -> None:
    assert set(BROAD_EXCEPTS) <= {name_of(path) for path in FILES}


def _is_broad(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException")) for name in names
    )


@pytest.mark.parametrize("path", [path for path in FILES if "testing" not in path.parts], ids=name_of)
def test_no_stubs_sleeps_or_asserts_in_product_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"line {node.lineno}: {what}" for node in ast.walk(tree) if (what := _unwanted(node))]
    assert found == []


def _unwanted(node: ast.AST) -> str:
    """What must not stand in product code; empty for everything else."""
    if isinstance(node, ast.Assert):
        return "an assert as control flow"
    if isinstance(node, ast.Name) and node.id == "NotImplementedError":
        return "a stub"
    if isinstance(node, ast.Attribute) and node.attr == "sleep":
        return "a sleep"
    return ""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_attributes_are_probed_in_compat_only(path: Path) -> None:
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]
    assert calls == [] or path.name == "compat.py"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=name_of)
def test_every_test_says_what_it_expects(path: Path) -> None:
    tests = (each for each in functions(ast.parse(path.read_text(encoding="utf-8"))) if each.name.startswith("test_"))
    silent = [each.name for each in tests if not any(map(_expects, ast.walk(each)))]
    assert silent == [], "a test that only runs code passes for the wrong reasons"


def _expects(node: ast.AST) -> bool:
    """Whether something may fail here: an assert, an expected error, or a helper whose name says that it asserts."""
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Assert | ast.Raise)
    called = ast.unparse(node.func).rpartition(".")[2].lstrip("_")
    return called in ("raises", "warns", "fail", "run_state_machine_as_test") or called.startswith(("assert_", "check"))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_repository_does_not_name(what: str) -> None:
    pattern = FORBIDDEN[what]
    found = {name_of(path) for path in tracked() if pattern.search(path.read_text(encoding="utf-8", errors="replace"))}
    assert found == set()


def test_torch_index_stands_in_one_place() -> None:
    host = "download." + "pytorch.org"
    found = [name_of(path) for path in tracked() if host in path.read_text(encoding="utf-8", errors="replace")]
    assert found == ["scripts/engine_environment.py"]
