"""Whose bytes an object holds: everything that the page hash of SGLang does not say.

SGLang's page hash covers the tokens and the request's namespace (salt, adapter), nothing else.  Model, page size,
format, pool, layout and rank are therefore this module's matter; two engines that differ in any of them never share
bytes, and a needless difference costs hits only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from umbp_core.ids import Identity, RankScope, digest_of
from umbp_sglang.settings import RankFacts

SCHEMA = 1
"""Raised when the form of the description or the order of bytes changes, which voids everything stored before."""

HASH_SCHEME = "sha256-chain"
"""How SGLang names a page: SHA-256 over the previous page's hash and the page's tokens."""


def pool_identity(
    rank: RankFacts, user: str, pool: str, layout: Mapping[str, object], scope: RankScope, weights: object = None
) -> Identity:
    """The identity of the objects of one SGLang pool on one rank, or of one range of its heads.

    ``user`` is the configured ``namespace``, ``pool`` SGLang's name of the pool, ``layout`` what
    :func:`layout_descriptor` returns, ``weights`` what is known of the model besides its name.
    """
    description: dict[str, object] = {
        "schema": SCHEMA,
        "engine": "sglang",
        "user": user,
        "model": rank.model,
        "weights": weights,
        "hash": HASH_SCHEME,
        "page_tokens": layout["page_tokens"],
        "pool": pool,
    }
    namespace = f"{_slug(rank.model)}-{pool}-{digest_of(description).hex()[:32]}"
    return Identity(namespace, digest_of(layout), scope)


def layout_descriptor(
    *,
    kind: str,
    layout: str,
    dtype: str,
    page_tokens: int,
    segments: Sequence[int],
    layers: int,
    heads: int,
    head_dim: int,
    access: str,
    stage: object = None,
) -> dict[str, object]:
    """The canonical description of an object's bytes; JSON types only.

    ``kind`` is the class of SGLang's host pool, ``segments`` the sizes in bytes of an object's parts in their order,
    ``access`` how the bytes were read from the pool, ``stage`` which layers these are where the model is divided by
    layers, and nothing elsewhere.  It contains neither addresses nor the number of pages, so it survives a restart with
    more or less memory.
    """
    descriptor: dict[str, object] = {
        "schema": SCHEMA,
        "kind": kind,
        "layout": layout,
        "dtype": dtype,
        "page_tokens": page_tokens,
        "page_bytes": sum(segments),
        "segments": list(segments),
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "access": access,
    }
    return descriptor if stage is None else {**descriptor, "stage": stage}


def rank_scope(rank: RankFacts, replicated: bool, part: int | None = None) -> RankScope:
    """The part of the model's KV that a pool of this rank holds: all of it, a TP share, or range ``part`` of heads."""
    return RankScope(
        tp_rank=rank.tp_rank,
        tp_size=rank.tp_size,
        pp_rank=rank.pp_rank,
        pp_size=rank.pp_size,
        cp_rank=rank.cp_rank,
        cp_size=rank.cp_size,
        replicated=replicated,
        dcp_rank=rank.dcp_rank,
        dcp_size=rank.dcp_size,
        heads=None if part is None else (part, rank.head_parts),
    )


def _slug(model: str) -> str:
    """The last part of the model's name, for people who look at a listing."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1])
    return name[:48] or "model"
