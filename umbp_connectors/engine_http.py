"""Questions to an engine's HTTP server, for tools: the standard library only, each with a deadline."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from umbp_core.errors import ConfigError, UmbpError

MAX_ANSWER = 64 << 20
"""Bytes of an answer that are read."""


class EngineUnreachable(UmbpError):
    """An engine's server gave no answer that is of use."""


class EngineHttp:
    """The server at ``url``, such as ``http://127.0.0.1:8000``, to which ``key`` is shown if it is not empty.

    Raises ``ConfigError`` when ``url`` is no address.
    """

    def __init__(self, url: str, timeout: float, key: str = "") -> None:
        self.url = place_of(url)
        self._timeout = timeout
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> Any:
        """The JSON at ``path``.  Raises ``EngineUnreachable``."""
        return self._ask(urllib.request.Request(self.url + path, headers=self._headers))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer to ``body``.  Raises ``EngineUnreachable``."""
        headers = {"Content-Type": "application/json", **self._headers}
        return self._ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.loads(response.read(MAX_ANSWER))
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise EngineUnreachable(f"{request.full_url} answered {error.code}: {said}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineUnreachable(
                f"{request.full_url} gave no answer: {error}; does an engine serve there?"
            ) from error


def place_of(url: str) -> str:
    """``url`` as it is compared: ``http://host:port``, ``localhost`` as 127.0.0.1.

    Raises ``ConfigError`` when it is no such thing.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in {"http", "https"} or not parts.hostname or port is None:
        raise ConfigError(f"{url!r} is no address of a worker; give http://HOST:PORT")
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    return f"{parts.scheme}://[{host}]:{port}" if ":" in host else f"{parts.scheme}://{host}:{port}"
