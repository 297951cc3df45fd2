"""``chipseconds models``: the catalogue's architectures, their parameter counts and where they come from."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.output import json_option, note, print_json, print_table

if TYPE_CHECKING:
    from simulator.catalog.architecture import Architecture, FeedForward, LayerGroup, Mixer
    from simulator.catalog.parameters import ParameterCounts


@click.group()
def models() -> None:
    """Model architectures of the catalogue, with parameter counts."""


def _billions(n: int) -> str:
    return f"{n / 1e9:.2f} B"


def _heads(architecture: "Architecture") -> str:
    """Query/KV heads of the attention layers; latent attention has no KV heads of its own."""
    found: dict[str, None] = {}
    for group in architecture.layers:
        mixer = group.mixer
        if mixer is not None and mixer.kind == "attention":
            found[f"{mixer.n_heads}/{mixer.n_kv_heads}"] = None
        elif mixer is not None and mixer.kind == "mla":
            found[f"{mixer.n_heads}/MLA"] = None
    return ", ".join(found) or "-"


def _summary(architecture: "Architecture", counts: "ParameterCounts") -> dict[str, Any]:
    """Units in the key names; what `--json` prints for one model of the list."""
    from simulator.catalog.models import unpriceable_features

    return {
        "name": architecture.name,
        "family": architecture.family,
        "aliases": architecture.aliases,
        "n_layers": architecture.n_layers,
        "d_model": architecture.d_model,
        "heads": _heads(architecture),
        "total_parameters": counts.total,
        "active_parameters": counts.active,
        "kv_cache_bytes_per_token_bf16": 2 * counts.kv_elements_per_token,
        "not_priced_yet": unpriceable_features(architecture),
    }


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List every model of the catalogue."""
    from simulator.catalog.models import load_model, model_names
    from simulator.catalog.parameters import count

    rows = [_summary(a, count(a)) for a in map(load_model, model_names())]
    rows.sort(key=lambda row: (row["family"], row["total_parameters"]))
    if as_json:
        print_json({"models": rows})
        return
    print_table(
        f"{len(rows)} models",
        ["model", "layers", "d_model", "heads/kv", "total", "active", "KV B/token", "priced"],
        [
            [
                row["name"],
                str(row["n_layers"]),
                str(row["d_model"]),
                row["heads"],
                _billions(row["total_parameters"]),
                _billions(row["active_parameters"]) if row["active_parameters"] != row["total_parameters"] else "",
                f"{row['kv_cache_bytes_per_token_bf16']:,}",
                "not yet: " + ", ".join(row["not_priced_yet"]) if row["not_priced_yet"] else "yes",
            ]
            for row in rows
        ],
        note="Active: parameters one token uses, where that is fewer (experts). KV: bf16, before a window is full; "
        "recurrent state not included. `models show NAME` for one model with its sources.",
    )


def _mixer_words(mixer: "Mixer | None") -> str:
    """One line about a mixer, for a person."""
    if mixer is None:
        return "no attention"
    if mixer.kind == "mla":
        query = f"query rank {mixer.q_rank}" if mixer.q_rank else "no query compression"
        indexer = mixer.indexer
        index = f", indexer {indexer.n_heads} x {indexer.head_dim}, top {indexer.top_k}" if indexer else ""
        return (
            f"latent attention, {mixer.n_heads} heads, {query}, KV rank {mixer.kv_rank}, "
            f"widths {mixer.nope_dim}+{mixer.rope_dim} (QK) and {mixer.v_dim} (V){index}"
        )
    if mixer.kind == "gdn":
        return (
            f"gated delta net, {mixer.n_key_heads} key heads x {mixer.key_dim}, "
            f"{mixer.n_value_heads} value heads x {mixer.value_dim}, convolution {mixer.conv}"
        )
    if mixer.kind == "mamba2":
        return (
            f"Mamba-2, {mixer.n_heads} heads x {mixer.head_dim}, {mixer.n_groups} groups, "
            f"state {mixer.state_dim}, convolution {mixer.conv}"
        )
    extras = [
        f"{mixer.window_kind} window {mixer.window}" if mixer.window is not None else "full",
        *(["biases"] if mixer.qkv_bias or mixer.o_bias else []),
        *([f"QK norm ({mixer.qk_norm.replace('_', ' ')})"] if mixer.qk_norm != "none" else []),
        *(["sinks"] if mixer.sinks else []),
        *(["gated output"] if mixer.gated_output else []),
    ]
    return f"attention, {mixer.n_heads} heads / {mixer.n_kv_heads} KV x {mixer.head_dim}, {', '.join(extras)}"


def _ffn_words(ffn: "FeedForward | None") -> str:
    """One line about a feed-forward block, for a person."""
    if ffn is None:
        return "no feed-forward"
    shape = "gated" if ffn.gated else "plain"
    if ffn.kind == "dense":
        return f"{shape} feed-forward {ffn.d_ff}{' with biases' if ffn.bias else ''}"
    shared = f" + {ffn.n_shared} shared of {ffn.shared_d_ff or ffn.d_ff}" if ffn.n_shared else ""
    return f"{ffn.top_k} of {ffn.n_experts} experts of {ffn.d_ff}{shared}, {shape}"


def _layer_words(group: "LayerGroup") -> str:
    return f"{_mixer_words(group.mixer)}; {_ffn_words(group.ffn)}"


def _component_rows(counts: "ParameterCounts", *, tied: bool) -> list[list[str]]:
    """Component, parameters, share; parts of the feed-forward blocks indented."""
    parts = [
        ("input embedding", counts.embedding),
        ("attention", counts.attention),
        ("recurrent blocks", counts.recurrent),
        ("feed-forward", counts.ffn),
        ("  routed experts", counts.routed_experts),
        ("  shared experts", counts.shared_experts),
        ("  routers", counts.router),
        ("norms", counts.norms),
        ("position embeddings", counts.positions),
        ("output head (tied: also the input embedding)" if tied else "output head", counts.head),
    ]
    rows = [[name, f"{n:,}", f"{100 * n / counts.total:.2f} %"] for name, n in parts if n]
    rows.append(["total", f"{counts.total:,}", "100.00 %"])
    if counts.active != counts.total:
        rows.append(["active per token", f"{counts.active:,}", f"{100 * counts.active / counts.total:.2f} %"])
    rows.extend(
        [
            ["active without input embedding", f"{counts.active_without_embedding:,}", ""],
            [
                f"read by a decode step{', all experts touched' if counts.routed_experts else ''}",
                f"{counts.read_per_step:,}",
                "",
            ],
        ]
    )
    if counts.mtp:
        rows.append(["multi-token-prediction layers, not in the total", f"{counts.mtp:,}", ""])
    return rows


def _cache_lines(architecture: "Architecture", counts: "ParameterCounts") -> list[str]:
    """What one token and one sequence occupy in the cache."""
    from simulator.catalog.parameters import sequence_kv_elements

    lines = []
    if counts.kv_elements_per_token:
        n = counts.kv_elements_per_token
        lines.append(f"KV cache per token    {n:,} elements: {2 * n:,} B in bf16, {n:,} B in fp8 or int8")
    tokens = 131_072
    windowed = sequence_kv_elements(architecture, tokens)
    if windowed != tokens * counts.kv_elements_per_token:
        lines.append(
            f"KV cache at 131,072   {2 * windowed:,} B in bf16 for one sequence: windows keep their last tokens"
        )
    if counts.index_elements_per_token:
        lines.append(f"index keys per token  {counts.index_elements_per_token:,} elements, on top of the KV cache")
    if counts.state_elements_per_sequence:
        state, conv = counts.state_elements_per_sequence, counts.conv_elements_per_sequence
        lines.append(f"state per sequence    {4 * state:,} B in FP32 + {2 * conv:,} B of convolution inputs in bf16")
    return lines


@models.command("show")
@click.argument("model")
@json_option
def show_model(model: str, as_json: bool) -> None:
    """Show one MODEL: a catalogue name, your own TOML file, or a Hugging Face config.json (or its folder)."""
    from simulator.catalog.models import SOURCES, read_model, unpriceable_features
    from simulator.catalog.parameters import count

    read = read_model(model)
    architecture = read.architecture
    counts = count(architecture)
    for remark in read.notes:
        note(f"note: {remark}")
    if as_json:
        print_json(
            {
                **_summary(architecture, counts),
                "parameters": asdict(counts),
                "matmul_flops_per_token": counts.matmul_flops_per_token,
                "architecture": architecture,
                "checkpoint_dtype": read.dtype,
                "checkpoint_quantization": asdict(read.precision) if read.precision else None,
                "notes": read.notes,
            }
        )
        return

    also = f" (also {', '.join(architecture.aliases)})" if architecture.aliases else ""
    click.echo(f"{architecture.name}{also}, family {architecture.family}")
    context = f", context {architecture.context_length:,}" if architecture.context_length else ""
    click.echo(
        f"{architecture.n_layers} layers, d_model {architecture.d_model:,}, vocabulary {architecture.vocab_size:,}, "
        f"{'tied' if architecture.tied_embeddings else 'untied'} embeddings{context}"
    )
    for group in architecture.layers:
        click.echo(f"  {group.count:>3} x {_layer_words(group)}")
    if architecture.parallel_attention_ffn:
        click.echo("  attention and feed-forward in parallel")
    click.echo()
    print_table(
        "Parameters", ["component", "parameters", "share"], _component_rows(counts, tied=architecture.tied_embeddings)
    )
    click.echo()
    for cache_line in _cache_lines(architecture, counts):
        click.echo(cache_line)
    click.echo(f"matmul FLOPs per token {counts.matmul_flops_per_token:,} forward, attention scores not included")
    if read.precision is not None:
        hint = read.precision
        scales = f", one scale per {' x '.join(map(str, hint.group))}" if hint.group else ""
        click.echo(f"checkpoint            {hint.weights} weights ({hint.method}{scales})")
    click.echo()
    missing = unpriceable_features(architecture)
    click.echo(f"priced                {'not yet: ' + ', '.join(missing) if missing else 'yes'}")
    if architecture.published_total is not None and architecture.published_kind is not None:
        off = counts.total - architecture.published_total
        agreement = "equal to the last digit" if off == 0 else f"computed is {off:+,}"
        how = "" if architecture.published_kind == "datasheet" else f" ({architecture.published_kind})"
        click.echo(f"published total       {architecture.published_total:,}{how}: {agreement}")
    source = SOURCES.get(architecture.source, architecture.source)
    where = f", row {architecture.locator!r}" if architecture.locator else ""
    click.echo(f"source                {source}{where}")
    if architecture.note:
        click.echo(f"note                  {architecture.note}")
