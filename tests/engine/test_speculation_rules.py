"""Speculative decoding against what can be worked out by hand, and its data structures against plain Python."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import speculation
from simulator.engine.compiled import simulate
from simulator.engine.jit import entry
from simulator.engine.new_state import new_spec
from simulator.engine.records import EngineSettings, Speculation, itl_quantiles_s
from simulator.engine.reference import simulate_reference
from simulator.errors import InputError
from simulator.roofline.acceptance import survival_of_rate, tokens_per_pass
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.speculation import SpeculationCost
from tests.engine.engines import NAMES, engine
from tests.engine.strategies import requests_of, step_cost

SEQS, TOKENS = 64, 512
BOTH = pytest.mark.parametrize("name", NAMES)


def flat_cost(**window):
    """One second per step, whatever it holds: times then count steps."""
    dense = [0.0] + [1.0] * TOKENS
    return step_cost(dense, [0.0] * (SEQS * 8), **window)


def chain(depth, rate, *, levels=None, draft_s=0.0, classes=None):
    """A chain of ``depth`` drafts; ``classes`` gives rates by class in place of ``rate``."""
    rates = [rate] if classes is None else classes
    survival = np.zeros((len(rates), depth + 1, depth))
    for level in range(1, depth + 1):
        survival[:, level, :level] = [survival_of_rate(a, level) for a in rates]
    steps = np.arange(depth + 1)
    draft = draft_s * steps[:, None] * (np.arange(SEQS + 1) > 0)
    zeros = np.zeros(depth + 1)
    prices = SpeculationCost(
        queries=steps + 1,
        knots=np.zeros(1),
        value_s=zeros[:, None],
        slope_s=zeros[:, None],
        window_slope_s=zeros,
        seq_s=zeros,
        draft_s=draft,
        draft_value_s=zeros[:, None],
        draft_slope_s=zeros[:, None],
        chunk_s=np.zeros(TOKENS + 1),
    )
    table = np.full(SEQS + 1, depth) if levels is None else np.array(levels)
    return Speculation(prices, survival, table)


def limits(plan, **changes):
    return EngineSettings(**{"max_num_seqs": SEQS, "max_num_batched_tokens": TOKENS, "speculation": plan} | changes)


@BOTH
@pytest.mark.parametrize(("rate", "depth"), [(0.8, 4), (0.5, 1), (1.0, 3), (0.0, 3), (0.9, 7)])
def test_mean_tokens_per_pass(name, rate, depth):
    """(1 − α^(γ+1)) / (1 − α), Leviathan et al. 2023, equation (1)."""
    result = engine(name)(flat_cost(), limits(chain(depth, rate)), requests_of([0.0], [8], [4001]))
    passes = result.speculation.sequence_passes.sum()
    assert 4000 / passes == pytest.approx(tokens_per_pass(rate, depth), rel=1e-3)
    assert result.finish_s[0] == 1.0 + passes  # the prompt's step, and one second per pass


@BOTH
def test_passes_of_a_worked_example(name):
    """2.5 tokens per pass: 2, 3, 2, 3 … after the prompt's one; the eighth is cut to the output's length."""
    plan = chain(3, 0.0)
    plan = replace(plan, survival=np.array([[[0.0] * 3, [0.0] * 3, [0.0] * 3, [1.0, 0.5, 0.0]]]))
    result = engine(name)(flat_cost(), limits(plan), requests_of([0.0], [4], [10]))
    # Emitted after each step: 1, 3, 6, 8, 10 (2.5 + 1 = 3.5, 6.0, 8.5, 11.0 rounded down, cut to 10).
    assert result.finish_s[0] == 5.0
    assert result.speculation.drafted_tokens == 4 * 3
    assert result.speculation.extra_tokens == 9 - 4
    assert result.itl_counts.sum() == 4  # one latency per pass …
    by_tokens = result.itl_counts.copy()
    by_tokens[0] += result.speculation.extra_tokens  # … and five of 0 s by tokens
    assert itl_quantiles_s(by_tokens, np.array([0.5]))[0] == 0.0
    assert itl_quantiles_s(by_tokens, np.array([0.9]))[0] == pytest.approx(1.0, rel=0.005)


@BOTH
def test_speed_up_at_batch_1_is_leviathans_walltime_factor(name):
    """Theorem 3.8 at α = 0.8, γ = 5 and c = 1/16, with the cost of verification flat."""
    simulate_with, long = engine(name), requests_of([0.0], [1], [5001])
    plain = simulate_with(flat_cost(), limits(None), long).end_s
    fast = simulate_with(flat_cost(), limits(chain(5, 0.8, draft_s=1 / 16)), long).end_s
    assert plain / fast == pytest.approx(tokens_per_pass(0.8, 5) / (5 / 16 + 1), rel=2e-3)


@BOTH
def test_all_of_the_draft_time_of_rejected_drafts_is_waste(name):
    """Nothing accepted: a step verifies γ + 1 tokens for one, so γ/(γ + 1) of it and all drafting are wasted."""
    result = engine(name)(flat_cost(), limits(chain(3, 0.0, draft_s=0.5)), requests_of([0.0], [4], [11]))
    assert result.speculation.wasted_s[0] == pytest.approx(10 * (0.75 + 3 * 0.5))
    assert result.speculation.draft_s == pytest.approx(10 * 3 * 0.5)
    accepted = engine(name)(flat_cost(), limits(chain(3, 1.0, draft_s=0.5)), requests_of([0.0], [4], [13]))
    assert accepted.speculation.wasted_s[0] == pytest.approx(0.0)


@BOTH
def test_a_classless_request_is_of_class_0_and_faster_classes_finish_first(name):
    plan = chain(3, 0.0, classes=[0.0, 1.0])
    both = replace(requests_of([0.0, 0.0], [4, 4], [41, 41]), acceptance_class=np.array([0, 1]))
    slow, fast = engine(name)(flat_cost(), limits(plan), both).finish_s
    assert (slow, fast) == (41.0, 11.0)
    alone = engine(name)(flat_cost(), limits(plan), requests_of([0.0], [4], [41]))
    assert alone.finish_s[0] == 41.0


@BOTH
def test_no_drafts_above_a_batch(name):
    """Drafting stops while four decode, and goes on when one is left."""
    levels = [2 if batch < 2 else 0 for batch in range(SEQS + 1)]
    result = engine(name)(
        flat_cost(), limits(chain(2, 1.0, levels=levels)), requests_of([0.0] * 4, [4] * 4, [9] * 3 + [21])
    )
    assert result.speculation.passes[0, 4] == 8
    assert result.speculation.passes[2, 1] == 4
    assert result.finish_s[3] == 9.0 + 4.0


@BOTH
def test_the_budget_lowers_the_level(name):
    """Of 10 tokens per step, four sequences cannot have five each; two each leave a token over."""
    plan = chain(4, 1.0)
    few = limits(plan, max_num_batched_tokens=10, max_num_seqs=4)
    assert plan.levels(4, 10).tolist() == [4, 4, 3, 2, 1]
    result = engine(name)(flat_cost(), few, requests_of([0.0] * 4, [1] * 4, [9] * 4))
    assert result.speculation.passes[1, 4] == 4
    assert max(np.flatnonzero(result.steps_by_tokens)) <= 10


@BOTH
def test_look_ahead_slots_take_blocks(name):
    """One token and four drafts on 12 reach into a second block of 16 two passes before the tokens do."""
    plan = chain(4, 0.0)
    result = engine(name)(flat_cost(), limits(plan, num_kv_blocks=8), requests_of([0.0], [12], [3]))
    assert result.totals["max_kv_blocks"] == 2
    plain = engine(name)(flat_cost(), limits(None, num_kv_blocks=8), requests_of([0.0], [12], [3]))
    assert plain.totals["max_kv_blocks"] == 1
    # A request whose drafts can never fit is rejected (P2).
    assert engine(name)(flat_cost(), limits(plan, num_kv_blocks=1), requests_of([0.0], [12], [3])).status[0] == 1


def test_level_0_alone_is_the_plain_engine_bit_for_bit():
    rng = np.random.default_rng(5)
    requests = requests_of(np.cumsum(rng.exponential(0.4, 60)), rng.integers(1, 60, 60), rng.integers(1, 60, 60))
    cost = replace(flat_cost(), decode_slope_s=np.array([2.0**-12]))
    plan = chain(0, 0.7)
    plan = replace(plan, cost=replace(plan.cost, slope_s=np.full((1, 1), 2.0**-12)))
    few = {"num_kv_blocks": 30, "block_size": 4, "max_num_seqs": 8}
    ours, plain = simulate(cost, limits(plan, **few), requests), simulate(cost, limits(None, **few), requests)
    for field in ("status", "first_token_s", "finish_s", "preemptions", "steps_by_tokens"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(plain, field), err_msg=field)
    np.testing.assert_allclose(ours.busy_s, plain.busy_s, rtol=1e-12)
    assert plain.totals["preemptions"] > 0


def test_drawing_token_by_token_agrees_with_tokens_per_pass_drawn_once():
    """The rule's price in accuracy: means within 2 %, a request's own latency within some percent."""
    rng = np.random.default_rng(3)
    n = 120
    requests = requests_of(np.cumsum(rng.exponential(8.0, n)), rng.integers(5, 60, n), rng.integers(60, 200, n))
    settings_ = limits(chain(4, 0.7), max_num_seqs=16)
    ours = simulate_reference(flat_cost(), settings_, requests)
    drawn = simulate_reference(flat_cost(), settings_, requests, acceptance_seed=1)
    assert ours.totals["decode_tokens"] == pytest.approx(drawn.totals["decode_tokens"], rel=0.02)
    latency, true = ours.finish_s - ours.arrival_s, drawn.finish_s - drawn.arrival_s
    assert latency.mean() == pytest.approx(true.mean(), rel=0.02)
    assert 0.005 < np.median(np.abs(latency / true - 1)) < 0.1
    again = simulate_reference(flat_cost(), settings_, requests, acceptance_seed=1)
    np.testing.assert_array_equal(again.finish_s, drawn.finish_s)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"survival": np.array([[[0.0, 0.0], [1.2, 0.0], [0.5, 0.5]]])}, "0 … 1"),
        ({"survival": np.array([[[0.0, 0.0], [0.2, 0.0], [0.5, 0.6]]])}, "not rise"),
        ({"survival": np.array([[[0.0, 0.0], [0.5, 0.5], [0.5, 0.5]]])}, "more drafts accepted"),
        ({"survival": np.zeros((1, 2, 2))}, "3 levels"),
        ({"level_by_batch": np.array([0, 3])}, "levels 0 … 2"),
    ],
)
def test_bad_plans_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        replace(chain(2, 0.5), **change)


def test_tables_shorter_than_the_settings_are_refused():
    with pytest.raises(InputError, match="tables end at 64 sequences"):
        limits(chain(2, 0.5), max_num_seqs=65)
    with pytest.raises(InputError, match="rows"):
        simulate(step_cost([0.0] + [1.0] * TOKENS, [0.0] * 65), limits(chain(2, 0.5)), requests_of([0.0], [1], [2]))


@entry
def join(batch, slot, step, rate, prompt, emitted, kept):
    speculation.join(batch, slot, step, rate, prompt, emitted, 1 << 40, kept)


@entry
def leave(batch, slot):
    speculation.leave(batch, slot)


@entry
def take_blocks_of_steps(batch, step, k, free, owned, d0, q, profile):
    return speculation.take_blocks_of_steps(batch, step, k, free, owned, d0, q, profile)


@entry
def steps_to_any_gift(batch, step):
    return speculation.steps_to_any_gift(batch, step)


@entry
def steps_to_gift(batch, step, k):
    return speculation.steps_to_gift(batch, step, k)


class PlainBlocks:
    """What :mod:`simulator.engine.speculation` keeps in rings, sequence by sequence."""

    def __init__(self, block_size, lookahead, groups):
        self.block_size, self.lookahead, self.groups = block_size, lookahead, groups
        self.running = {}

    def join(self, slot, step, rate, prompt, emitted, kept):
        self.running[slot] = [step, rate, prompt - 1, emitted << speculation.UNIT_BITS, prompt + emitted - 1, kept]

    def computed(self, slot, step):
        since, rate, base, progress, *_ = self.running[slot]
        return base + ((progress + (step - since) * rate) >> speculation.UNIT_BITS)

    def passed(self, slot, step):
        """Blocks of a windowed group that lie before a sequence's window (W2)."""
        groups, tokens = self.groups, self.computed(slot, step)
        passed = tokens - tokens % groups.window if groups.chunked else max(0, tokens + 1 - groups.window)
        return passed // self.block_size if groups.windowed else 0

    def owned(self, slot, step, held=None):
        """Blocks of a sequence at a step that has blocks for ``held`` tokens (W3, W6), with those it has left that can be found (W10)."""
        tokens, kept = self.running[slot][4:]
        pages = -(-(tokens if held is None else held) // self.block_size)
        began = min(kept, self.passed(slot, self.running[slot][0]))
        lost = began + max(0, self.passed(slot, step) - max(kept, began))
        return self.groups.count * pages - self.groups.windowed * lost

    def leave_what_can_be_found(self, step):
        """Sequences whose windows have left a block between a step and the next that can be found."""
        return {
            s for s, state in self.running.items() if self.passed(s, step) < min(self.passed(s, step + 1), state[5])
        }

    def all_owned(self, step):
        return sum(self.owned(slot, step) for slot in self.running)

    def needs(self, step):
        """Tokens that each sequence must have blocks for."""
        return {
            slot: max(state[4], self.computed(slot, step) + 1 + self.lookahead) for slot, state in self.running.items()
        }


@st.composite
def kv_groups(draw):
    if draw(st.booleans()):
        return KvGroups()
    return KvGroups(draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.booleans()))


def test_a_segment_ends_where_a_window_is_looked_at_that_soon_leaves_what_can_be_found():
    # One token a pass, blocks of 3, W = 9: with 4 tokens computed at step 0 the first block is left once 11 are, so before step 7. It is too far off to
    # be listed and is looked for every 3 steps: a segment from step 5 on must not pass the look before step 6, which finds it one step on.
    plan = limits(chain(1, 0.0), block_size=3, kv_groups=KvGroups(0, 1, 9))
    batch = new_spec(flat_cost(window=9), plan, requests_of([0.0], [1], [1])).batch
    batch.slots[0, speculation.PROGRESS] = 0
    join(batch, 0, 0, speculation.UNIT, 4, 1, 1)
    step, ends = 0, []
    while not batch.ints[speculation.N_GIFTS]:
        k = int(steps_to_gift(batch, step, 3))
        step += take_blocks_of_steps(batch, step, k, 100, 0, 1.0, 0.0, np.zeros(3, dtype=np.int64))[0]
        ends.append(step)
    assert ends == [3, 6, 7]
    late = new_spec(flat_cost(window=9), plan, requests_of([0.0], [1], [1])).batch
    join(late, 0, 0, speculation.UNIT, 4, 1, 1)
    for step, k in ((0, 3), (3, 2)):
        take_blocks_of_steps(late, step, k, 100, 0, 1.0, 0.0, np.zeros(3, dtype=np.int64))
    assert steps_to_gift(late, 5, 3) == 1


@settings(max_examples=200, deadline=None)
@given(st.data(), kv_groups())
def test_the_rings_of_blocks_equal_a_plain_model(data, groups):
    block_size, depth = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    plan = limits(chain(depth, 0.5), block_size=block_size, kv_groups=groups)
    cost = flat_cost(window=groups.window, window_chunked=groups.chunked) if groups.windowed else flat_cost()
    batch = new_spec(cost, plan, requests_of([0.0], [1], [1])).batch
    plain = PlainBlocks(block_size, depth, groups)
    profile = np.zeros(block_size, dtype=np.int64)
    step, unit = 0, speculation.UNIT
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["join", "leave", "steps", "steps"]))
        if action == "join" and len(plain.running) < 8:
            slot = next(s for s in range(8) if s not in plain.running)
            rate = data.draw(st.integers(unit, (depth + 1) * unit))
            prompt, emitted = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 5))
            kept = data.draw(st.booleans()) * ((prompt + emitted - 1) // block_size) if groups.windowed else 0
            batch.slots[slot, speculation.PROGRESS] = 0
            join(batch, slot, step, rate, prompt, emitted, kept)
            plain.join(slot, step, rate, prompt, emitted, kept)
        elif action == "leave" and plain.running:
            slot = data.draw(st.sampled_from(sorted(plain.running)))
            assert batch.slots[slot, speculation.PAGES] == -(-plain.running[slot][4] // block_size)
            assert batch.slots[slot, speculation.PASSED] == plain.passed(slot, step)
            leave(batch, slot)
            del plain.running[slot]
        elif action == "steps":
            k, free = data.draw(st.integers(1, block_size if groups.windowed else 30)), data.draw(st.integers(0, 60))
            k = int(steps_to_gift(batch, step, k))
            d0, q = data.draw(st.integers(1, 5)) / 8, data.draw(st.integers(0, 5)) / 64
            before = plain.all_owned(step)
            all_blocks = before + free
            due = sum(plain.owned(slot, step, held) for slot, held in plain.needs(step).items())
            all_blocks = max(all_blocks, due)
            taken, total, seen, given = 0, 0.0, [], []
            while taken < k:
                held = plain.needs(step + taken)
                if sum(plain.owned(slot, step + taken, tokens) for slot, tokens in held.items()) > all_blocks:
                    break
                for slot, tokens in held.items():
                    plain.running[slot][4] = tokens
                seen.append(plain.all_owned(step + taken))
                total += seen[-1] * (d0 + q * taken)
                taken += 1
                given.append(seen[-1] - plain.all_owned(step + taken))
            profile[:] = 0
            assert not any(given[: steps_to_any_gift(batch, step) - 1])
            assert not any(plain.leave_what_can_be_found(step + j) for j in range(taken - 1))
            leaving = plain.leave_what_can_be_found(step + taken - 1) if taken else set()
            found = take_blocks_of_steps(batch, step, k, all_blocks - before, before, d0, q, profile)
            assert set(batch.slots[: batch.ints[speculation.N_GIFTS], speculation.GIFT].tolist()) == leaving
            batch.ints[speculation.N_GIFTS] = 0
            step += taken
            assert found == (taken, plain.all_owned(step), total)
            assert not groups.windowed or profile.tolist() == seen + [0] * (block_size - taken)
        sums = sum(rate for _, rate, *_ in plain.running.values())
        assert batch.ints[speculation.RATES] == sums
