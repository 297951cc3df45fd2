"""Room: economics (see docs/architecture.md)."""
