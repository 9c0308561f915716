"""From requests, whatever they contain, to tokens and namespaces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_connectors.prompt_hashes.hasher import NO_NAMESPACE, Namespace
from umbp_connectors.prompt_hashes.requests import (
    CHAT,
    COMPLETIONS,
    Unreadable,
    adapters_of,
    namespace_of,
    question_of,
    tokens_of,
)
from umbp_connectors.prompt_hashes.tags import hasher_of

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(["model", "prompt", "messages", "cache_salt", "tools", "add_special_tokens"])
BODIES = st.dictionaries(FIELDS, JSON, max_size=5)
HASHERS = [hasher_of({"block": "2", "hash": name}) for name in ("sha256", "sha256_cbor", "sglang")]


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3], [4]]])
def test_tokens_need_no_tokenizer(prompt: list[Any]) -> None:
    assert question_of(COMPLETIONS, {"prompt": prompt}).tokens == [1, 2, 3]


@pytest.mark.parametrize("prompt", ["text", ["text", "another"]])
def test_a_text_is_tokenized_with_what_decides_its_tokens(prompt: Any) -> None:
    body = {"model": "m", "prompt": prompt, "add_special_tokens": False, "max_tokens": 3, "temperature": 0}
    question = question_of(COMPLETIONS, body)
    assert (question.tokens, question.body) == (None, {"model": "m", "prompt": "text", "add_special_tokens": False})


def test_a_model_that_nobody_named_is_not_asked_for() -> None:
    """vLLM takes null for its model; SGLang refuses it."""
    assert question_of(COMPLETIONS, {"prompt": "text"}).body == {"prompt": "text"}
    assert question_of(CHAT, {"messages": []}).body == {"messages": []}


def test_a_chat_is_tokenized_with_its_template() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": None}]
    body = {"model": "m", "messages": messages, "tools": [{}], "chat_template_kwargs": {"a": 1}, "stream": True}
    assert question_of(CHAT, body).body == {name: body[name] for name in body if name != "stream"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {}),
        (COMPLETIONS, {"prompt": []}),
        (COMPLETIONS, {"prompt": [1, -1]}),
        (COMPLETIONS, {"prompt": [1, True]}),
        (COMPLETIONS, {"prompt": [1 << 63]}),
        (COMPLETIONS, {"prompt": {"a": 1}}),
        (CHAT, {"prompt": "text"}),
        (CHAT, {"messages": ["text"]}),
        (CHAT, {"messages": [{"content": [{"type": "image_url"}]}]}),
        (CHAT, {"messages": [{"content": ["text"]}]}),
    ],
)
def test_what_is_no_prompt_of_text_is_unreadable(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        question_of(path, body)


@given(st.sampled_from([COMPLETIONS, CHAT]), BODIES, JSON)
def test_whatever_comes_is_hashed_or_unreadable(path: str, body: dict[str, Any], answer: Any) -> None:
    try:
        question = question_of(path, body)
        namespace = namespace_of(body, NO_NAMESPACE)
        tokens = tokens_of(answer) if question.tokens is None else question.tokens
    except Unreadable:
        return
    for hasher in HASHERS:
        assert len(hasher.hashes(tokens, namespace)) == len(tokens) // 2


def test_namespaces() -> None:
    adapter = Namespace(lora_name="poet", lora_path="/poet")
    assert namespace_of({"cache_salt": "s"}, adapter) == Namespace("s", "poet", "/poet")
    assert namespace_of({"cache_salt": None}, NO_NAMESPACE) == NO_NAMESPACE
    with pytest.raises(Unreadable, match="MODEL:ADAPTER"):
        namespace_of({"lora_path": "poet"}, NO_NAMESPACE)
    for salt in (["a"], 7, "\ud800"):
        with pytest.raises(Unreadable, match="salt"):
            namespace_of({"cache_salt": salt}, NO_NAMESPACE)


def test_adapters_are_models_with_a_parent() -> None:
    cards = [{"id": "m"}, {"id": "n", "parent": None, "root": "/n"}, {"id": "poet", "parent": "m", "root": "/poet"}]
    found = adapters_of({"data": cards})
    assert found == {"m": NO_NAMESPACE, "n": NO_NAMESPACE, "poet": Namespace(lora_name="poet", lora_path="/poet")}
    theirs = [{**card, "owned_by": "sglang"} for card in cards]
    assert adapters_of({"data": theirs}) == {**found, "poet": NO_NAMESPACE, "m:poet": found["poet"]}
    for wrong in (None, [], {}, {"data": None}, {"data": ["m"]}, {"data": [{"name": "m"}]}):
        with pytest.raises(ValueError, match="no models"):
            adapters_of(wrong)
