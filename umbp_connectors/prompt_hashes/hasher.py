"""What all engines' hashes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from umbp_core.errors import UmbpError


class CannotHash(UmbpError):
    """The hashes of a prompt cannot be computed from outside the engine; the message says why."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """What besides its tokens keeps a request's blocks apart from others'; empty means that there is none.

    ``lora_name`` and ``lora_path`` are those of the adapter that the request is for, as the engine knows them.
    """

    cache_salt: str = ""
    lora_name: str = ""
    lora_path: str = ""


NO_NAMESPACE = Namespace()


class PromptHasher(Protocol):
    """Computes the hashes under which one kind of engine publishes the blocks of a prompt."""

    @property
    def block_tokens(self) -> int:
        """Tokens per hash."""
        ...

    def hashes(self, tokens: Sequence[int], namespace: Namespace = NO_NAMESPACE) -> list[bytes]:
        """One hash per full block of ``tokens``, in the form in which a master is told it.

        A pure function; about 2 to 10 us per block.  Raises ``CannotHash`` when ``namespace`` has what only the engine
        knows the hash of.
        """
        ...
