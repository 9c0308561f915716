"""The gate before a tier: the configured offload policies together, and what they refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.hookspecs import OffloadSpec
from umbp_connectors.plugins import PluginHost
from umbp_core.errors import StateError
from umbp_core.offload import AllOf, OffloadPolicy, OffloadRun, Presence
from umbp_core.ports import Clock
from umbp_core.tiers import Tier

Refused = Callable[[str, int], None]
"""Takes the name of a policy and how many blocks it refused."""


class OffloadGate:
    """Asks the policies of one edge between tiers.  One thread at a time."""

    def __init__(self, policy: OffloadPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock

    def admit(self, keys: Sequence[bytes], priorities: Sequence[int] = ()) -> Sequence[bool]:
        """For each of ``keys``, in the order of their chain, whether it may go; see ``OffloadRun``."""
        return self._policy.admit(OffloadRun(keys, priorities), self._clock())


class _Guarded:
    """A policy that may be a plug-in's: what goes wrong in it admits everything and stays here."""

    def __init__(self, name: str, policy: OffloadPolicy, host: PluginHost) -> None:
        self._name = name
        self._policy = policy
        self._host = host

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
            self._host.offload_policy_failed(self._name, error)
            return [True] * len(run.keys)


def policy_names(config: UmbpConfig, target: Tier) -> tuple[str, ...]:
    """The names that the configuration gives for what goes to ``target``."""
    return config.ssd_offload_policy if target is Tier.SSD else config.dram_offload_policy


def check_offload_policies(host: PluginHost) -> None:
    """Raises ``ConfigError`` when somebody configured a policy that nobody offers."""
    for source, target in ((Tier.HBM, Tier.DRAM), (Tier.DRAM, Tier.SSD)):
        for name in policy_names(host.config, target):
            host.make_offload_policy(name, OffloadSpec(source, target, lambda keys: [False] * len(keys)))


def make_offload_gate(host: PluginHost, spec: OffloadSpec, clock: Clock, refused: Refused) -> OffloadGate | None:
    """The gate before ``spec.target``, with fresh policies; ``None`` where it would only ask for presence.

    Whoever copies blocks leaves out what is present in any case, so there is nothing to ask.
    Raises ``ConfigError`` when nobody offers a policy of the configured name.
    """
    policies = {name: host.make_offload_policy(name, spec) for name in policy_names(host.config, spec.target)}
    if all(type(policy) is Presence for policy in policies.values()):
        return None
    guarded = {name: _Guarded(name, policy, host) for name, policy in policies.items()}
    return OffloadGate(AllOf(guarded, refused), clock)
