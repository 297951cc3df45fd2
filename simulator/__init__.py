"""chipseconds: inference cost simulator and roofline analyzer.

The rooms and who may import whom are drawn in ``docs/architecture.md``.
"""

__version__ = "0.1.0"
