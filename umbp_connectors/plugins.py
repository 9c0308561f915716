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
from umbp_connectors.tier_ports import DramTier, PoolClient, SsdTier
from umbp_core.errors import ConfigError, UmbpError
from umbp_core.eviction import POLICIES, EvictionPolicy
from umbp_core.offload import OffloadPolicy
from umbp_core.scheduler import Limits, TransferScheduler
from umbp_core.tiers import Tier

__all__ = ["ENTRY_POINT_GROUP", "PluginHost", "create_manager"]

ENTRY_POINT_GROUP = "umbp"
BUILTIN = "builtin"

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
        spec = replace(spec, make_eviction=self.eviction_maker(), make_ssd=self.make_ssd_tier)
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

    def offload_policy_failed(self, name: str, error: Exception) -> None:
        """Note that the policy ``name`` raised ``error``."""
        self._failed(f"offload policy {name}", "admit", error)

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


def _call(impl: pluggy.HookImpl, arguments: Mapping[str, object]) -> object:
    function = cast("Callable[..., Any]", impl.function)
    return function(*(arguments[name] for name in impl.argnames))
