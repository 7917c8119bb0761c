"""Where a network comes from: a module per kind of source, each giving the same `Source`."""
