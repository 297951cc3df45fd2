"""``quantization_config`` of a Hugging Face ``config.json`` -> how the checkpoint is quantized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simulator.errors import InputError


@dataclass(frozen=True)
class PrecisionHint:
    """How a checkpoint is quantized, as its configuration says; which precision to run in stays the user's choice.

    Attributes
    ----------
    method
        ``quant_method`` as written.
    weights
        ``fp8``, ``int8``, ``int4``, ``int3``, ``int2``, ``mxfp4`` or ``nvfp4``.
    activations
        Dtype the products are computed in, or None: not quantized (weight only).
    kv
        Dtype of the KV cache, or None: not said.
    group
        Weights that share one scale: ``()`` a whole tensor or channel, ``(n,)`` n in a row, ``(n, m)`` a block.
    kept
        Modules that stay in the checkpoint's own dtype, as written (names or patterns).
    """

    method: str
    weights: str
    activations: str | None = None
    kv: str | None = None
    group: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()


def _integer(config: Mapping[str, Any], names: tuple[str, ...], where: str, allowed: tuple[int, ...] | None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or (allowed is not None and value not in allowed):
            what = f"one of {', '.join(map(str, allowed))}" if allowed else "an integer"
            raise InputError(f"{where}.{name}: expected {what}, got {value!r}")
        return value
    raise InputError(f"{where}.{names[0]}: required, but missing")


def _group(size: int, where: str) -> tuple[int, ...]:
    """Group size -1 means one scale per output channel."""
    if size == -1:
        return ()
    if size < 1:
        raise InputError(f"{where}: group size must be positive, or -1 for a whole channel, got {size}")
    return (size,)


def _block(value: Any, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and all(part.isdecimal() for part in value.split("x")):
        value = [int(part) for part in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise InputError(f"{where}: a block is two positive integers, got {value!r}")
    return tuple(value)


def _fp8(config: Mapping[str, Any], where: str) -> PrecisionHint:
    return PrecisionHint("fp8", "fp8", "fp8", group=_block(config.get("weight_block_size"), where))


def _integer_weights(config: Mapping[str, Any], where: str) -> PrecisionHint:
    """GPTQ and AWQ: integer weights in groups, products in the model's dtype."""
    bits = _integer(config, ("bits", "w_bit"), where, (2, 3, 4, 8))
    size = _integer(config, ("group_size", "q_group_size"), where, None)
    return PrecisionHint(str(config["quant_method"]), f"int{bits}", group=_group(size, where))


def _scheme(config: Any, where: str) -> str | None:
    """Dtype of one compressed-tensors scheme (weights, input activations or KV cache)."""
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: expected an object, got {config!r}")
    kind, bits = config.get("type"), config.get("num_bits")
    known = {
        ("float", 8): "fp8",
        ("int", 8): "int8",
        ("int", 4): "int4",
        ("float", 4): "nvfp4",
    }
    if not isinstance(kind, str) or not isinstance(bits, int) or (kind, bits) not in known:
        raise InputError(f"{where}: type = {kind!r} with num_bits = {bits!r} is not supported")
    return known[kind, bits]


def _compressed_tensors(config: Mapping[str, Any], where: str) -> PrecisionHint:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(f"{where}.config_groups: required, but missing")
    found = set()
    for key, group in groups.items():
        at = f"{where}.config_groups.{key}"
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise InputError(f"{at}.weights: required, but missing")
        weights = group["weights"]
        dtype = _scheme(weights, f"{at}.weights") or ""
        size = weights.get("group_size")
        block = _block(weights.get("block_structure"), at) if weights.get("strategy") == "block" else ()
        shared = block or (_group(_integer(weights, ("group_size",), at, None), at) if size is not None else ())
        found.add((dtype, _scheme(group.get("input_activations"), f"{at}.input_activations"), shared))
    if len(found) > 1:
        raise InputError(f"{where}.config_groups: {len(found)} different schemes in one checkpoint are not supported")
    weights_dtype, activations, shared = found.pop()
    kv = _scheme(config.get("kv_cache_scheme"), f"{where}.kv_cache_scheme")
    return PrecisionHint("compressed-tensors", weights_dtype, activations, kv, shared)


def _mxfp4(config: Mapping[str, Any], where: str) -> PrecisionHint:
    del config, where
    return PrecisionHint("mxfp4", "mxfp4", group=(32,))


_METHODS: dict[str, Callable[[Mapping[str, Any], str], PrecisionHint]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _integer_weights,
    "awq": _integer_weights,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
}

_KEPT = ("modules_to_not_convert", "ignore", "ignored_layers")


def read_quantization(config: Any, file: str) -> PrecisionHint:
    """Read one ``quantization_config`` object.

    Raises
    ------
    InputError
        If the method is unknown, or its bits, groups or schemes are missing or unsupported.

    >>> read_quantization({"quant_method": "fp8", "weight_block_size": [128, 128]}, "config.json").group
    (128, 128)
    """
    where = f"{file}: quantization_config"
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: expected an object, got {config!r}")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise InputError(f"{where}.quant_method = {method!r} is not supported; known: {', '.join(sorted(_METHODS))}")
    hint = _METHODS[method](config, where)
    kept: list[str] = []
    for name in _KEPT:
        modules = config.get(name) or []
        if not isinstance(modules, list):
            raise InputError(f"{where}.{name}: expected a list of module names, got {modules!r}")
        kept += map(str, modules)
    return PrecisionHint(method, hint.weights, hint.activations, hint.kv, hint.group, tuple(kept))
