"""What a call of one of Numba's own functions comes to, found once.

For each ``a + b`` and ``a[i]`` Numba tries its many implementations of ``+`` and ``[]`` in turn, also where it has done so for the same types before: two
thirds of the time for types. :func:`install` lets it remember which one it took, for as long as the process lives.
"""

import inspect
from importlib import import_module
from typing import Any


def install() -> None:
    """Teach Numba to remember; it stays as it is if it looks up calls otherwise than Numba 0.61 to 0.68 do."""
    functions: Any = import_module("numba.core.types.functions")
    stack: Any = getattr(import_module("numba.core.targetconfig"), "ConfigStack", None)
    plain = getattr(getattr(functions, "BaseFunction", None), "get_call_type", None)
    if plain is None or list(inspect.signature(plain).parameters) != ["self", "context", "args", "kws"]:
        return
    if not hasattr(stack, "top_or_none"):
        return
    known: dict[Any, Any] = {}
    latest: list[Any] = [None, ""]  # the options of the function that is being compiled, and their words

    def get_call_type(function: Any, context: Any, args: Any, kws: Any) -> Any:
        options = stack.top_or_none()
        if options is not latest[0] or options is None:
            latest[:] = options, repr(options)
        key = function, context, args, tuple(kws.items()) if kws else (), latest[1]
        try:
            if key in known:
                return known[key]
        except TypeError:  # a type that cannot be told from others
            return plain(function, context, args, kws)
        found = plain(function, context, args, kws)
        if found is not None:
            known[key] = found
        return found

    functions.BaseFunction.get_call_type = get_call_type
