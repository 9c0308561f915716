"""What a live process is doing, told to people at a Unix socket: no debugger, no restart, no signal."""
