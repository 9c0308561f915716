"""Keeps the books true: which workers there are, whether they answer, what they serve, and how fast they are."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable

import aiohttp

from examples.router.books import Books, RankNodes, Worker
from examples.router.settings import RouterSettings
from examples.router.speeds import Totals, measured, totals_of
from umbp_connectors.client.reader import MasterReader
from umbp_connectors.engine_http import place_of
from umbp_connectors.prompt_hashes.requests import adapters_of
from umbp_connectors.prompt_hashes.tags import is_first_rank, tag_values
from umbp_core.errors import ConfigError
from umbp_core.master.model import NodeInfo, NodeStatus

logger = logging.getLogger(__name__)

Nodes = dict[str, dict[int, RankNodes]]
"""URL to data-parallel rank to its nodes."""

_UNHEALTHY = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)
"""What a worker that is ill, or is none, brings about."""


class Fleet:
    """Looks at the master and at the workers, again and again; one loop's thread."""

    def __init__(
        self, books: Books, http: aiohttp.ClientSession, reader: MasterReader | None, settings: RouterSettings
    ) -> None:
        self._books = books
        self._http = http
        self._reader = reader
        self._settings = settings
        self._totals: dict[str, Totals] = {}
        for url in settings.workers:
            books.add(place_of(url), listed=True)

    async def run(self) -> None:
        """Look again after every interval, until it is cancelled."""
        while True:
            await asyncio.sleep(self._settings.refresh_interval)
            await self.refresh()

    async def refresh(self) -> None:
        """One look at everything; no failure of a worker or of the master is raised."""
        await self._read_nodes()
        await asyncio.gather(*map(self._look, list(self._books)))

    async def _read_nodes(self) -> None:
        if self._reader is None:
            return
        infos = await asyncio.to_thread(self._reader.nodes, self._settings.look_timeout)
        if infos is None:
            return  # what was known goes on; questions for prefixes find out by themselves
        found = nodes_by_url(infos)
        if not self._settings.workers:
            for url in found:
                self._books.add(url)
        for worker in list(self._books):
            nodes = found.get(worker.url, {})
            self._books.seat_nodes(worker, nodes)
            if not nodes and not worker.listed and not worker.alive:
                self._books.drop(worker.url)

    async def _look(self, worker: Worker) -> None:
        try:
            await self._get(worker, "/health")
            models = adapters_of(json.loads(await self._get(worker, "/v1/models")))
        except _UNHEALTHY as error:
            if worker.alive:
                logger.warning("worker %s does not answer any more: %s", worker.url, type(error).__name__)
            worker.alive = False
            self._totals.pop(worker.url, None)
            return
        if not worker.alive:
            logger.info("worker %s serves %s", worker.url, ", ".join(models))
        worker.models, worker.alive = models, True
        try:
            await self._measure(worker)
        except _UNHEALTHY as error:
            logger.debug("worker %s has no metrics to go by: %s", worker.url, error)

    async def _measure(self, worker: Worker) -> None:
        text = (await self._get(worker, "/metrics")).decode()
        page = next((seat.tags["block"] for seat in worker.seats.values() if "block" in seat.tags), "0")
        totals = await asyncio.to_thread(totals_of, text, int(page))
        before = self._totals.get(worker.url)
        self._totals[worker.url] = totals
        if before is not None:
            self._books.speeds = measured(self._books.speeds, before, totals)
        own = sum(seat.outstanding for seat in worker.seats.values())
        worker.foreign_waiting = max(0, round(totals.waiting) - own)

    async def _get(self, worker: Worker, path: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=self._settings.look_timeout)
        headers = {"Authorization": f"Bearer {self._settings.api_key}"} if self._settings.api_key else {}
        async with self._http.get(worker.url + path, headers=headers, timeout=timeout) as response:
            response.raise_for_status()
            return await response.read()


def nodes_by_url(infos: Iterable[NodeInfo]) -> Nodes:
    """The living nodes that can serve requests.

    The first rank stands for its engine's tensor and pipeline parallel ranks.  Nodes that only prefill are not asked.
    """
    found: Nodes = {}
    others: dict[tuple[str, int], list[str]] = {}
    for info in infos:
        tags = tag_values(info.tags)
        if info.status is not NodeStatus.ALIVE or "http" not in tags or tags.get("role") == "prefill":
            continue
        try:
            url, rank = place_of(tags["http"]), int(tags.get("dp", "0"))
        except (ConfigError, ValueError):
            logger.debug("node %s has tags that name no worker: %s", info.node_id, info.tags)
            continue
        if is_first_rank(tags):
            found.setdefault(url, {})[rank] = RankNodes(info.node_id, tags)
        else:
            others.setdefault((url, rank), []).append(info.node_id)
    return {
        url: {rank: nodes._replace(others=tuple(others.get((url, rank), ()))) for rank, nodes in ranks.items()}
        for url, ranks in found.items()
    }
