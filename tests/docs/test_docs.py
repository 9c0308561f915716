"""The pages say what the code does: every hook, key, command, law and make target."""

import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest

from umbp_connectors import hookspecs
from umbp_connectors.cli import app
from umbp_connectors.config import ENV_KEYS, KEYS, UmbpConfig, resolve
from umbp_connectors.config_env import FOREIGN, OF_THE_MASTER, OURS_BUT_NO_KEY
from umbp_connectors.master import settings as master_settings
from umbp_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
SECTIONS = ("Called", "Returns", "Thread & process", "Failure")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def generator() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("gen_docs", ROOT / "scripts" / "gen_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hooks() -> list[types.FunctionType]:
    return [value for name, value in vars(hookspecs).items() if name.startswith("umbp_") and inspect.isfunction(value)]


def test_there_are_hooks_and_few_of_them() -> None:
    assert 5 <= len(hooks()) <= 12


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook.__name__)
def test_hook_is_documented_with_its_exact_arguments(hook: types.FunctionType) -> None:
    heading = f"### `{hook.__name__}({', '.join(inspect.signature(hook).parameters)})`"
    assert heading in page("hooks.md")


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook.__name__)
def test_hook_docstring_has_the_fixed_sections(hook: types.FunctionType) -> None:
    text = inspect.cleandoc(hook.__doc__ or "")
    assert re.findall(r"^([A-Z][\w& ]+): ", text, re.MULTILINE) == list(SECTIONS)


def test_no_hook_is_documented_that_does_not_exist() -> None:
    documented = set(re.findall(r"\b(umbp_(?:make|op|blocks|degraded|slot)\w*)\(", page("hooks.md")))
    assert documented == {hook.__name__ for hook in hooks()}


@pytest.mark.parametrize("key", KEYS)
def test_key_is_documented_with_its_environment_variable(key: str) -> None:
    assert f"| `{key}` | `{UmbpConfig.env_name(key)}` |" in page("configuration.md")
    assert UmbpConfig.model_fields[key].description


@pytest.mark.parametrize("command", [command.callback for command in app.registered_commands])
def test_command_is_documented(command: types.FunctionType) -> None:
    assert f"### `umbp {command.__name__}`" in page("cli.md")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert generator().rewritten(text) == text, "run: make docs"


def test_design_has_the_eleven_laws_in_order() -> None:
    assert re.findall(r"^\*\*L(\d+)", page("design.md"), re.MULTILINE) == [str(number) for number in range(1, 12)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_that_pages_name_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^    |^)make ([a-z][a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_configuration_keys_that_pages_name_exist() -> None:
    named = {
        name for path in PAGES for name in re.findall(r"\b(UMBP_[A-Z_]+)\b(?!\.)", path.read_text(encoding="utf-8"))
    }
    known = {*ENV_KEYS, *OURS_BUT_NO_KEY}
    known |= {*master_settings.ENV_KEYS, *FOREIGN, *OF_THE_MASTER, "UMBP_REDIS_SHARD_URIS", "UMBP_HEARTBEAT_TTL_SECS"}
    platform = {name for name in named if name.endswith(("_SERVICE_HOST", "_"))}
    assert named - known - platform == set()


def test_a_key_that_takes_a_size_is_documented_as_one() -> None:
    def takes_a_size(key: str) -> bool:
        try:
            return getattr(resolve({key: "1GiB"}, {}).config, key) == 1 << 30
        except ConfigError:
            return False

    kinds = dict(re.findall(r"^\| `(\w+)` \| `UMBP_\w+` \| ([^|]+) \|", page("configuration.md"), re.MULTILINE))
    assert {key for key, kind in kinds.items() if kind == "size"} == set(filter(takes_a_size, KEYS))
