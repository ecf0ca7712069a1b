"""Where buffers lie in an arena: never on top of each other while both are needed, and in little memory."""

from hypothesis import given
from hypothesis import strategies as st

from lamina.plan.memory import ALIGNMENT, Need, layout

needs = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 12)).map(
        lambda t: Need(t[0], min(t[1:]), max(t[1:]))
    ),
    max_size=24,
)


@given(needs)
def test_no_two_that_live_together_overlap(needs):
    offsets, total = layout(needs)
    for i, (a, at) in enumerate(zip(needs, offsets, strict=True)):
        assert at % ALIGNMENT == 0
        assert 0 <= at <= at + a.size <= total
        for b, other in zip(needs[:i], offsets[:i], strict=True):
            together = a.first <= b.last and b.first <= a.last
            assert not together or at + a.size <= other or other + b.size <= at


@given(needs)
def test_the_arena_is_between_the_most_that_lives_at_once_and_everything(needs):
    _, total = layout(needs)
    rounded = [(n.size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT for n in needs]
    alive = [sum(s for n, s in zip(needs, rounded, strict=True) if n.first <= t <= n.last) for t in range(13)]
    assert max(alive) <= total <= sum(rounded)


def test_a_chain_takes_its_two_largest_neighbours():
    chain = [Need(640, i, i + 1) for i in range(10)]
    assert layout(chain)[1] == 1280


def test_nothing_takes_nothing():
    assert layout([]) == ([], 0)
