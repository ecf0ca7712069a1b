"""When a form of inputs gets a plan: the first at once, others when they come again and again."""

from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from lamina.plan import plans
from lamina.plan.plans import Plans


@pytest.fixture
def made(monkeypatch):
    """The sizes of the inputs that were recorded, and what timing is to say."""

    notes = SimpleNamespace(sizes=[], timed=0, faster=True)
    recorded = plans.record

    def record(graph, inputs, static):
        notes.sizes.append(inputs[0].shape[0])
        return recorded(graph, inputs, static)

    def is_faster(*given):
        notes.timed += 1
        return notes.faster

    monkeypatch.setattr(plans, "record", record)
    monkeypatch.setattr(plans, "_is_faster", is_faster)
    return notes


def of_relu(measure: bool = True) -> Plans:
    return Plans(fx.symbolic_trace(nn.ReLU()), [], 1, measure)


def test_the_first_form_gets_its_plan_at_once(made):
    assert of_relu().run((torch.randn(3),)) is not None
    assert made.sizes == [3]


def test_another_form_gets_one_when_it_comes_again(made):
    graph = of_relu()
    graph.run((torch.randn(3),))
    assert [graph.run((torch.randn(4),)) is not None for _ in range(4)] == [False, False, True, True]
    assert made.sizes == [3, 4]


def test_forms_that_come_once_are_never_recorded(made):
    graph = of_relu()
    for n in range(3, 40):
        graph.run((torch.randn(n),))
    assert made.sizes == [3]


@pytest.mark.parametrize("faster", [True, False])
def test_what_was_so_four_times_is_not_timed_again(made, faster):
    made.faster = faster
    graph = of_relu()
    for n in range(3, 9):
        for _ in range(4):
            given = graph.run((torch.randn(n),)) is not None
        assert given is faster
    assert made.timed == 4


def test_without_timing_every_form_gets_its_plan(made):
    graph = of_relu(measure=False)
    for n in range(3, 7):
        assert graph.run((torch.randn(n),)) is not None
    assert made.sizes == [3, 4, 5, 6]
    assert made.timed == 0


def test_the_least_used_of_many_forms_goes(made):
    graph = of_relu(measure=False)
    for n in range(1, 20):
        graph.run((torch.randn(n),))
        graph.run((torch.randn(1),))
    assert len(graph.entries) == 8
    assert made.sizes.count(1) == 1
