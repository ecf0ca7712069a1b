"""The passes, in the order they run. Each rewrites a Captured graph; none needs another to have run."""

from lamina.compile.capture import Captured
from lamina.compile.fuse.activation import activations
from lamina.compile.fuse.attention import attention
from lamina.compile.fuse.clean import clean, contiguous
from lamina.compile.fuse.codes import codes
from lamina.compile.fuse.conv import convolutions, fold_batch_norms, restore_outputs
from lamina.compile.fuse.linear import epilogues, float_linears, join_views, quantize_linears
from lamina.compile.fuse.merge import merge, share_quantization
from lamina.compile.fuse.norm import norms, rms_norms
from lamina.compile.fuse.panels import panels
from lamina.compile.fuse.precision import bfloat16_attention
from lamina.compile.fuse.views import views


def fuse(captured: Captured, int8: bool = False) -> None:
    """Run all passes; `int8` makes float linear layers int8 first."""
    clean(captured)
    activations(captured)
    rms_norms(captured)
    fold_batch_norms(captured)
    convolutions(captured)
    if int8:
        quantize_linears(captured)
    join_views(captured)
    epilogues(captured)
    codes(captured)
    merge(captured)
    share_quantization(captured)
    float_linears(captured)
    attention(captured)
    panels(captured)
    bfloat16_attention(captured)
    norms(captured)
    captured.evaluate_all()
    contiguous(captured)
    views(captured)
    restore_outputs(captured)
