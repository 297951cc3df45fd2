"""Room: traffic (see docs/architecture.md)."""
