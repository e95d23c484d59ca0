"""Values and rules. Standard library and msgspec only; no I/O."""
