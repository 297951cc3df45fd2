"""Models by name or path: the catalogue's files, a user's own TOML file, or a Hugging Face ``config.json``."""

from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path

from simulator.catalog.architecture import (
    Architecture,
    LatentAttention,
    SoftmaxAttention,
    SparseIndexer,
)
from simulator.catalog.files import data_folder, names_in, parse, read_toml
from simulator.catalog.huggingface import HuggingFaceModel, read_huggingface
from simulator.errors import InputError, nearest

#: Source keys of the catalogue's files; ``docs/models.md`` tells what lies behind each.
SOURCES = {
    "released-config": "released configuration or paper, as read for the model reference table",
    "recalled-config": "recalled configuration, not checked against the released file",
}


def _folder() -> Traversable:
    return data_folder("workloads") / "models"


def model_names() -> list[str]:
    """Names of the catalogue's models, sorted; aliases are left out."""
    return names_in(_folder())


@cache
def _catalogue(name: str) -> Architecture:
    file = _folder() / f"{name}.toml"
    return parse(Architecture, read_toml(file), f"{name}.toml")


@cache
def model_aliases() -> dict[str, str]:
    """Alias -> catalogue name: other releases of the same architecture."""
    return {alias: name for name in model_names() for alias in _catalogue(name).aliases}


def load_model(name_or_path: str) -> Architecture:
    """Read a model: a catalogue name or alias, a ``.toml`` file, a ``config.json`` or a folder that holds one.

    Raises
    ------
    InputError
        If the name is unknown (the nearest names are given), or the file does not exist or is malformed.

    Examples
    --------
    >>> load_model("llama-3.1-70b").name
    'llama-3-70b'
    """
    return read_model(name_or_path).architecture


def read_model(name_or_path: str) -> HuggingFaceModel:
    """As :func:`load_model`, with the notes, dtype and quantization of a ``config.json`` (empty for TOML files)."""
    if name_or_path in model_names():
        return HuggingFaceModel(_catalogue(name_or_path))
    aliases = model_aliases()
    if name_or_path in aliases:
        return HuggingFaceModel(_catalogue(aliases[name_or_path]))
    path = Path(name_or_path)
    if path.is_dir() or path.suffix == ".json":
        return read_huggingface(path)
    if path.suffix == ".toml" or "/" in name_or_path:
        if not path.is_file():
            raise InputError(f"model file {name_or_path!r} does not exist")
        return HuggingFaceModel(parse(Architecture, read_toml(path), name_or_path))
    known = [*model_names(), *aliases]
    raise InputError(f"unknown model {name_or_path!r}{nearest(name_or_path, known)}")


def attention_windows(architecture: Architecture) -> list[tuple[int, bool]]:
    """Windows of the attention layers, as keys and whether chunked; the keys that sparse attention selects are one too.

    Examples
    --------
    >>> attention_windows(load_model("gemma-3-27b")), attention_windows(load_model("llama-3-70b"))
    ([(1024, False)], [])
    """
    found: dict[tuple[int, bool], None] = {}
    for group in architecture.layers:
        match group.mixer:
            case SoftmaxAttention(window=int(window)):
                found[window, group.mixer.window_kind == "chunked"] = None
            case LatentAttention(indexer=SparseIndexer(top_k=top_k)):
                found[top_k, False] = None
            case _:
                pass
    return list(found)


def unpriceable_features(architecture: Architecture) -> list[str]:
    """Names of what the cost model cannot price yet; empty for every architecture of the catalogue.

    Multi-token-prediction layers are unused unless asked for, and no reason.

    Examples
    --------
    >>> unpriceable_features(load_model("deepseek-v3"))
    []
    """
    return ["attention windows of several sizes"] if len(attention_windows(architecture)) > 1 else []
