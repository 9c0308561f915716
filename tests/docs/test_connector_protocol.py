"""``docs/connector-protocol.md`` says what the tables of a slot permit, and names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from umbp_connectors.debug import door
from umbp_core import ops
from umbp_core.scheduler import Phase, TransferScheduler
from umbp_core.slot_table import LIFE, Life, LifeEvent

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "connector-protocol.md").read_text(encoding="utf-8")
OF_THE_ADAPTER = {"StepMetadata", "WorkerReport"}


def permits() -> dict[Life, tuple[str, ...]]:
    """What the page says that each state permits: load, store, scheduling."""
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| (.+) \| (\w+) \| (\w+) \|$", PAGE, re.MULTILINE)
    return {Life[name]: tuple(cells) for names, *cells in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("life", Life)
def test_what_a_state_permits(life: Life) -> None:
    events = set(LIFE[life])
    load = "no"
    if LifeEvent.BEGIN_ONBOARD in events:
        load = "may begin" if LifeEvent.UNSTAGE in events else "another op of the same match"
    elif LifeEvent.STAGE in events:
        load = "may be matched"
    store = "yes" if LifeEvent.BEGIN_STORE in events else "no"
    scheduled = "yes" if {LifeEvent.PREFILL, LifeEvent.DECODE} <= events else "no"
    assert permits()[life] == (load, store, scheduled)


def test_every_message_and_phase_of_the_page_exists() -> None:
    messages = set(re.findall(r"^\| [a-z' ]+ \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert len(messages) == 8
    metadata = (ROOT / "vllm_plugin" / "umbp_vllm" / "metadata.py").read_text(encoding="utf-8")
    assert {name for name in messages if name not in vars(ops) and f"class {name}(" not in metadata} == set()
    cancellation = PAGE.partition("## Cancellation")[2].partition("## Looking")[0]
    phases = set(re.findall(r"`([A-Z]+)`", cancellation)) - {status.name for status in ops.OpStatus}
    assert phases == {phase.name for phase in Phase} - {"ENDED"}
    assert TransferScheduler.commit.__doc__ is not None
    assert "commitment point" in TransferScheduler.commit.__doc__


def test_the_doors_folder_is_the_one_of_the_page() -> None:
    assert f"`{door.folder_of(0).name.replace('0', 'UID')}`" in PAGE
