"""The master: the process that knows which node holds what, and serves that over two protocols."""
