"""The leader's side of a node: metadata decisions for all ranks, no bytes.

``ledger``     ops in flight on all ranks, and how each of them ended
``demotions``  which committed DRAM objects go to SSD next
``ssd``        the catalogue of what lies on SSD, which follows the directory and survives a restart
``op_ids``     ids of ops

Everything here runs on the engine's scheduler thread and never waits.
"""
