"""The types of the fields of messages, with their bounds."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from umbp_core.wire import bounds

Text = Annotated[str, Meta(max_length=bounds.STRING_CHARS)]
"""A name or an address."""
LongText = Annotated[str, Meta(max_length=bounds.TEXT_CHARS)]
Token = Annotated[bytes, Meta(max_length=bounds.TOKEN_BYTES)]
EngineDesc = Annotated[bytes, Meta(max_length=bounds.ENGINE_DESC_BYTES)]
Packed = bytes
"""A packed list, see ``hashes``: of hashes, of keys, or of names in UTF-8."""
Column = bytes
"""Numbers, see ``columns``."""
Bitmap = bytes
"""Bits, see ``columns``."""

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""A number, size or count: 0 to 2**63 - 1."""
TierNumber = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
"""Any number of 32 bits: the tiers are an open enumeration."""
SmallCount = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]

Tags = Annotated[tuple[Text, ...], Meta(max_length=bounds.SMALL_LIST)]
Names = Annotated[tuple[Text, ...], Meta(max_length=bounds.LIST)]
Capacity = tuple[TierNumber, Count, Count]
"""Tier, bytes in total, bytes available."""
Capacities = Annotated[tuple[Capacity, ...], Meta(max_length=bounds.SMALL_LIST)]
TierCounts = Annotated[dict[TierNumber, Count], Meta(max_length=bounds.SMALL_LIST)]
TierWeights = Annotated[dict[TierNumber, float], Meta(max_length=bounds.SMALL_LIST)]

# What a master passes on came from others, some of them through UMBP's wire, which has other bounds: these are bounded
# by the frame alone.
AnyText = str
AnyTags = tuple[str, ...]
AnyCount = Annotated[int, Meta(ge=0)]
AnyCapacities = tuple[tuple[TierNumber, AnyCount, AnyCount], ...]
AnyTierCounts = dict[TierNumber, AnyCount]
