"""A publisher as the engines have it, which loses, forgets and dies when it is told to."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

END = b"\xff" * 8


def stored(*hashes: int | bytes, medium: str | None = "GPU", **fields: Any) -> dict[str, Any]:
    """An event as today's engines write it."""
    told = {"type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": None, "token_ids": [1, 2, 3]}
    return told | {"block_size": 4, "lora_id": None, "medium": medium, "lora_name": None} | fields


def removed(*hashes: int | bytes, medium: str | None = "GPU", **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium} | fields


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any, at: float | None = None) -> bytes:
    return msgspec.msgpack.encode([time.time() if at is None else at, list(events), 0])


class Publisher:
    """PUB and, unless ``replays`` is false, ROUTER on ports of this machine.  A thread answers for replays.

    ``answer`` may do what it likes with the batches of a replay before they are sent.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        replay: str = "tcp://127.0.0.1:*",
        *,
        keeps: int = 10_000,
        replays: bool = True,
        connect: bool = False,
        topic: bytes = b"",
        answer: Callable[[Sequence[tuple[int, bytes]]], Sequence[tuple[int, bytes]] | None] | None = None,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.setsockopt(zmq.LINGER, 0)
        (self._pub.connect if connect else self._pub.bind)(endpoint)
        self.endpoint = self._pub.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0")
        self._topic = topic
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keeps)
        self._lock = threading.Lock()
        self._answer = answer or (lambda batches: batches)
        self._stopping = threading.Event()
        self.number = 0
        self.asked: list[int] = []
        self.replay = ""
        self._thread: threading.Thread | None = None
        if replays:
            router = self._context.socket(zmq.ROUTER)
            router.setsockopt(zmq.LINGER, 0)
            router.bind(replay)
            self.replay = router.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0")
            self._thread = threading.Thread(target=self._serve, args=(router,), name="replays")
            self._thread.start()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(self, *events: Any, lost: bool = False, raw: bytes | None = None) -> int:
        """Publish one batch, which subscribers do not see when it is ``lost``; returns its number."""
        payload = batch(*events) if raw is None else raw
        with self._lock:
            number, self.number = self.number, self.number + 1
            self._kept.append((number, payload))
        if not lost:
            self._pub.send_multipart([self._topic, number.to_bytes(8, "big"), payload])
        return number

    def send(self, *frames: bytes) -> None:
        """Anything."""
        self._pub.send_multipart(frames)

    def close(self) -> None:
        """End as a process does that is killed.  Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(60)
            self._thread = None
        self._pub.close(linger=0)
        self._context.destroy(linger=0)

    def _serve(self, router: zmq.Socket[bytes]) -> None:
        while not self._stopping.is_set():
            if not router.poll(20):
                continue
            peer, _, start = router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            with self._lock:
                wanted = [each for each in self._kept if each[0] >= self.asked[-1]]
            answer = self._answer(wanted)
            if answer is None:
                continue
            for number, payload in answer:
                router.send_multipart([peer, b"", self._topic, number.to_bytes(8, "big"), payload])
            router.send_multipart([peer, b"", b"", END, b""])
        router.close(linger=0)
