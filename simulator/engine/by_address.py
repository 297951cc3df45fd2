"""How compiled functions hold the engine's records of arrays: by address.

Numba holds a named tuple as the values of its fields, an array as eight of them, and passes each as an argument: with every feature a call
had a thousand arguments, and most of the machine code, and of the time to compile it, was about them. :func:`install` lets compiled code
keep a record of arrays in memory and pass its address. Records are never written to once they are made, so nothing else changes.

Only the named tuples of this package that hold arrays are concerned; records of numbers and other packages' tuples are as ever.
"""

from importlib import import_module
from typing import Any

PACKAGE = "simulator.engine."


def install() -> None:
    """Teach Numba the layout; before anything is compiled."""
    ir: Any = import_module("llvmlite.ir")
    cgutils: Any = import_module("numba.core.cgutils")
    models: Any = import_module("numba.core.datamodel.models")
    manager: Any = import_module("numba.core.datamodel").default_manager
    tuples: Any = import_module("numba.cpython.tupleobj")
    boxing: Any = import_module("numba.core.boxing")
    types: Any = import_module("numba.core.types")
    extending: Any = import_module("numba.extending")

    def is_record(kind: Any) -> bool:
        return (
            isinstance(kind, types.NamedTuple)
            and kind.instance_class.__module__.startswith(PACKAGE)
            and any(isinstance(field, types.Array) or is_record(field) for field in kind)
        )

    class RecordModel(models.DataModel):  # type: ignore[misc]
        """An address; as data and as a result, the record itself."""

        def __init__(self, dmm: Any, fe_type: Any) -> None:
            super().__init__(dmm, fe_type)
            self.fields = [dmm.lookup(field) for field in fe_type]
            self.layout = ir.LiteralStructType([field.get_data_type() for field in self.fields])

        def get_value_type(self) -> Any:
            return self.layout.as_pointer()

        def get_data_type(self) -> Any:
            return self.layout

        def get_return_type(self) -> Any:
            return self.layout

        def as_data(self, builder: Any, value: Any) -> Any:
            return builder.load(value)

        def from_data(self, builder: Any, value: Any) -> Any:
            return cgutils.alloca_once_value(builder, value)

        as_return = as_data
        from_return = from_data

        def as_argument(self, builder: Any, value: Any) -> Any:
            return value

        def from_argument(self, builder: Any, value: Any) -> Any:
            if isinstance(value, ir.Argument):
                value.add_attribute("noalias")  # nothing is written where a record lies
            return value

        def load_from_data_pointer(self, builder: Any, ptr: Any, align: Any = None) -> Any:
            return ptr

        def field(self, builder: Any, value: Any, index: int) -> Any:
            place = cgutils.gep_inbounds(builder, value, 0, index)
            model = self.fields[index]
            if isinstance(model, RecordModel):
                return place
            return model.from_data(builder, builder.load(place)) if model.get_data_type() != model.get_value_type() else builder.load(place)

        def build(self, builder: Any, values: Any) -> Any:
            value = cgutils.alloca_once(builder, self.layout)
            for index, (model, field) in enumerate(zip(self.fields, values, strict=True)):
                place = cgutils.gep_inbounds(builder, value, 0, index)
                same = model.get_data_type() == model.get_value_type()
                builder.store(field if same else model.as_data(builder, field), place)
            return value

    usual_model = manager._handlers[types.NamedTuple]  # noqa: SLF001

    def model_of(dmm: Any, kind: Any) -> Any:
        return (RecordModel if is_record(kind) else usual_model)(dmm, kind)

    manager.register(types.NamedTuple, model_of)

    @extending.lower_getattr_generic(types.NamedTuple)
    def field_of(context: Any, builder: Any, kind: Any, value: Any, name: str) -> Any:
        if not is_record(kind):
            return tuples.namedtuple_getattr(context, builder, kind, value, name)
        return context.data_model_manager[kind].field(builder, value, kind.fields.index(name))

    @extending.lower_builtin(types.NamedTupleClass, types.VarArg(types.Any))
    def construct(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.return_type
        if not is_record(kind):
            return tuples.namedtuple_constructor(context, builder, sig, args)
        values = [context.cast(builder, *pair) for pair in zip(args, sig.args, kind, strict=True)]
        return context.data_model_manager[kind].build(builder, values)

    @extending.unbox(types.NamedTuple)
    def unbox(kind: Any, obj: Any, c: Any) -> Any:
        if not is_record(kind):
            return boxing.unbox_tuple(kind, obj, c)
        fields = [c.unbox(field, c.pyapi.tuple_getitem(obj, index)) for index, field in enumerate(kind)]
        failed = cgutils.false_bit
        for field in fields:
            failed = c.builder.or_(failed, field.is_error)
        cleanups = [field.cleanup for field in fields if field.cleanup is not None]

        def clean() -> None:
            for cleanup in reversed(cleanups):
                cleanup()

        value = c.context.data_model_manager[kind].build(c.builder, [field.value for field in fields])
        return extending.NativeValue(value, cleanup=clean if cleanups else None, is_error=failed)
