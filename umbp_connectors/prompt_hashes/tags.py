"""Which hashes a node publishes, by the tags that it registered with.

========================  ====================================================================================
``block=TOKENS``          tokens per hash
``hash_every=N``          only every N-th of these is the hash of a block (vLLM)
``hash=NAME``             ``sglang``, or a name of vLLM's ``--prefix-caching-hash-algo``
``hash_form=FORM``        ``int64`` or ``hex`` (vLLM)
``hash_start=KIND``       ``default``; ``seed``: from ``PYTHONHASHSEED``; ``random``: nobody else can know (vLLM)
``hash_unit=bigram``      pages of pairs of tokens (SGLang with EAGLE)
``hash_keys=KIND``        ``tagged`` or, before 0.31, ``untagged``: how a namespace is hashed (vLLM)
========================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from umbp_connectors.prompt_hashes.hasher import CannotHash, PromptHasher
from umbp_connectors.prompt_hashes.sglang import SGLangHasher
from umbp_connectors.prompt_hashes.vllm import DEFAULT_SEED, DIGESTS, VllmHasher, as_hex, as_int64

_FORMS: dict[str, Callable[[bytes], bytes]] = {"int64": as_int64, "hex": as_hex}


def tag_values(tags: Iterable[str]) -> dict[str, str]:
    """Tags of the form ``name=value`` by their names; of one that is given twice the last counts."""
    return {name: value for name, separator, value in (tag.partition("=") for tag in tags) if separator}


def is_first_rank(tags: Mapping[str, str]) -> bool:
    """Whether the node is an engine's first tensor and pipeline parallel rank, or stands for all of them."""
    return {tags.get("tp", "0"), tags.get("pp", "0")} == {"0"}


def hasher_of(tags: Mapping[str, str], seed: str | None = None) -> PromptHasher:
    """What computes the hashes of a node with these tags.  ``seed`` is the engines' ``PYTHONHASHSEED``, where known.

    Raises ``CannotHash``, whose message says what is missing and what to do.
    """
    block = tags.get("block", "")
    if not block.isdecimal() or int(block) == 0:
        raise CannotHash(
            "the node does not say how many tokens a hash covers (tag block=); it reports no KV of prompts"
        )
    name = tags.get("hash", "")
    if name == "sglang":
        return SGLangHasher(int(block), bigrams=tags.get("hash_unit") == "bigram")
    if name not in DIGESTS:
        raise CannotHash(
            f"the node's hashes are of the unknown kind {name!r} (tag hash=); known: {', '.join(DIGESTS)}, sglang"
        )
    form = tags.get("hash_form", "int64")
    if form not in _FORMS:
        raise CannotHash(f"the node publishes hashes in the unknown form {form!r} (tag hash_form=)")
    start = _start(tags.get("hash_start", "default"), seed)
    tagged = tags.get("hash_keys") != "untagged"
    return VllmHasher(int(block), DIGESTS[name], _FORMS[form], start, every=_every(tags), tagged=tagged)


def _start(kind: str, seed: str | None) -> str:
    if kind == "default":
        return DEFAULT_SEED
    if kind == "seed" and seed is not None:
        return seed
    if kind == "seed":
        raise CannotHash(
            "the engine's hashes start from its PYTHONHASHSEED; set the same in this process's environment"
        )
    raise CannotHash(
        "the engine's hashes start from a number that it drew for itself (hash_start=random); set PYTHONHASHSEED to "
        "one value for all engines, or use --prefix-caching-hash-algo sha256 with vLLM 0.29 or later"
    )


def _every(tags: Mapping[str, str]) -> int:
    text = tags.get("hash_every", "1")
    if not text.isdecimal() or int(text) == 0:
        raise CannotHash(f"the node names every {text!r}-th hash (tag hash_every=), which is no number")
    return int(text)
