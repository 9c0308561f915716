"""A plain model of a store with one side pool: what must be there when there is room for everything."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Staged:
    """Side pages of one call that wait for KV pages."""

    pages: dict[str, bytes]
    anchors: set[str]


@dataclass
class Model:
    """The first content of each page since the last clear, by pool; and every content that a page may ever have."""

    kv: dict[str, bytes] = field(default_factory=dict)
    side: dict[str, bytes] = field(default_factory=dict)
    waiting: list[Staged] = field(default_factory=list)
    settled: bool = False
    seen: set[tuple[str, str, bytes]] = field(default_factory=set)

    def put(self, pages: dict[str, bytes]) -> None:
        """KV pages, and the side pages that waited for them."""
        self.settled = True
        self.seen |= {("kv", key, content) for key, content in pages.items()}
        for key, content in pages.items():
            self.kv.setdefault(key, content)
        for staged in self.waiting:
            staged.anchors -= pages.keys()
            if not staged.anchors:
                self.side.update(staged.pages)
        self.waiting = [staged for staged in self.waiting if staged.anchors]

    def put_beside(self, pages: dict[str, bytes]) -> None:
        """Side pages of a node; those of a node whose KV pages came already are given up."""
        if self.settled:
            self.waiting, self.settled = [], False
        self.seen |= {("swa", key, content) for key, content in pages.items()}
        taken = self.side.keys() | {key for staged in self.waiting for key in staged.pages}
        own = {key: content for key, content in pages.items() if key not in taken}
        anchors = pages.keys() - self.kv.keys()
        if anchors:
            self.waiting.append(Staged(own, anchors))
        else:
            self.side.update(own)

    def prefix(self, chain: list[str]) -> int:
        return next((i for i, key in enumerate(chain) if key not in self.kv), len(chain))

    def ends(self, chain: list[str], tail: int) -> list[int]:
        """The prefixes whose last ``tail`` pages have side pages."""
        return [
            end
            for end in range(1, self.prefix(chain) + 1)
            if all(key in self.side for key in chain[max(0, end - tail) : end])
        ]

    def clear(self) -> None:
        """Nothing may come back; a restart without an SSD tier does the same."""
        self.kv.clear()
        self.side.clear()
        self.seen.clear()
        self.end()

    def end(self) -> None:
        """What the end of a store does to what waits."""
        self.waiting.clear()
        self.settled = False
