"""torch.distributed.tensor.parallel: lamina's linear layers, divided among the ranks of a device mesh.

A packed weight cannot be sliced, and is no Parameter that torch's styles could distribute. Each rank unpacks it, takes
its rows or columns of codes, and packs them again; what goes in and out of the layer has the layouts that torch's
styles give it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import parallel as torch_parallel

from lamina.nn.packed_linear import Int8PackedLinear, PackedLinear
from lamina.nn.packed_weight import on_host
from lamina.nn.sparse_linear import SparseLinear
from lamina.ops.sparse_linear import FORWARD, unpack_sparse_weight

Layouts = Sequence[Placement]


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's ColwiseParallel, which also takes Int8Linear, Int8WeightOnlyLinear, SparseInt8Linear and SparseLinear.

    Each rank keeps the weights, scales and biases of its share of the outputs (as torch.chunk shares them out, so that
    sizes that ranks do not divide are ordinary), and computes them from the whole input. Every output is the bits of
    the undivided layer.

    Args as in torch's, and other modules are left to it. Ranks take the weight of the mesh's first rank, or with
    `src_data_rank=None` of `parallelize_module` each its own, which must be the same.

    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> from lamina.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel
    >>> lamina.swap_(model, lamina.Int8Dynamic())
    >>> parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, PackedLinear):
            return super()._apply(module, device_mesh)
        features = module.out_features
        _keep_share(module, device_mesh, 0, self.src_data_rank)

        def before(module: nn.Module, inputs: tuple) -> tuple:
            # Each rank knows its share of the gradient for the input: they are summed.
            x = _local(inputs[0], device_mesh, self.input_layouts, (Replicate(),), (Partial(),))
            return x, *inputs[1:]

        def after(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            if self.output_layouts == (Shard(-1),) and self.use_local_output:
                return output
            shape = torch.Size((*output.shape[:-1], features))
            whole = DTensor.from_local(
                output, device_mesh, (Shard(-1),), run_check=False, shape=shape, stride=_strides(shape)
            )
            return _laid_out(whole, self.output_layouts, self.use_local_output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return module


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's RowwiseParallel, which also takes Int8Linear, Int8WeightOnlyLinear, SparseInt8Linear and SparseLinear.

    Each rank keeps the weights of its share of the inputs, with the scales of the undivided channels, and its products
    are partial sums, which are added among ranks: in float32 from layers that quantize their input, whose result is
    then rounded once, and in the output's dtype from others. The first rank adds the bias; the layer's activation
    follows the sum.

    What that means for numbers: within a rank int8 sums are exact as ever. A rank that quantizes rows on the fly finds
    the scale of its part of a row, at most that of the whole, so that rounding errors are no larger than the undivided
    layer's, but other ones: outputs differ from it as int8 rounding does. With a static input scale all ranks share it,
    and outputs differ by the order of float32 sums alone. A row with NaN or infinity gives NaN, as everywhere.

    Args, weights and example as in `ColwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, PackedLinear):
            return super()._apply(module, device_mesh)
        _keep_share(module, device_mesh, 1, self.src_data_rank)
        activation, module._op_activation = module._op_activation, "none"
        given = getattr(module, "out_dtype", None)
        if hasattr(module, "out_dtype"):
            module.out_dtype = torch.float32

        def before(module: nn.Module, inputs: tuple) -> tuple:
            x = _local(inputs[0], device_mesh, self.input_layouts, (Shard(-1),), (Shard(-1),))
            return x, *inputs[1:]

        def after(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            whole = DTensor.from_local(output, device_mesh, (Partial(),), run_check=False)
            whole = _laid_out(whole, self.output_layouts, self.use_local_output)
            return FORWARD[activation](whole).to(given or inputs[0].dtype)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return module


def _local(x: Tensor, mesh: DeviceMesh, layouts: Layouts, wanted: Layouts, gradients: Layouts) -> Tensor:
    """This rank's part of an input, a DTensor or a part with `layouts`, in the layouts `wanted`."""
    if not isinstance(x, DTensor):
        if layouts == wanted and (gradients == layouts or not torch.is_grad_enabled()):
            return x
        x = DTensor.from_local(x, mesh, layouts, run_check=False)
    if x.placements != tuple(wanted):
        x = x.redistribute(placements=wanted, async_op=True)
    return x.to_local(grad_placements=gradients)


def _laid_out(output: DTensor, layouts: Layouts, local: bool) -> Tensor:
    if output.placements != tuple(layouts):
        output = output.redistribute(placements=layouts, async_op=True)
    return output.to_local() if local else output


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _keep_share(layer: PackedLinear, mesh: DeviceMesh, dim: int, source: int | None) -> None:
    """Cut the layer's weight along `dim`, 0 for outputs and 1 for inputs, and keep this rank's share."""
    if isinstance(layer, SparseLinear):
        weight, scale = unpack_sparse_weight(layer._for_host()), None
    elif isinstance(layer, Int8PackedLinear):
        weight, scale = layer._saved()
    else:
        raise NotImplementedError(f"{type(layer).__name__}: its weight cannot be divided among ranks")
    bias = layer.bias
    if source is not None:
        for tensor in (weight, scale, bias):
            if tensor is not None:
                _broadcast(tensor.data, mesh, source)
    share = _share(weight.shape[dim], mesh)
    if dim == 0:
        layer.out_features = len(share)
        scale = None if scale is None else scale[share.start : share.stop]
        if bias is not None:
            layer.bias = nn.Parameter(bias.data[share.start : share.stop].clone(), bias.requires_grad)
        weight = weight[share.start : share.stop]
    else:
        layer.in_features = len(share)
        if bias is not None and mesh.get_local_rank() != 0:
            layer.bias = nn.Parameter(torch.zeros_like(bias.data), bias.requires_grad)
        weight = weight[:, share.start : share.stop]
    layer._place(layer._pack(on_host(weight).contiguous(), None if scale is None else on_host(scale).contiguous()))


def _broadcast(tensor: Tensor, mesh: DeviceMesh, source: int) -> None:
    """Everybody's `tensor` becomes that of the mesh's rank `source`."""
    device = tensor.device
    there = tensor.to(mesh.device_type).contiguous()
    torch.distributed.broadcast(there, group=mesh.get_group(), group_src=source)
    tensor.copy_(there.to(device))


def _share(size: int, mesh: DeviceMesh) -> range:
    """This rank's part of `size`, as DTensor's Shard has it."""
    part = -(-size // mesh.size())
    start = min(part * mesh.get_local_rank(), size)
    return range(start, min(start + part, size))
