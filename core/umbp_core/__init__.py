"""Engine-free, sans-IO core of umbp-connectors.

Everything in this package takes events and returns effects.  It opens no socket, starts no thread,
reads no clock and imports no engine; time, storage, copies and observers enter through the
Protocols in :mod:`umbp_core.ports`.

Map of the package:

``errors``      the exception tree
``ids``         the identifiers and object identity
``tiers``       HBM, DRAM, SSD and sets of them
``ports``       what the core needs from outside
``pages``       page bitmap allocator
``leases``      promises not to evict, with a deadline
``eviction``    LRU and prefix-aware LRU
``copies``      one tier's copies: the directory's bookkeeping and vocabulary
``directory``   which object is in which page of which tier: the only owner of a node's metadata
``ops``         transfer operations and their messages
``slot_table``  the slot's two state machines, as data
``slots``       one request's life as the connector sees it
``progress``    how far the forward pass is, and which ops wait for what of it
``deadlines``   keys with a deadline
``scheduler``   rendezvous, requirements, concurrency tokens, completion of transfers
``placements``  where things lie, as bit masks over (node, tier) cells
``index``       the external KV index: which hash lies on which tiers of which nodes
``index_match`` who holds a query, and how long a prefix each node can use
``index_feed``  the index's changes in order, for readers that follow it
``index_gate``  sequence numbers and incarnations of what nodes tell
``hits``        counters of the hashes that were asked for
``block_index`` which node holds which key on which tier, and how large it is
``journal``     what a node has to tell: coalesced, numbered, bounded
``testing``     fakes, plain models and hypothesis machines that third parties may reuse
"""
