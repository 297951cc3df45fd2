"""Weight-stationary and weight-gathered layouts (Pope et al. §3.2; scaling book, inference appendix)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.layouts import (
    FeedForward,
    best_gathered,
    best_x,
    best_x_on_three_axes,
    layer_layouts,
    two_dimensional_beats_one,
    two_dimensional_beats_one_on_three_axes,
    volume_1d_elements,
    volume_2d_elements,
    volume_gathered_elements,
)

FOUR = FeedForward(8192, 32768)
WIDTHS = st.builds(FeedForward, st.integers(256, 32768), st.integers(256, 131072), st.sampled_from([2, 3]))


@pytest.mark.parametrize(
    ("source", "ours", "published"),
    [
        ("Pope et al.: 2D wins above 16 chips for F = 4E", two_dimensional_beats_one(FOUR), 16),
        ("Pope et al.: X = 0.5 sqrt(N) for F = 4E, N = 64", best_x(FOUR, 64), 4),
        ("scaling book: X = sqrt(N/8), N = 128", best_x_on_three_axes(FOUR, 128)[0], 4),
        ("scaling book: YZ = sqrt(8N), N = 128", best_x_on_three_axes(FOUR, 128)[1], 32),
        (
            "scaling book: N > 81 for F = 4D",
            math.ceil(math.sqrt(two_dimensional_beats_one_on_three_axes(FOUR))) ** 2,
            81,
        ),
    ],
)
def test_published(source, ours, published):
    assert ours == pytest.approx(published), source


def test_pope_2d_volume_at_the_optimum():
    # 2·tokens·(E/X + F·X/N) at X = sqrt(N)/2 is 8·tokens·E/sqrt(N) for F = 4E.
    x = best_x(FOUR, 256)
    assert volume_2d_elements(FOUR, 512, chips=256, x=x) == pytest.approx(8 * 512 * 8192 / 16)


@given(WIDTHS, st.integers(1, 4096), st.floats(0.2, 5))
def test_best_x_moves_least(layer, chips, factor):
    x = best_x(layer, chips)
    least = volume_2d_elements(layer, 100, chips=chips, x=x)
    assert least <= volume_2d_elements(layer, 100, chips=chips, x=factor * x) * (1 + 1e-12)


@given(WIDTHS, st.integers(1, 100_000))
def test_crossing_of_one_and_two_dimensions(layer, chips):
    two = volume_2d_elements(layer, 100, chips=chips, x=best_x(layer, chips))
    one = volume_1d_elements(layer, 100)
    assert (two < one * (1 - 1e-9)) <= (chips > two_dimensional_beats_one(layer) * (1 - 1e-9))
    assert (two > one * (1 + 1e-9)) <= (chips < two_dimensional_beats_one(layer) * (1 + 1e-9))


@given(WIDTHS, st.integers(2, 64), st.floats(1, 1e7))
def test_best_gather_moves_least(layer, chips, tokens):
    def moved(g):
        return layer.matrices * layer.d_model * layer.d_ff * g / chips + 2 * tokens * layer.d_model / g

    best = best_gathered(layer, tokens, chips)
    assert moved(best) <= min(moved(g) for g in range(1, chips + 1)) * (1 + 1e-9)
    if chips > 1:
        assert volume_gathered_elements(layer, tokens, chips=chips, gathered=1) == pytest.approx(moved(1))


def test_more_tokens_gather_weights_over_more_chips():
    pod = resolve_slice("tpu-v4:4x4x4")
    gathered = [layer_layouts(pod, FOUR, 4.0**k)[0].gathered for k in range(2, 14)]
    assert gathered == sorted(gathered)
    assert gathered[0] == 1
    assert gathered[-1] == 64


def test_times_by_hand_on_a_wrapped_cube():
    # 64 chips, 4096 tokens of 2 bytes, large enough for bandwidth to rule; 1D: 2·n·D/(2·W·3 axes), there and back.
    pod = resolve_slice("tpu-v4:4x4x4")
    W, n = pod.domains[0].bandwidth_bytes_per_s, 65536
    found = {(t.name, t.x, t.gathered): t for t in layer_layouts(pod, FOUR, n)}
    assert found["1d-stationary", 1, 1].time_s == pytest.approx(2 * 2 * n * 8192 / (6 * W))
    two = 2 * (2 * n * 8192 / 4) / (4 * W) + 2 * (2 * n * 32768 / 16) / (2 * W)
    assert found["2d-stationary", 4, 1].time_s == pytest.approx(two)
    whole = found["gathered", 1, 64]
    assert (whole.weights_s, whole.tokens_s) == (pytest.approx(2 * 2 * 8192 * 32768 / (6 * W)), 0)


@pytest.mark.parametrize(("spec", "winner"), [("tpu-v4:4x4x4", "1d-stationary"), ("tpu-v4:8x8x8", "2d-stationary")])
def test_the_books_crossing_on_real_slices(spec, winner):
    # 64 chips are below 72, 512 above.
    layouts = [t for t in layer_layouts(resolve_slice(spec), FOUR, 65536) if t.gathered == 1]
    assert layouts[0].name == winner


def test_a_gated_layer_sums_one_product_more():
    pod = resolve_slice("tpu-v4:8x8x8")
    plain, gated = (
        {(t.x, t.gathered): t.tokens_s for t in layer_layouts(pod, FeedForward(8192, 32768, m), 65536)} for m in (2, 3)
    )
    assert plain[1, 1] == gated[1, 1]
    assert plain[8, 1] < gated[8, 1]


@given(st.floats(0, 1e6), st.floats(0.1, 1), st.sampled_from(["tpu-v5e:16x16", "tpu-v5e:4x4", "tpu-v4:4x4x8"]))
def test_times_grow_with_tokens_and_slow_links(tokens, link, spec):
    def times(n, **way):
        return {
            (t.name, t.x, t.gathered, round(t.weights_s, 15)): t.time_s
            for t in layer_layouts(resolve_slice(spec), FOUR, n, **way)
        }

    base, more, slow = times(tokens), times(2 * tokens), times(tokens, link=link)
    assert all(more[key] >= base[key] >= 0 for key in base)
    assert min(slow.values()) >= min(base.values())


@pytest.mark.parametrize(
    ("spec", "layer", "message"),
    [("h100-sxm:8", FOUR, "one torus"), ("tpu-v4:4x4x4", FeedForward(8191, 32767), "no axis")],
)
def test_layouts_are_for_tori(spec, layer, message):
    with pytest.raises(InputError, match=message):
        layer_layouts(resolve_slice(spec), layer, 10)
    with pytest.raises(InputError):
        FeedForward(0, 5)
