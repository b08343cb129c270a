"""The states of Python's and numpy's global generators, which are read anew only where somebody drew from them."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from kfac_triton.capture import randomness
from kfac_triton.capture.randomness import OtherGenerators


@pytest.fixture(autouse=True)
def _left_as_they_were():
    python, numpy, bits = random.getstate(), np.random.get_state(), np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(bits)
    random.setstate(python)
    np.random.set_state(numpy)


def same_numpy() -> None:
    """The twister as it was, and no normal number kept."""
    state = np.random.get_state()
    np.random.set_state((*state[:3], 0, 0.0))


DRAWS = {
    "nothing": lambda: None,
    "Python": random.random,
    "Python, a normal number": lambda: random.gauss(0, 1),
    "numpy": lambda: np.random.rand(3),
    "numpy, a normal number": np.random.normal,
    "numpy, a whole round of the twister": lambda: np.random.randint(0, 2**32, 624, dtype=np.uint32),
    "numpy forgets a normal number": same_numpy,
}


@pytest.mark.parametrize("kept", [False, True], ids=["nothing kept", "second normal numbers kept"])
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_shows_and_is_undone(name, kept):
    random.seed(1)
    np.random.seed(1)
    if kept:
        random.gauss(0, 1)
        np.random.normal()
    before = OtherGenerators.now()
    python, numpy = random.getstate(), np.random.get_state()
    DRAWS[name]()
    drawn = random.getstate() != python or str(np.random.get_state()) != str(numpy)
    assert before.moved() is drawn
    before.restore()
    assert not before.moved()
    assert random.getstate() == python and str(np.random.get_state()) == str(numpy)
    assert drawn or name == "nothing" or (name == "numpy forgets a normal number" and not kept)


def test_a_state_that_was_there_before_is_not_taken_for_a_later_one():
    """numpy's twister does not move where the second of two normal numbers is drawn or given back."""
    np.random.seed(1)
    np.random.normal()
    kept = np.random.get_state()
    np.random.normal()
    before = OtherGenerators.now()
    np.random.set_state(kept)
    assert before.moved() and OtherGenerators.now().numpy[3] == 1


def test_another_bit_generator():
    before = OtherGenerators.now()
    np.random.set_bit_generator(np.random.MT19937(5))
    assert before.moved()
    before = OtherGenerators.now()
    assert not before.moved()
    np.random.rand()
    assert before.moved()


def test_where_the_bytes_are_not_found_the_states_are_read(monkeypatch):
    for name in ("_memory", "_bit_generator"):
        last = randomness._LastStates()
        with monkeypatch.context() as patch:
            patch.setattr(randomness, "_LAST_STATES", last)
            patch.setattr(randomness, name, lambda: None)
            before = OtherGenerators.now()
            assert last._memory is None and not before.moved()
            random.random()
            assert before.moved()


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="another Python keeps it elsewhere")
def test_nothing_is_read_while_nobody_draws():
    before = OtherGenerators.now()
    assert OtherGenerators.now() is before
