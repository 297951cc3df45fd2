"""Room: results (see docs/architecture.md)."""
