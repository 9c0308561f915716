"""What lands in a user's environment."""

import configparser
import email
import importlib
import re
import zipfile
from email.message import Message

import pytest

from umbp_connectors import __version__
from umbp_connectors.doctor.engines import ENTRY_POINTS

PACKAGES = {"umbp_connectors", "umbp_core", "umbp_vllm", "umbp_sglang"}
ENGINES = re.compile(r"torch|vllm|sglang|cuda|nvidia|grpc|triton|transformers|ray", re.IGNORECASE)


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


@pytest.fixture
def entry_points(wheel: zipfile.ZipFile) -> configparser.ConfigParser:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(wheel.read(name).decode())
    return parser


def test_top_level_names_are_exactly_the_four_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_is_typed_and_has_an_init(wheel: zipfile.ZipFile, package: str) -> None:
    assert {f"{package}/py.typed", f"{package}/__init__.py"} <= set(wheel.namelist())


def test_nothing_but_code_and_the_old_wire_is_shipped(wheel: zipfile.ZipFile) -> None:
    shipped = [name for name in wheel.namelist() if ".dist-info/" not in name]
    others = {name for name in shipped if not name.endswith((".py", "py.typed"))}
    assert others == {f"umbp_connectors/master/proto/{name}.proto" for name in ("umbp", "umbp_peer")}


def test_licence_is_shipped(wheel: zipfile.ZipFile, metadata: Message) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    assert b"Version 2.0" in wheel.read(name)
    assert metadata["License-Expression"] == "Apache-2.0"


def test_entry_points(entry_points: configparser.ConfigParser) -> None:
    found = {group: dict(entry_points[group]) for group in entry_points.sections()}
    expected = {group: {"umbp": value} for group, value in ENTRY_POINTS.items()}
    scripts = {"umbp": "umbp_connectors.cli:main", "umbp-master": "umbp_connectors.cli_master:main"}
    assert found == expected | {"console_scripts": scripts}


def test_entry_points_without_an_engine_lead_to_functions(entry_points: configparser.ConfigParser) -> None:
    for group in entry_points.sections():
        for target in entry_points[group].values():
            module, _, name = target.partition(":")
            assert callable(vars(importlib.import_module(module))[name])


def test_base_install_pulls_neither_an_engine_nor_torch(metadata: Message) -> None:
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in base}
    assert not [name for name in names if ENGINES.search(name)]
    assert names == {
        "msgspec",
        "numpy",
        "pluggy",
        "prometheus-client",
        "pydantic",
        "rich",
        "tomli",
        "typer",
        "xxhash",
    }


def test_base_dependencies_are_those_that_the_code_imports(metadata: Message, wheel: zipfile.ZipFile) -> None:
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    sources = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")]
    names = {re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in base}
    unused = {
        name for name in names if not any(re.search(rf"^\s*(import|from) {name}\b", s, re.MULTILINE) for s in sources)
    }
    assert unused == set()


def test_dependencies_have_floors_and_no_upper_pins(metadata: Message) -> None:
    """Except for the extra ``dev``, which nobody installs beside an engine: there, linters are pinned."""
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra == 'dev'" not in line]
    lines = [line.partition(";")[0] for line in required]
    ours = [line for line in lines if not line.startswith("umbp-connectors")]
    assert [line for line in ours if re.search(r"<|==|~=", line)] == []
    assert [line for line in ours if ">=" not in line] == []


def test_version_and_pythons(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"vllm", "sglang", "dev", "test"} <= set(metadata.get_all("Provides-Extra", []))
