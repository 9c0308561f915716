"""The plug-in host: loads plug-ins, asks them for parts, tells them what happened, and survives them."""

from __future__ import annotations

import difflib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

from umbp_connectors import builtin, hookspecs
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.offload import GateMaker, OffloadGate, Refused
from umbp_connectors.tier_ports import DramTier, PoolClient, SsdTier
from umbp_core.errors import ConfigError, StateError, UmbpError
from umbp_core.eviction import POLICIES, EvictionPolicy
from umbp_core.offload import AllOf, OffloadPolicy, OffloadRun, Presence
from umbp_core.ports import Clock
from umbp_core.scheduler import Limits, TransferScheduler
from umbp_core.tiers import Tier

__all__ = ["ENTRY_POINT_GROUP", "PluginHost", "create_manager"]

ENTRY_POINT_GROUP = "umbp"
BUILTIN = "builtin"
_OFFLOAD_EDGES = ((Tier.HBM, Tier.DRAM), (Tier.DRAM, Tier.SSD))

_log = logging.getLogger(__name__)


def create_manager(config: UmbpConfig, entries: Iterable[EntryPoint] | None = None) -> PluginHost:
    """A host with the built-in parts and the plug-ins of this environment that ``config.plugins`` admits.

    ``entries`` replaces the installed entry points of the group ``umbp``.  A plug-in that cannot be loaded
    is left out, with one warning; this never raises because of a plug-in.
    """
    host = PluginHost(config)
    host.register(builtin, BUILTIN)
    found = {entry.name: entry for entry in (entry_points(group=ENTRY_POINT_GROUP) if entries is None else entries)}
    for name in config.plugins:
        if name not in found and name != BUILTIN:
            near = difflib.get_close_matches(name, found, n=1)
            _log.warning(
                "umbp: the key plugins admits %r, which is not installed%s",
                name,
                f"; did you mean {near[0]!r}?" if near else "",
            )
    for name, entry in found.items():
        if not config.plugins or name in config.plugins:
            host.load(name, entry)
    return host


class PluginHost:
    """Asks plug-ins for parts, and tells them what happened.

    The ``make_*`` methods ask in the order last registered first, the built-in parts last, and return the
    first answer.  The observer methods are those of :class:`umbp_core.ports.PoolObserver` and never raise.
    Any thread may call any method.
    """

    def __init__(self, config: UmbpConfig) -> None:
        self.config = config
        self._manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
        self._manager.add_hookspecs(hookspecs)
        self._hook = self._manager.hook
        self._lock = threading.Lock()
        self._failures: Counter[tuple[str, str]] = Counter()

    @property
    def names(self) -> list[str]:
        """The registered plug-ins in the order of registration."""
        return [name for name, _ in self._manager.list_name_plugin()]

    @property
    def failures(self) -> Mapping[tuple[str, str], int]:
        """How often each (plug-in, hook) has raised; ``load`` stands for the loading itself."""
        with self._lock:
            return dict(self._failures)

    def load(self, name: str, entry: EntryPoint) -> bool:
        """Import and register one entry point; ``False``, with one warning, when that fails."""
        try:
            self.register(entry.load(), name)
        except Exception as error:  # noqa: BLE001 - hook call site: a plug-in's import may raise anything
            self._failed(name, "load", error)
            return False
        return True

    def register(self, plugin: object, name: str) -> None:
        """Add ``plugin`` under ``name``.

        Raises ``ValueError`` when the name is taken, and pluggy's ``PluginValidationError`` when the plug-in
        implements a hook that does not exist, asks for an argument that its hook does not have, or
        wraps hooks, which this project does not allow: a wrapper decides over other plug-ins' failures.
        """
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            if any(impl.wrapper or impl.hookwrapper for impl in self._implementations_of(plugin)):
                raise pluggy.PluginValidationError(plugin, f"plug-in {name!r}: hook wrappers are not allowed here")
        except pluggy.PluginValidationError:
            if self._manager.is_registered(plugin):  # whether it is depends on what was wrong, and on pluggy's version
                self._manager.unregister(plugin)
            raise

    def make_dram_tier(self, spec: hookspecs.DramTierSpec) -> DramTier:
        """The memory behind the DRAM tier of one rank, open.  Raises ``UmbpError``."""
        return cast(DramTier, self._first(self._hook.umbp_make_tier, "a DRAM tier", config=self.config, spec=spec))

    def make_ssd_tier(self, spec: hookspecs.SsdTierSpec) -> SsdTier:
        """The file behind the SSD tier of one rank, open.  Raises ``UmbpError``."""
        return cast(SsdTier, self._first(self._hook.umbp_make_tier, "an SSD tier", config=self.config, spec=spec))

    def make_client(self, spec: hookspecs.ClientSpec) -> PoolClient:
        """A client of the pool, open.  Raises ``UmbpError``."""
        what = f"a client for mode {self.config.mode!r}"
        spec = replace(
            spec,
            make_eviction=self.eviction_maker(),
            make_ssd=self.make_ssd_tier,
            make_ssd_gate=self.ssd_gate_maker(),
        )
        return cast(PoolClient, self._first(self._hook.umbp_make_client, what, config=self.config, spec=spec))

    def make_eviction(self, name: str) -> EvictionPolicy:
        """A fresh eviction policy called ``name``.  Raises ``ConfigError`` when nobody offers it."""
        what = f"the eviction_policy {name!r} (built in: {', '.join(POLICIES)})"
        policy = self._first(self._hook.umbp_make_eviction, what, config=self.config, name=name)
        return cast(EvictionPolicy, policy)

    def eviction_maker(self) -> Callable[[], EvictionPolicy]:
        """Makes fresh policies of the configured name.  Raises ``ConfigError``, here and now, when nobody offers it."""
        name = self.config.eviction_policy
        self.make_eviction(name)
        return lambda: self.make_eviction(name)

    def make_offload_policy(self, name: str, spec: hookspecs.OffloadSpec) -> OffloadPolicy:
        """A fresh offload policy called ``name``.  Raises ``ConfigError`` when nobody offers it."""
        what = f"the offload policy {name!r} (built in: all, presence, frequency, priority)"
        hook = self._hook.umbp_make_offload_policy
        return cast(OffloadPolicy, self._first(hook, what, config=self.config, name=name, spec=spec))

    def check_offload_policies(self) -> None:
        """Raises ``ConfigError`` when a policy is configured that nobody offers."""
        for source, target in _OFFLOAD_EDGES:
            for name in self._offload_policies(target):
                self.make_offload_policy(name, hookspecs.OffloadSpec(source, target, lambda keys: [False] * len(keys)))

    def make_offload_gate(self, spec: hookspecs.OffloadSpec, clock: Clock, refused: Refused) -> OffloadGate | None:
        """The gate before ``spec.target``, with fresh policies; ``None`` where it would only ask for presence.

        Whoever copies blocks leaves out what is present in any case, so there is nothing to ask.
        Raises ``ConfigError`` when nobody offers a policy of the configured name.
        """
        policies = {name: self.make_offload_policy(name, spec) for name in self._offload_policies(spec.target)}
        if all(type(policy) is Presence for policy in policies.values()):
            return None
        guarded = {name: _Guarded(name, policy, self._failed) for name, policy in policies.items()}
        return OffloadGate(AllOf(guarded, refused), clock)

    def ssd_gate_maker(self) -> GateMaker:
        """Makes the gates before SSD of pools that do not know whose blocks they hold.

        Raises ``ConfigError``, here and now, when nobody offers a configured policy, and for ``priority``: there is
        none that it could ask for.
        """
        self.check_offload_policies()
        if "priority" in self.config.ssd_offload_policy:
            raise ConfigError(
                "ssd_offload_policy names 'priority', but only vLLM's leader knows a request's priority; leave it out"
            )
        return lambda present, clock, refused: self.make_offload_gate(
            hookspecs.OffloadSpec(Tier.DRAM, Tier.SSD, present), clock, refused
        )

    def _offload_policies(self, target: Tier) -> tuple[str, ...]:
        return self.config.ssd_offload_policy if target is Tier.SSD else self.config.dram_offload_policy

    def make_scheduler(self, limits: Limits) -> TransferScheduler:
        """The scheduler of one rank's transfers.  Raises ``UmbpError``."""
        made = self._first(self._hook.umbp_make_scheduler, "a transfer scheduler", config=self.config, limits=limits)
        return cast(TransferScheduler, made)

    def op_finished(self, direction: str, status: str, nbytes: int, seconds: float, reason: str) -> None:
        """Tell that an op has ended on this rank."""
        self._tell(
            self._hook.umbp_op_finished,
            direction=direction,
            status=status,
            nbytes=nbytes,
            seconds=seconds,
            reason=reason,
        )

    def blocks_changed(self, added: Sequence[bytes], removed: Sequence[bytes], tier: Tier) -> None:
        """Tell what became, and what stopped being, readable in ``tier``."""
        if removed:
            self._tell(self._hook.umbp_blocks_revoked, tier=tier, keys=removed)
        if added:
            self._tell(self._hook.umbp_blocks_reported, tier=tier, keys=added)

    def degraded(self, what: str, reason: str) -> None:
        """Tell that a part of the pool is not used any more."""
        self._tell(self._hook.umbp_degraded, what=what, reason=reason)

    def _first(self, hook: pluggy.HookCaller, what: str, **arguments: object) -> object:
        for impl in reversed(hook.get_hookimpls()):  # in the order in which pluggy asks
            try:
                made = _call(impl, arguments)
            except UmbpError:
                raise
            except Exception as error:  # noqa: BLE001 - hook call site: a plug-in may raise anything
                self._failed(impl.plugin_name, hook.name, error)
                continue
            if made is not None:
                return made
        raise ConfigError(f"no plug-in offers {what}; loaded are {', '.join(self.names)}")

    def _tell(self, hook: pluggy.HookCaller, **arguments: object) -> None:
        for impl in reversed(hook.get_hookimpls()):  # in the order in which pluggy asks
            try:
                _call(impl, arguments)
            except Exception as error:  # noqa: BLE001 - hook call site: a plug-in may raise anything
                self._failed(impl.plugin_name, hook.name, error)

    def _implementations_of(self, plugin: object) -> list[pluggy.HookImpl]:
        callers = self._manager.get_hookcallers(plugin) or []
        return [impl for caller in callers for impl in caller.get_hookimpls() if impl.plugin is plugin]

    def _failed(self, plugin: str, hook: str, error: Exception) -> None:
        with self._lock:
            self._failures[plugin, hook] += 1
            first = self._failures[plugin, hook] == 1
        if first:
            _log.warning(
                "umbp: plug-in %r failed in %s and goes on being asked; further failures are only counted",
                plugin,
                hook,
                exc_info=error,
            )


class _Guarded:
    """An offload policy that may be a plug-in's: what goes wrong in it admits everything and stays here."""

    def __init__(self, name: str, policy: OffloadPolicy, failed: Callable[[str, str, Exception], None]) -> None:
        self._name = name
        self._policy = policy
        self._failed = failed

    def admit(self, run: OffloadRun, now: float) -> Sequence[bool]:
        """The policy's answers."""
        try:
            answers = self._policy.admit(run, now)
            if len(answers) == len(run.keys):
                return answers
            raise StateError(
                f"offload policy {self._name!r} gave {len(answers)} answers for {len(run.keys)} blocks; it must give "
                "one for each"
            )
        except Exception as error:  # noqa: BLE001 - hook call site: a plug-in may raise anything
            self._failed(f"offload policy {self._name}", "admit", error)
            return [True] * len(run.keys)


def _call(impl: pluggy.HookImpl, arguments: Mapping[str, object]) -> object:
    function = cast("Callable[..., Any]", impl.function)
    return function(*(arguments[name] for name in impl.argnames))
