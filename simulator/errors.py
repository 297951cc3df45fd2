"""Every exception this package raises on purpose.

::

    ChipsecondsError
    ├── InputError          malformed or contradictory input: exit code 2
    │   └── UnpriceableError  well-formed input that the cost model cannot price: exit code 2
    └── InfeasibleError     well-formed, but the answer is "no": exit code 1

Messages follow one pattern: where (file and field), the value, what is allowed, the nearest name.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ChipsecondsError(Exception):
    """Base class; the command line turns it into one line on stderr."""

    exit_code = 2


class InputError(ChipsecondsError):
    """The input is malformed, contradictory or names something unknown."""


class UnpriceableError(InputError):
    """The input is well-formed, but pricing it would give silently wrong numbers."""


class InfeasibleError(ChipsecondsError):
    """The question is well-formed and the answer is no (does not fit, no plan, check missed)."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` or the list of known names, to end an error message with.

    >>> nearest("llama-3-70", ["llama-3-70b", "gpt-j-6b"])
    "; did you mean 'llama-3-70b'?"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(names)
