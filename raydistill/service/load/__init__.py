"""The load generator: it asks a running server, and knows nothing of how that works."""
