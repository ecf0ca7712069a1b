"""What every op must do, run over every op in torch.ops.lamina: a new op is tested here as soon as it is registered."""

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from cases import PAIR_IDS, PAIRS, SUITES
from tolerances import assert_exact
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import lamina

every_case = pytest.mark.parametrize(("suite", "case"), PAIRS, ids=PAIR_IDS)
OWN = [pair for pair in PAIRS if pair[0].own_kernel]
own_cases = pytest.mark.parametrize(("suite", "case"), OWN, ids=[f"{suite.op}-{case.id}" for suite, case in OWN])


def registered_ops() -> list[str]:
    """The ops of torch.ops.lamina, read from the dispatcher and not from a list somebody keeps."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lamina::")}
    return sorted(name.removeprefix("lamina::") for name in names)


def tagged(tag: str, most: int | None = None):
    """The cases with a tag, of every op; at most so many of each."""
    chosen = []
    for suite in SUITES.values():
        some = [(suite, case) for case in suite.cases if tag in case.tags][:most]
        assert some, f"no case of {suite.op} is tagged {tag}"
        chosen += some
    return pytest.mark.parametrize(("suite", "case"), chosen, ids=[f"{suite.op}-{case.id}" for suite, case in chosen])


def _first_of_each_tag():
    chosen = []
    for suite in SUITES.values():
        firsts = {tag: case.id for case in reversed(suite.cases) for tag in case.tags}
        chosen += [(suite, case) for case in suite.cases if case.id in firsts.values()]
    return pytest.mark.parametrize(("suite", "case"), chosen, ids=[f"{suite.op}-{case.id}" for suite, case in chosen])


one_case_of_each_tag = _first_of_each_tag()


def op_of(suite) -> torch._ops.OpOverload:
    return getattr(torch.ops.lamina, suite.op).default


def first_tensor(inputs: tuple) -> torch.Tensor:
    """An op's first argument is a tensor or a list of them."""
    return tree_leaves(inputs)[0]


def outputs(result) -> tuple[torch.Tensor, ...]:
    """An op gives one tensor or several."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def assert_same(actual, expected, what: str = "") -> None:
    """All outputs, bit for bit."""
    for one, other in zip(outputs(actual), outputs(expected), strict=True):
        assert_exact(one, other, what)


def doubled(result) -> tuple[torch.Tensor, ...]:
    return tuple(output * 2 for output in outputs(result))


def test_every_op_has_cases():
    ops = registered_ops()
    assert len(ops) >= 2
    assert sorted(SUITES) == ops
    for suite in SUITES.values():
        tags = {tag for case in suite.cases for tag in case.tags}
        assert {"empty", "one", "odd", "strided", "bf16", "nd", "threads"} <= tags, suite.op
        ids = [case.id for case in suite.cases]
        assert len(set(ids)) == len(ids), suite.op


def test_cases_repeat():
    """The same seed gives the same inputs, or a failure could not be replayed."""
    for suite in SUITES.values():
        case = suite.cases[-1]
        for first, second in zip(tree_leaves(case.inputs(5)), tree_leaves(case.inputs(5)), strict=True):
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        assert not torch.equal(first_tensor(case.inputs(5)), first_tensor(case.inputs(6)))


@every_case
def test_matches_float64(suite, case, seed):
    inputs = case.inputs(seed)
    suite.check(op_of(suite)(*inputs), inputs)


@every_case
def test_inputs_are_not_written(suite, case, seed):
    inputs, before = case.inputs(seed), case.inputs(seed)
    op_of(suite)(*inputs)
    for tensor, expected in zip(tree_leaves(inputs), tree_leaves(before), strict=True):
        if isinstance(tensor, torch.Tensor):
            assert_exact(tensor, expected)


@own_cases
def test_strides_do_not_matter(suite, case, seed):
    """The same values in another place of memory give the same bits."""
    inputs = case.inputs(seed)
    plain = tree_map_only(torch.Tensor, lambda t: t.contiguous().clone(), inputs)
    assert_same(op_of(suite)(*inputs), op_of(suite)(*plain))


@every_case
def test_fake_agrees_with_real(suite, case, seed):
    inputs = case.inputs(seed)
    real = op_of(suite)(*inputs)
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fake = op_of(suite)(*tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    for promised, given in zip(outputs(fake), outputs(real), strict=True):
        assert promised.shape == given.shape
        assert promised.dtype == given.dtype
        assert promised.device == given.device
        assert given.numel() == 0 or promised.stride() == given.stride()


@one_case_of_each_tag
def test_opcheck(suite, case, seed):
    """Of registration, not of numbers: it takes as long as fifty calls."""
    torch.library.opcheck(op_of(suite), case.inputs(seed))


@own_cases
def test_repeats_bit_for_bit_and_for_every_thread_count(suite, case, seed):
    inputs = case.inputs(seed)
    torch.set_num_threads(1)
    alone = op_of(suite)(*inputs)
    assert_same(op_of(suite)(*inputs), alone, "second run")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(op_of(suite)(*inputs), alone, f"{threads} threads")


@every_case
def test_reads_no_memory_that_nobody_wrote(suite, case, seed, poison):
    inputs = case.inputs(seed)
    suite.check(op_of(suite)(*inputs), inputs)
    assert poison.calls > 0, "the op allocated nothing that the poison could reach"


@tagged("threads")
def test_workspace_poison_changes_nothing(suite, case, seed, poison):
    """Bit for bit, and on a workspace that a larger call left behind."""
    inputs = case.inputs(seed)
    poisoned = op_of(suite)(*inputs)
    lamina._C.poison_workspace(False)
    assert_same(poisoned, op_of(suite)(*inputs))


@tagged("threads")
def test_calls_from_several_python_threads(suite, case, seed):
    """Each thread has inputs of its own, so that a shared scratch buffer would mix them up."""
    op = op_of(suite)
    calls = [case.inputs(seed + i) for i in range(4)]
    expected = [op(*inputs) for inputs in calls]

    def run(i: int) -> list:
        return [op(*calls[i]) for _ in range(8)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for results, right in zip(pool.map(run, range(len(calls))), expected, strict=True):
            for result in results:
                assert_same(result, right)


@tagged("odd", most=6)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(suite, case, seed, dynamic):
    inputs = case.inputs(seed)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: doubled(op_of(suite)(*args)), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    assert_same(compiled(*inputs), doubled(op_of(suite)(*inputs)))


@tagged("strided", most=1)
def test_compile_with_inductor(suite, case, seed):
    """Inductor relies on the strides that the fake implementation promises."""
    inputs = case.inputs(seed)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op_of(suite)(*args), fullgraph=True)
    assert_same(compiled(*inputs), op_of(suite)(*inputs))


class Call(torch.nn.Module):
    """One op as a module; arguments that are no tensors are constants of it, as torch.export wants them."""

    def __init__(self, op: torch._ops.OpOverload, inputs: tuple):
        super().__init__()
        leaves, self.form = tree_flatten(inputs)
        self.op, self.leaves = op, [None if isinstance(i, torch.Tensor) else i for i in leaves]
        self.places = [i for i, value in enumerate(leaves) if isinstance(value, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor):
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return self.op(*tree_unflatten(leaves, self.form))


@tagged("odd", most=3)
def test_export(suite, case, seed):
    inputs = case.inputs(seed)
    module = Call(op_of(suite), inputs)
    tensors = tuple(i for i in tree_leaves(inputs) if isinstance(i, torch.Tensor))
    exported = torch.export.export(module, tensors)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert op_of(suite) in calls
    assert_same(exported.module()(*tensors), module(*tensors))


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_meta_tensors_give_shapes(suite):
    """On device meta the dispatcher runs the fake implementation: shapes without memory."""
    case = next(case for case in suite.cases if "odd" in case.tags)
    inputs = case.inputs()
    meta = op_of(suite)(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
    for shapes, real in zip(outputs(meta), outputs(op_of(suite)(*inputs)), strict=True):
        assert shapes.device.type == "meta"
        assert shapes.shape == real.shape


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_function_transform_does_not_need_autograd(suite):
    """Under no_grad and inference_mode the op gives the same bits and no graph."""
    inputs = next(case for case in suite.cases if "odd" in case.tags).inputs()
    plain = op_of(suite)(*inputs)
    with torch.inference_mode():
        assert_same(op_of(suite)(*inputs), plain)
    if first_tensor(inputs).is_floating_point():
        first_tensor(inputs).requires_grad_()
    with torch.no_grad():
        quiet = op_of(suite)(*inputs)
    assert not any(output.requires_grad for output in outputs(quiet))
    assert_same(quiet, plain)


def test_the_reference_itself_is_judged():
    """A truth that is wrong by a little is noticed: the suite's tolerances are below its signals."""
    for suite in SUITES.values():
        inputs = suite.case(next(case.id for case in suite.cases if "threads" in case.tags)).inputs()
        dtypes = [output.dtype for output in outputs(op_of(suite)(*inputs))]
        truths = outputs(cases.SUITES[suite.op].truth(*inputs))
        right = [truth.to(dtype) for truth, dtype in zip(truths, dtypes, strict=True)]
        judge = lambda result: suite.check(result[0] if len(result) == 1 else tuple(result), inputs)  # noqa: B023, E731
        judge(right)
        for i, output in enumerate(right):
            wrong = [other.clone(memory_format=torch.contiguous_format) for other in right]
            wrong[i].view(-1)[output.numel() // 2] += (0.05 * output.abs().max()).to(output.dtype)
            with pytest.raises(AssertionError, match=r"1 of \d+ elements (are off|differ)"):
                judge(wrong)
