"""A step's own cost in Python, counted: a loop over parameters or a check too many is seen here, however busy the machine is."""

import pytest

from bench.calls import calls_of_a_step


@pytest.mark.parametrize(("placement", "most"), [("inplace", 200), ("probe", 300)])
def test_a_step_of_four_parameters(placement, most):
    calls = calls_of_a_step(placement)
    assert 0 < calls.total() <= most, calls.most_common(20)
