"""Random mixtures of everything a replica can do: the compiled engine against the reference engine."""

import os

import pytest
from hypothesis import given, settings

from tests.engine.comparing import assert_equal
from tests.engine.mixtures import mixtures, random_mixture


@settings(max_examples=200, deadline=None)
@given(mixtures())
def test_engines_agree_exactly_on_drawn_mixtures(case):
    assert_equal(case)
