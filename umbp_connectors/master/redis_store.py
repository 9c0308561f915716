"""The store of a master's nodes in Redis or Valkey: one hash, of one field per node.

Needs the extra ``redis``.  One master per namespace: what two would write is not merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from umbp_connectors.master.settings import MasterConfig
from umbp_connectors.master.stores import StoreUnavailable
from umbp_core.errors import ConfigError

if TYPE_CHECKING:
    from redis import Redis

    Connect = Callable[[], Redis]


class RedisBackend:
    """A table of nodes in the hash ``umbp:<namespace>:nodes``.

    ``connect`` makes a client that reconnects by itself and has deadlines.
    """

    name = "redis"

    def __init__(self, connect: Connect, namespace: str, where: str) -> None:
        self._connect = connect
        self._key = f"umbp:{namespace}:nodes"
        self._where = where
        self._client: Redis | None = None

    def open(self) -> Sequence[tuple[str, bytes]]:
        """Connect, and read everything."""
        from redis import RedisError

        try:
            self._client = self._connect()
            rows = self._client.hscan_iter(self._key, count=1000)
            return [(_bytes(field).decode(errors="replace"), _bytes(value)) for field, value in rows]
        except RedisError as error:
            self.close()
            raise self._unavailable(error) from error

    def write(self, words: Mapping[str, bytes | None]) -> None:
        """Apply ``words`` in one transaction."""
        from redis import RedisError

        if self._client is None:
            raise self._unavailable(ConnectionError("it is not open"))
        try:
            with self._client.pipeline(transaction=True) as pipeline:
                for node_id, word in words.items():
                    if word is None:
                        pipeline.hdel(self._key, node_id)
                    else:
                        pipeline.hset(self._key, node_id, word)
                pipeline.execute()
        except RedisError as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"the nodes cannot be kept in Redis at {self._where} ({error}); see redis_uri, or set redis_required=false"
        )


def redis_backend(config: MasterConfig) -> RedisBackend:
    """The backend that ``config`` describes.  ``ConfigError`` when the extra is missing or the URI is none."""
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise ConfigError(
            "metadata_backend is redis, but the client is not installed: pip install 'umbp-connectors[redis]'"
        ) from error
    uri = config.redis_uri
    where = uri.rpartition("@")[2]
    if uri.startswith("tcp://"):
        uri = f"redis://{uri.removeprefix('tcp://')}"
    if not uri.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError(f"redis_uri {where} is none: give tcp://, redis://, rediss:// or unix://")

    def connect() -> Redis:
        return Redis.from_url(
            uri,
            password=config.redis_password or None,
            socket_connect_timeout=config.redis_connect_timeout_ms / 1000,
            socket_timeout=config.redis_socket_timeout_ms / 1000,
            retry=Retry(NoBackoff(), 0),
        )

    try:
        connect().close()
    except ValueError as error:
        raise ConfigError(f"redis_uri {where} cannot be used: {error}") from error
    return RedisBackend(connect, config.redis_namespace, where)


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
