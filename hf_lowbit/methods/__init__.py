"""The papers' mathematics, one folder a method; each registers itself with one call."""
