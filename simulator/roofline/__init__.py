"""Room: roofline (see docs/architecture.md)."""
