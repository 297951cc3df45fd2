"""How compiled functions become machine code: each once, together with the function that Python calls.

Numba makes machine code of every function by itself, and then anew in every function that calls it, since it links the one into the other before it optimises:
a helper three calls deep is optimised and emitted four times. Here a helper stays intermediate code; the function that Python calls takes in all that it
needs, and what comes out is optimised and emitted once. It goes into the disk cache as a whole, so a later process does not miss the helpers.

:func:`pipelines` gives the two compilers for it, as Numba's option ``pipeline_class`` takes them.
"""

from importlib import import_module
from typing import Any, NamedTuple


class Pipelines(NamedTuple):
    """Numba's compiler, for what Python calls and for what compiled functions alone call."""

    entry: Any
    helper: Any


NEEDED = {
    "CodeLibrary": ("_ensure_finalized", "codegen"),
    "CPUCodeLibrary": ("_get_module_for_linking", "add_linking_library", "finalize"),
    "JITCodeLibrary": ("get_pointer_to_function",),
    "JITCPUCodegen": ("create_library", "set_env"),
}
"""What this rests on within ``numba.core.codegen``; of 0.61 to 0.68."""


def pipelines() -> Pipelines | None:
    """The two compilers; None if this Numba is built otherwise, and then its own way, which is slower, gives the same results."""
    codegen: Any = import_module("numba.core.codegen")
    compiler: Any = import_module("numba.core.compiler")
    if not all(hasattr(getattr(codegen, kind, None), name) for kind, names in NEEDED.items() for name in names):
        return None

    class Environments:
        """Keeps what a helper's code refers to at run time until there is machine code to tell it to."""

        def __init__(self) -> None:
            self.kept: list[tuple[str, Any]] = []

        def set_env(self, name: str, environment: Any) -> None:
            self.kept.append((name, environment))

    class HelperLibrary(codegen.JITCodeLibrary):  # type: ignore[misc]
        """Code of a function that compiled functions alone call; it is never made machine code by itself."""

        def __init__(self, owner: Any, name: str) -> None:
            super().__init__(owner, name)
            self.environments = Environments()

        def _ensure_finalized(self) -> None:
            pass

        @property
        def codegen(self) -> Any:
            return self.environments

    class EntryLibrary(codegen.JITCodeLibrary):  # type: ignore[misc]
        """Code of a function that Python calls, and of all helpers below it."""

        _linking_libraries: list[Any]

        def finalize(self) -> None:
            found: list[Any] = []
            seen = set()

            def visit(library: Any) -> None:
                if library in seen:
                    return
                seen.add(library)
                if isinstance(library, HelperLibrary):
                    for other in reversed(library._linking_libraries):  # noqa: SLF001 - of our own class
                        visit(other)
                found.append(library)

            for library in reversed(self._linking_libraries):
                visit(library)
            # The linker leaves out what nobody has asked for yet: who calls comes before whom it calls.
            self._linking_libraries = found[::-1]
            super().finalize()
            present = {variable.name for variable in self._final_module.global_variables}
            for library in found:
                if isinstance(library, HelperLibrary):
                    for name, environment in library.environments.kept:
                        if name in present:
                            self._codegen.set_env(name, environment)

    class Compiler(compiler.Compiler):  # type: ignore[misc]
        """Numba's compiler with a library of ours."""

        kind: Any

        def define_pipelines(self) -> Any:
            made = self.kind(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
            made.enable_object_caching()
            self.state["library"] = made
            return super().define_pipelines()

    class EntryCompiler(Compiler):
        kind = EntryLibrary

    class HelperCompiler(Compiler):
        kind = HelperLibrary

    return Pipelines(EntryCompiler, HelperCompiler)
