"""The Protocols that a client's wires implement; they stand in the core, so that its test kit can speak of them."""

from umbp_core.master.transport import MasterTransport, NativeTransport, is_native

__all__ = ["MasterTransport", "NativeTransport", "is_native"]
