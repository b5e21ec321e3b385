"""Memory and time of a compressed cache of keys and values beside others."""
