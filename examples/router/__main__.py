"""The command line of the router: ``python -m examples.router``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, replace

from examples.router.app import running
from examples.router.costs import Speeds
from examples.router.settings import Policy, RouterSettings
from umbp_connectors.client.dial import Dialer
from umbp_connectors.client.reader import MasterReader
from umbp_core.errors import ConfigError, UmbpError
from umbp_core.tiers import Tier


def parse(arguments: Sequence[str]) -> RouterSettings:
    """The settings that a command line names.  Raises ``ConfigError``."""
    defaults = RouterSettings()
    parser = argparse.ArgumentParser(prog="python -m examples.router", description=sys.modules[__name__].__doc__)
    parser.add_argument("--host", default=defaults.host)
    parser.add_argument("--port", type=int, default=defaults.port, help="0: a free one")
    parser.add_argument("--worker", action="append", default=[], metavar="URL", help="may be given several times")
    parser.add_argument(
        "--master",
        default=os.environ.get("UMBP_MASTER_ADDRESS", ""),
        metavar="ADDRESS",
        help="as for `umbp nodes`; its token comes from UMBP_MASTER_TOKEN",
    )
    parser.add_argument("--policy", choices=[each.value for each in Policy], default=defaults.policy.value)
    parser.add_argument(
        "--seconds-per-token",
        action="append",
        default=[],
        metavar="KIND=SECONDS",
        help="what is assumed until it is measured: prefill, dram, ssd, remote, stream",
    )
    for field in fields(RouterSettings):
        if field.name.endswith(("_timeout", "_interval")) or field.name == "attempts":
            default = getattr(defaults, field.name)
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=type(default), default=default, help=f"default {default:g}")
    given = vars(parser.parse_args(arguments))
    speeds = _speeds(given.pop("seconds_per_token"))
    workers, policy = tuple(given.pop("worker")), Policy(given.pop("policy"))
    if not workers and not given["master"]:
        raise ConfigError("neither workers nor a master; give --worker URL, --master ADDRESS or both")
    return RouterSettings(
        **given,
        workers=workers,
        policy=policy,
        speeds=speeds,
        hash_seed=os.environ.get("PYTHONHASHSEED"),
        api_key=os.environ.get("OPENAI_API_KEY", ""),
    )


def _speeds(pairs: Sequence[str]) -> Speeds:
    speeds = Speeds()
    tiers = dict(speeds.tiers)
    for pair in pairs:
        kind, _, text = pair.partition("=")
        try:
            seconds = float(text)
        except ValueError:
            raise ConfigError(
                f"--seconds-per-token {pair!r} has no number; give KIND=SECONDS, such as ssd=5e-5"
            ) from None
        if kind == "prefill":
            speeds = replace(speeds, prefill=seconds)
        elif kind == "remote":
            speeds = replace(speeds, remote=seconds)
        elif kind == "stream":
            speeds = replace(speeds, stream=seconds)
        elif kind.upper() in Tier.__members__:
            tiers[Tier[kind.upper()]] = seconds
        else:
            raise ConfigError(
                f"--seconds-per-token {pair!r} is of no known kind; there are prefill, dram, ssd, remote, stream"
            )
    return replace(speeds, tiers=tiers)


async def serve(settings: RouterSettings) -> None:
    """Until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    token = os.environ.get("UMBP_MASTER_TOKEN", "")
    reader = MasterReader(settings.master, dial=Dialer(token, role="router")) if settings.master else None
    async with running(settings, reader) as router:
        print(f"router ready: http://{settings.host}:{router.port}", flush=True)
        await ended.wait()


def main() -> None:
    """An error of ours is one sentence and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(parse(sys.argv[1:])))
    except UmbpError as error:
        print(f"router: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
