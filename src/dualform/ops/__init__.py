"""The one table of ops: a row per op."""
