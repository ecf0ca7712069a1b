"""int8_conv2d at the convolutions of named models, as they follow each other inside a network: int8 codes in, bias and
ReLU, int8 codes out; against eager float32 convolutions and oneDNN's int8 ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.quant.weights import quantize_weight
from lamina.reference.int8_conv2d import int8_conv2d as reference
from lamina.reference.int8_linear import requantize

X_SCALE = 0.02


@dataclass(frozen=True)
class Shape:
    """[batch, c, size, size] -> n channels by a square kernel with its usual padding; `count` times in the model."""

    batch: int
    c: int
    size: int
    n: int
    kernel: int
    stride: int
    groups: int
    residual: bool
    count: int

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def products(self) -> int:
        return self.batch * self.out_size**2 * self.n * self.c // self.groups * self.kernel**2

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.c}x{self.size}x{self.size}", f"{self.n}", f"k{self.kernel}"]
        words += [f"s{self.stride}"] if self.stride > 1 else []
        words += ["depthwise"] if self.groups == self.c else [f"g{self.groups}"] if self.groups > 1 else []
        return "-".join(words + (["residual"] if self.residual else []))


@dataclass(frozen=True)
class Inputs:
    """x: codes, channels_last; weight: [n, c / groups, k, k]; residual: codes like the output, or None."""

    shape: Shape
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor | None
    out_scale: float


def workloads() -> Iterator[Workload]:
    """Every line of shapes/int8_conv2d.txt at each batch size, and the whole of each model at batch 1."""
    models: dict[str, list[Shape]] = {}
    for model, *sizes, extras, count, batches in read_shapes("int8_conv2d", columns=10):
        c, size, n, kernel, stride, groups = map(int, sizes)
        for batch in map(int, batches.split(",")):
            shape = Shape(batch, c, size, n, kernel, stride, groups, extras == "residual", int(count))
            yield _workload(model, str(shape), [shape])
            if batch == 1 and groups == 1:
                models.setdefault(model, []).append(shape)
    for model, shapes in models.items():
        yield _workload(model, "all_convolutions", [shape for shape in shapes for _ in range(shape.count)])


def _workload(model: str, name: str, shapes: Sequence[Shape]) -> Workload:
    """One after the other; layers of one shape share their memory, as if each had found it in the caches."""
    products = sum(shape.products for shape in shapes)

    def flows(shape: Shape) -> int:
        pixels = shape.batch * shape.out_size**2 * shape.n * (2 if shape.residual else 1)
        return shape.batch * shape.c * shape.size**2 + pixels + shape.n * shape.c // shape.groups * shape.kernel**2

    only = shapes[0] if len(shapes) == 1 else None
    depthwise = only is not None and only.groups == only.c
    quick = only is not None and (only.batch, only.kernel, only.stride) == (1, 3, 1)
    dims = {"B": only.batch, "C": only.c, "N": only.n, "K": only.kernel, "S": only.stride} if only else {}
    return Workload(
        id=f"int8_conv2d/{model}/{name}",
        op="int8_conv2d",
        shape=name,
        dims=dims,
        make_inputs=lambda: _all_inputs(shapes),
        run=lambda inputs: _in_a_row(_lamina, inputs),
        baselines={
            "eager": lambda inputs: _in_a_row(_eager, inputs),
            "onednn int8": lambda inputs: _in_a_row(_onednn, inputs),
        },
        check=_check,
        flops=lambda inputs: 2 * products,
        bytes=lambda inputs: sum(flows(shape) for shape in shapes),
        precision=lambda inputs: "int8",
        tags=frozenset({"op", model} | ({"depthwise"} if depthwise else set()) | ({"quick"} if quick else set())),
    )


def _all_inputs(shapes: Sequence[Shape]) -> list[Inputs]:
    made = {shape: _inputs(shape) for shape in dict.fromkeys(shapes)}
    return [made[shape] for shape in shapes]


def _inputs(shape: Shape) -> Inputs:
    generator = torch.Generator().manual_seed(shape.c * 7 + shape.n * 3 + shape.kernel)

    def codes(channels: int, size: int) -> torch.Tensor:
        # As behind a ReLU.
        drawn = torch.randint(0, 128, (shape.batch, channels, size, size), generator=generator, dtype=torch.int8)
        return drawn.contiguous(memory_format=torch.channels_last)

    depth = shape.c // shape.groups * shape.kernel**2
    weight = torch.randn(shape.n, shape.c // shape.groups, shape.kernel, shape.kernel, generator=generator)
    return Inputs(
        shape=shape,
        x=codes(shape.c, shape.size),
        weight=weight,
        bias=torch.randn(shape.n, generator=generator),
        residual=codes(shape.n, shape.out_size) if shape.residual else None,
        # Three standard deviations of the sums at code 127.
        out_scale=3 * 74 * X_SCALE * depth**0.5 / 127,
    )


def _in_a_row(prepare: Callable[[Inputs], Callable], inputs: Sequence[Inputs]) -> Callable:
    prepared = {id(each): prepare(each) for each in inputs}
    calls = [prepared[id(each)] for each in inputs]
    if len(calls) == 1:
        return calls[0]

    def run() -> torch.Tensor:
        for call in calls:
            result = call()
        return result

    return run


def _lamina(inputs: Inputs) -> Callable:
    shape, packed = inputs.shape, lamina.ops.pack_int8_conv_weight(inputs.weight, groups=inputs.shape.groups)
    scales = {"x_scale": torch.tensor(X_SCALE), "out_scale": torch.tensor(inputs.out_scale)}
    if inputs.residual is not None:
        scales |= {"residual": inputs.residual, "residual_scale": torch.tensor(X_SCALE)}

    def run() -> torch.Tensor:
        return lamina.ops.int8_conv2d(
            inputs.x, packed, inputs.bias, shape.stride, shape.kernel // 2, activation="relu", **scales
        )

    return run


def _eager(inputs: Inputs) -> Callable:
    """The convolution alone: what follows it would only cost eager more."""
    shape = inputs.shape
    x = (inputs.x * X_SCALE).contiguous(memory_format=torch.channels_last)
    weight = inputs.weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, inputs.bias, shape.stride, shape.kernel // 2, 1, shape.groups)


def _onednn(inputs: Inputs) -> Callable:
    """The call that torch.compile makes of a quantized convolution: unsigned codes, ReLU or sum and ReLU fused."""
    shape = inputs.shape
    codes, scale = quantize_weight(inputs.weight)
    stride, padding, dilation = [shape.stride] * 2, [shape.kernel // 2] * 2, [1, 1]
    x, residual = (None if t is None else t.to(torch.uint8) for t in (inputs.x, inputs.residual))
    geometry = stride, padding, dilation, shape.groups
    weight = torch.ops.onednn.qconv_prepack(codes, scale, X_SCALE, 0, *geometry, list(x.shape))
    zeros = torch.zeros(shape.n, dtype=torch.int64)
    common = x, X_SCALE, 0, weight, scale, zeros
    if residual is None:
        return lambda: torch.ops.onednn.qconv2d_pointwise(
            *common, inputs.bias, *geometry, inputs.out_scale, 0, torch.uint8, "relu", [], ""
        )
    return lambda: torch.ops.onednn.qconv2d_pointwise.binary(
        *common,
        residual,
        inputs.bias,
        *geometry,
        inputs.out_scale,
        0,
        torch.uint8,
        X_SCALE,
        0,
        "sum",
        1.0,
        "relu",
        [],
        "",
    )


def _check(inputs: Sequence[Inputs], output: torch.Tensor) -> Gate:
    """Codes, at most one apart where a value lies between two."""
    last = inputs[-1]
    shape, pad = last.shape, last.shape.kernel // 2
    truth = reference(
        last.x,
        *quantize_weight(last.weight),
        last.bias,
        (shape.stride, shape.stride),
        (pad, pad, pad, pad),
        groups=shape.groups,
        activation="relu",
        residual=last.residual,
        residual_scale=None if last.residual is None else torch.tensor(X_SCALE),
        x_scale=torch.tensor(X_SCALE),
    )
    apart = (output.int() - requantize(truth, torch.tensor(last.out_scale)).int()).abs().max().item()
    return Gate.judge(apart, 1, "codes from the reference's")
