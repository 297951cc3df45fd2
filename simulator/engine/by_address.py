"""How compiled functions hold the engine's records of arrays: by address.

Numba holds a named tuple as the values of its fields, an array as eight of them, and passes each as an argument: with every feature a call
had a thousand arguments, and most of the machine code, and of the time to compile it, was about them. :func:`install` lets compiled code
keep a record of arrays in memory and pass its address. Records are never written to once they are made, so nothing else changes.

A record made in compiled code lies in the frame of the function that made it or received it, and each line has one place there: a loop
must not keep the record that a line made in an earlier round. A function hands back the record itself.

Only the named tuples of this package that hold arrays are concerned; records of numbers and other packages' tuples are as ever.
"""

import hashlib
from importlib import import_module
from typing import Any

PACKAGE = "simulator.engine."


def install() -> None:
    """Teach Numba the layout; before anything is compiled."""
    ir: Any = import_module("llvmlite.ir")
    callconv: Any = import_module("numba.core.callconv")
    cgutils: Any = import_module("numba.core.cgutils")
    models: Any = import_module("numba.core.datamodel.models")
    registry: Any = import_module("numba.core.registry")
    types: Any = import_module("numba.core.types")
    tuples: Any = import_module("numba.cpython.tupleobj")
    boxing: Any = import_module("numba.core.boxing")
    extending: Any = import_module("numba.extending")

    def is_record(kind: Any) -> bool:
        return (
            isinstance(kind, types.NamedTuple)
            and kind.instance_class.__module__.startswith(PACKAGE)
            and any(isinstance(field, types.Array) or is_record(field) for field in kind)
        )

    models_of: dict[str, Any] = {}

    def without_zeros(block: Any, place: Any) -> None:
        """Take back the latest store of zeros to a place that is written in full before it is read."""
        for line in reversed(block.instructions):
            if (
                isinstance(line, ir.StoreInstr)
                and line.operands[1] is place
                and isinstance(line.operands[0], ir.Constant)
            ):
                block.instructions.remove(line)
                return

    def place_for(builder: Any, layout: Any) -> Any:
        """A place in the function's frame."""
        place = cgutils.alloca_once(builder, layout)
        without_zeros(builder.function.entry_basic_block, place)
        return place

    class RecordModel(models.DataModel):  # type: ignore[misc]
        """An address; as data and as a result, the record itself."""

        def __init__(self, manager: Any, kind: Any) -> None:
            super().__init__(manager, kind)
            self.fields = [manager.lookup(field) for field in kind]
            self.layout = ir.LiteralStructType([field.get_data_type() for field in self.fields])
            models_of[str(self.layout)] = self

        def get_value_type(self) -> Any:
            return self.layout.as_pointer()

        def get_data_type(self) -> Any:
            return self.layout

        def get_return_type(self) -> Any:
            return self.layout

        def as_data(self, builder: Any, value: Any) -> Any:
            return builder.load(value)

        def from_data(self, builder: Any, value: Any) -> Any:
            place = place_for(builder, self.layout)
            builder.store(value, place)
            return place

        as_return = as_data

        def from_return(self, builder: Any, value: Any) -> Any:
            if not isinstance(value, ir.LoadInstr):
                return self.from_data(builder, value)
            place = value.operands[0]  # where the function that was called has put it
            without_zeros(builder.block, place)
            without_zeros(builder.function.entry_basic_block, place)
            return place

        def copy(self, builder: Any, source: Any, target: Any) -> None:
            size = ir.Constant(cgutils.intp_t, registry.cpu_target.target_context.get_abi_sizeof(self.layout))
            cgutils.raw_memcpy(builder, target, source, size, 1, align=8)

        def as_argument(self, builder: Any, value: Any) -> Any:
            del builder
            return value

        def from_argument(self, builder: Any, value: Any) -> Any:
            del builder
            value.add_attribute("noalias")  # nobody writes where a record lies, so a store to an array cannot change it
            return value

        def field(self, builder: Any, value: Any, index: int) -> Any:
            place = cgutils.gep_inbounds(builder, value, 0, index)
            model = self.fields[index]
            if isinstance(model, RecordModel):
                return place
            data = builder.load(place)
            # an array is the same as data; taking it apart and together again would only be more to compile
            return data if model.get_data_type() == model.get_value_type() else model.from_data(builder, data)

        def build(self, builder: Any, values: Any) -> Any:
            value = place_for(builder, self.layout)
            for index, (model, field) in enumerate(zip(self.fields, values, strict=True)):
                place = cgutils.gep_inbounds(builder, value, 0, index)
                if isinstance(model, RecordModel):
                    model.copy(builder, field, place)
                    continue
                same = model.get_data_type() == model.get_value_type()
                builder.store(field if same else model.as_data(builder, field), place)
            return value

    def model_of(manager: Any, kind: Any) -> Any:
        return (RecordModel if is_record(kind) else models.TupleModel)(manager, kind)

    def field_of(context: Any, builder: Any, kind: Any, value: Any, name: str) -> Any:
        if not is_record(kind):
            return tuples.namedtuple_getattr(context, builder, kind, value, name)
        return context.data_model_manager[kind].field(builder, value, kind.fields.index(name))

    def construct(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.return_type
        if not is_record(kind):
            return tuples.namedtuple_constructor(context, builder, signature, arguments)
        values = [context.cast(builder, *item) for item in zip(arguments, signature.args, kind, strict=True)]
        return context.data_model_manager[kind].build(builder, values)

    def unbox(kind: Any, instance: Any, c: Any) -> Any:
        if not is_record(kind):
            return boxing.unbox_tuple(kind, instance, c)
        fields = [c.unbox(field, c.pyapi.tuple_getitem(instance, index)) for index, field in enumerate(kind)]
        failed = cgutils.false_bit
        for field in fields:
            failed = c.builder.or_(failed, field.is_error)

        def clean() -> None:
            for field in reversed(fields):
                if field.cleanup is not None:
                    field.cleanup()

        value = c.context.data_model_manager[kind].build(c.builder, [field.value for field in fields])
        return extending.NativeValue(value, cleanup=clean, is_error=failed)

    def return_value(convention: Any, builder: Any, value: Any) -> None:
        lines = builder.block.instructions
        model = (
            models_of.get(str(value.type)) if isinstance(value, ir.LoadInstr) and lines and lines[-1] is value else None
        )
        if model is None:
            plain_return(convention, builder, value)
            return
        lines.pop()  # a copy of memory instead of some hundred fields, one by one
        model.copy(builder, value.operands[0], builder.function.args[0])
        convention._return_errcode_raw(builder, callconv.RETCODE_OK)  # noqa: SLF001 - what its own return_value does next

    plain_return = callconv.CPUCallConv.return_value
    callconv.CPUCallConv.return_value = return_value

    def mangling(kind: Any) -> Any:
        if not is_record(kind):
            return plain_mangling(kind)
        return kind.instance_class.__name__ + hashlib.sha256(kind.name.encode()).hexdigest()[:16], ()

    # The name of a record's type tells all its fields, and that of a function all its types: thousands of letters in each line that calls it.
    plain_mangling = types.NamedTuple.mangling_args.fget
    types.NamedTuple.mangling_args = property(mangling)
    extending.register_model(types.NamedTuple)(model_of)
    extending.lower_getattr_generic(types.NamedTuple)(field_of)
    extending.lower_builtin(types.NamedTupleClass, types.VarArg(types.Any))(construct)
    extending.unbox(types.NamedTuple)(unbox)
