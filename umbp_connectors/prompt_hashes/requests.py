"""From a request of OpenAI's API to what its hashes cover: tokens and namespace.

The body is read here, never kept and never logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umbp_connectors.prompt_hashes.hasher import Namespace
from umbp_core.errors import UmbpError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_OF_A_TEMPLATE = (
    "messages",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
)
"""Fields of a chat request that decide its tokens."""
_NO_TOKEN = 1 << 63


class Unreadable(UmbpError):
    """The tokens of a request cannot be known here; the message is a few words."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask a worker's ``/tokenize``; or, when ``tokens`` is set, nothing."""

    body: Mapping[str, Any]
    tokens: Sequence[int] | None = None


def question_of(path: str, body: Mapping[str, Any]) -> Question:
    """How the tokens of a request are found.  Of several prompts in one request, the first decides.

    Raises ``Unreadable``.
    """
    if path == CHAT:
        return Question(_chat(body))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (list, str)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Question({**_some(body, ("model", "add_special_tokens")), "prompt": prompt})
    if isinstance(prompt, list) and prompt and _are_tokens(prompt):
        return Question({}, prompt)
    raise Unreadable("the prompt is no text and no tokens")


def tokens_of(answer: object) -> list[int]:
    """The tokens in what ``/tokenize`` answered.  Raises ``Unreadable``."""
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not _are_tokens(tokens):
        raise Unreadable("/tokenize answered with no tokens")
    return tokens


def adapters_of(models: object) -> dict[str, Namespace]:
    """What ``/v1/models`` says: the names of all models, and what the blocks of adapters are kept apart by.

    SGLang wants an adapter as ``MODEL:ADAPTER``; its name alone is the model's without an adapter there.  Raises
    ``ValueError`` when it is no list of models.
    """
    cards = models.get("data") if isinstance(models, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise ValueError("/v1/models answered with no models")
    return {name: namespace for card in cards for name, namespace in _served(card).items()}


def namespace_of(body: Mapping[str, Any], adapter: Namespace) -> Namespace:
    """What keeps the request's blocks apart; ``adapter`` is what the model that it names has.

    Raises ``Unreadable``.
    """
    if body.get("lora_path"):
        raise Unreadable("an adapter by lora_path; name it with the model, as MODEL:ADAPTER")
    salt = body.get("cache_salt") or ""
    if not isinstance(salt, str) or any(map(_is_surrogate, salt)):
        raise Unreadable("the cache salt is no text")
    return Namespace(salt, adapter.lora_name, adapter.lora_path)


def _served(card: Mapping[str, Any]) -> dict[str, Namespace]:
    name, parent = str(card["id"]), card.get("parent")
    if parent is None:
        return {name: Namespace()}
    adapter = Namespace(lora_name=name, lora_path=str(card.get("root") or ""))
    if card.get("owned_by") == "sglang":
        return {name: Namespace(), f"{parent}:{name}": adapter}
    return {name: adapter}


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Unreadable("no messages")
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
            raise Unreadable("not only text")
    return _some(body, ("model", *_OF_A_TEMPLATE))


def _some(body: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: body[name] for name in names if body.get(name) is not None}


def _are_tokens(values: Sequence[Any]) -> bool:
    return set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) < _NO_TOKEN))


def _is_surrogate(character: str) -> bool:
    """JSON can name halves of characters, which no encoding has a form for."""
    return "\ud800" <= character <= "\udfff"
