"""Quantization-aware training: put fake quantization in, train as ever, take int8 layers out."""

from torch import nn

from lamina.configs import Config, ConfigLike, Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from lamina.nn.int8_linear import Int8Linear
from lamina.nn.qat_linear import QATLinear
from lamina.nn.weight_only_linear import Int4WeightOnlyLinear, Int8WeightOnlyLinear
from lamina.running import FilterFn
from lamina.swap import (
    CalibratedInt8,
    Candidate,
    Handler,
    LayerDecision,
    Site,
    SwapReport,
    apply_all,
    candidates,
    describe,
    replace_linear,
    replacement,
    sites,
)


def prepare_qat_(model: nn.Module, config: ConfigLike | None = None, filter_fn: FilterFn | None = None) -> SwapReport:
    """Put fake quantization into the Linear layers of `model`, in place: they train with the rounding.

    The layers keep their parameters, so an optimizer that holds them goes on working; static scales are new parameters
    (`log_input_scale`), so make the optimizer afterwards to learn them.

    Args:
        model: float32 or bfloat16.
        config: `Int8Dynamic()` (default), `Int8Static(...)`, which starts the learned scales from its calibration,
            `Int8WeightOnly()`, `Int4WeightOnly(...)`, or a policy of them as in `swap_`.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer alone.

    Returns the report of what was exchanged and what was left and why; raises as `swap_` does.

    >>> lamina.quant.prepare_qat_(model)
    >>> train(model)
    >>> lamina.quant.convert_(model.eval())
    """
    return apply_all(candidates(model, config if config is not None else Int8Dynamic(), filter_fn, _HANDLERS))


def convert_(model: nn.Module) -> SwapReport:
    """Exchange the layers that `prepare_qat_` put in for quantized ones, in place.

    The outputs stay what they were, up to the order of float32 sums. A layer that cannot be exchanged (it has hooks, or
    its weight has become NaN) is left, and the report says why.

    >>> report = lamina.quant.convert_(model)
    """
    return apply_all([_convert(site) for site in sites(model) if isinstance(site.module, QATLinear)])


def _convert(site: Site) -> Candidate | LayerDecision:
    layer = site.module

    def build() -> nn.Module:
        if layer.group_size is not None:
            return Int4WeightOnlyLinear.from_float(layer, group_size=layer.group_size)
        if layer.weight_only:
            return Int8WeightOnlyLinear.from_float(layer)
        scale = None if layer.input_scale is None else layer.input_scale.item()
        return Int8Linear.from_float(layer, input_scale=scale)

    found = replacement(site, build)
    return LayerDecision(site.fqn, describe(layer), None, found) if isinstance(found, str) else found


def _dynamic(site: Site, config: Config) -> Candidate | str | None:
    return replace_linear(site, QATLinear.from_float)


def _static(site: Site, config: Config) -> Candidate | str | None:
    return replace_linear(site, lambda linear: QATLinear.from_float(linear, config.calibration.scale(site.fqn)))


def _int8_weight_only(site: Site, config: Config) -> Candidate | str | None:
    return replace_linear(site, lambda linear: QATLinear.from_float(linear, weight_only=True))


def _int4_weight_only(site: Site, config: Config) -> Candidate | str | None:
    def build(linear: nn.Linear) -> nn.Module:
        return QATLinear.from_float(linear, weight_only=True, group_size=config.group_size)

    return replace_linear(site, build)


_HANDLERS: dict[type[Config], Handler] = {
    Int8Dynamic: _dynamic,
    CalibratedInt8: _static,
    Int8WeightOnly: _int8_weight_only,
    Int4WeightOnly: _int4_weight_only,
}
