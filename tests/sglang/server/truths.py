"""What a served SGLang really holds, asked through the door of ``truth/umbp_truth``, in the words of a master."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.connectors.reporting.at_master import Held
from umbp_connectors.prompt_hashes.hasher import Namespace, PromptHasher
from umbp_core.tiers import Tier

PLUGIN = Path(__file__).parent / "truth"
PATIENCE = 200.0


@dataclass(frozen=True)
class Document:
    """Tokens that a request brought or computed, and what keeps them apart from the same tokens of others."""

    tokens: tuple[int, ...]
    cache_salt: str | None = None
    extra_key: str | None = None

    def fields(self) -> dict[str, str]:
        """What goes into a request."""
        given = {"cache_salt": self.cache_salt, "extra_key": self.extra_key}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Truth:
    """The ids of the pages in L1, in L2, and on each tier of L3."""

    device: set[bytes] = field(default_factory=set)
    host: set[bytes] = field(default_factory=set)
    pool: dict[str, set[bytes]] = field(default_factory=dict)
    undescribed: dict[str, set[bytes]] = field(default_factory=dict)
    """The same tiers of L3, by what the storage calls its pages: so they are told until a request names them."""

    def held(self) -> Held:
        """What a master should know: L2 and the DRAM of L3 are both DRAM of one node."""
        tiers = {
            Tier.HBM.value: self.device,
            Tier.DRAM.value: self.host | self.pool.get("DRAM", set()),
            Tier.SSD.value: self.pool.get("SSD", set()),
        }
        return {tier: pages for tier, pages in tiers.items() if pages}


def environment(folder: Path) -> dict[str, str]:
    """What a server is started with to have the door; ``folder`` is to be a short path, as sockets want it."""
    paths = os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    return {"ENGINE_TRUTH": str(folder), "PYTHONPATH": paths}


def ask(folder: Path, documents: Sequence[Document], hasher: PromptHasher, rank: int = 0) -> Truth:
    """What the rank holds when nothing is under way; whatever it holds has to be of ``documents``."""
    question = [(each.tokens, each.extra_key, each.cache_salt) for each in documents]
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(PATIENCE)
        asker.connect(str(folder / f"tp{rank}"))
        asker.sendall(json.dumps(question).encode() + b"\n")
        with asker.makefile("rb") as lines:
            return _read(json.loads(lines.readline()), documents, hasher)


def _read(answer: Mapping[str, Any], documents: Sequence[Document], hasher: PromptHasher) -> Truth:
    truth, names = Truth(), dict[str, bytes]()
    for document, spans, stored in zip(documents, answer["spans"], answer["stored"], strict=True):
        ids = hasher.hashes(document.tokens, Namespace(document.cache_salt or ""))
        names.update(zip(stored, ids, strict=True))
        for begin, end, on_device, on_host in spans:
            truth.device |= set(ids[begin:end] if on_device else ())
            truth.host |= set(ids[begin:end] if on_host else ())
    truth.pool = {tier: {names[key] for key in keys} for tier, keys in answer["pool"].items()}
    truth.undescribed = {tier: set(map(storage_name, keys)) for tier, keys in answer["pool"].items()}
    for level in ("device", "host"):
        found, there = answer[level]
        assert found == there, f"{there} pages on the {level}, of which the documents lead to {found}"
    return truth


def storage_name(key: str) -> bytes:
    """What a page is told as that is in L3 and that no request has named: the number in its storage hash."""
    return b"%d" % int.from_bytes(bytes.fromhex(key)[:8], "big", signed=True)


@contextmanager
def doors() -> Iterator[Path]:
    """A folder for the doors of one server after the other."""
    folder = Path(tempfile.mkdtemp(prefix="truth-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
