"""Hypothesis machines of the directory's parts: pages, leases and eviction policies, each beside its plain model.

``EvictionPolicyMachine`` takes any policy: override ``new_policy`` and ``new_model``.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from umbp_core.errors import StateError, UnknownOwner
from umbp_core.eviction import EvictionPolicy, LruPolicy
from umbp_core.leases import LeaseTable
from umbp_core.pages import PageAllocator
from umbp_core.testing.models_directory import LeaseModel, LruModel, PageModel

KEYS = tuple(bytes([letter]) * 4 for letter in b"abcdef")
OWNERS = ("op-1", "op-2", "op-3")
PAGE_BYTES = 100

keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, max_size=6)
owners = st.sampled_from(OWNERS)
depths = st.integers(0, 4)
seconds = st.integers(0, 20).map(float)
short_waits = st.integers(0, 5).map(float)


def refused(error: type[Exception], call: Callable[..., object], *arguments: object) -> bool:
    """Whether ``call`` raises ``error``; anything else that it raises goes on."""
    try:
        call(*arguments)
    except error:
        return True
    return False


class PageMachine(RuleBasedStateMachine):
    """``PageAllocator`` over a few small buffers."""

    buffer_bytes = (450, 0, 90, 300, 700)

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGE_BYTES, self.buffer_bytes)
        self.model = PageModel(PAGE_BYTES, self.buffer_bytes)

    @rule(nbytes=st.integers(1, 16 * PAGE_BYTES))
    def allocate(self, nbytes: int) -> None:
        """All or nothing, free pages only, in the best shape there is."""
        count = self.model.pages_for(nbytes)
        shape = self.model.expected_shape(count)
        pages = self.allocator.allocate(nbytes)
        if shape is None:
            assert pages is None
            return
        assert pages is not None
        assert len(pages) == count
        assert self.model.can_claim(pages)
        assert self.model.shape_of(pages) == shape
        self.model.used |= set(pages)

    @rule(pages=st.lists(st.integers(-3, 20), max_size=8))
    def free(self, pages: list[int]) -> None:
        """Counts what was used; the rest is left alone."""
        assert self.allocator.free(pages) == self.model.free(pages)

    @rule(pages=st.lists(st.integers(-1, 16), max_size=4))
    def claim(self, pages: list[int]) -> None:
        """Takes exactly these pages, or none."""
        if self.model.can_claim(pages):
            self.allocator.claim(pages)
            self.model.used |= set(pages)
        else:
            assert refused(StateError, self.allocator.claim, pages)

    @invariant()
    def counts_agree(self) -> None:
        """No page is lost or counted twice."""
        assert self.allocator.total_pages == self.model.total
        assert self.allocator.free_pages == self.model.total - len(self.model.used)


class LeaseMachine(RuleBasedStateMachine):
    """``LeaseTable`` under a clock that jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.model = LeaseModel()
        self.now = 0.0

    @rule(owner=owners, granted=key_lists, wait=seconds)
    def grant(self, owner: str, granted: list[bytes], wait: float) -> None:
        """Keys add up, the later deadline counts."""
        self.table.grant(owner, granted, self.now + wait)
        self.model.grant(owner, granted, self.now + wait)

    @rule(owner=owners, wait=seconds)
    def renew(self, owner: str, wait: float) -> None:
        """Only what is still held can be renewed."""
        held = self.model.renew(owner, self.now + wait)
        assert refused(UnknownOwner, self.table.renew, owner, self.now + wait) is not held

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        """Gives the owner's keys, once."""
        assert self.table.release(owner) == self.model.release(owner)

    @rule(wait=short_waits)
    def expire(self, wait: float) -> None:
        """Ends exactly what is due."""
        self.now += wait
        assert self.table.expire(self.now) == self.model.expire(self.now)

    @invariant()
    def protection_agrees(self) -> None:
        """A key is protected while any owner has it."""
        assert len(self.table) == len(self.model.deadlines)
        assert [self.table.is_leased(key) for key in KEYS] == [self.model.is_leased(key) for key in KEYS]


class EvictionPolicyMachine(RuleBasedStateMachine):
    """Any eviction policy; without a model of your own, only the promises of every policy are checked."""

    def new_policy(self) -> EvictionPolicy:
        """The policy under test."""
        return LruPolicy()

    def new_model(self) -> EvictionPolicy | None:
        """A plain policy with the same order, or ``None``."""
        return LruModel()

    def __init__(self) -> None:
        super().__init__()
        self.policy = self.new_policy()
        self.model = self.new_model()
        self.tracked: set[bytes] = set()

    def _each(self) -> list[EvictionPolicy]:
        return [policy for policy in (self.policy, self.model) if policy is not None]

    @rule(key=keys, depth=depths)
    def added(self, key: bytes, depth: int) -> None:
        """A new key, or a known one again."""
        for policy in self._each():
            policy.added(key, depth)
        self.tracked.add(key)

    @rule(key=keys)
    def touched(self, key: bytes) -> None:
        """Any key, known or not."""
        for policy in self._each():
            policy.touched(key)

    @rule(key=keys)
    def removed(self, key: bytes) -> None:
        """Any key, known or not."""
        for policy in self._each():
            policy.removed(key)
        self.tracked.discard(key)

    @invariant()
    def every_key_once(self) -> None:
        """Victims are the known keys, each once, in the model's order."""
        victims = list(self.policy.victims())
        assert sorted(victims) == sorted(self.tracked)
        if self.model is not None:
            assert victims == list(self.model.victims())
