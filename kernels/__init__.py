"""Arithmetic on the arena: packed formats, the torch specification, and backends that plug in by name."""
