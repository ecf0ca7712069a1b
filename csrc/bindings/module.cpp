// lamina._C: what the compiled module offers, in one list. Every op releases the GIL; arguments are checked in
// csrc/ops, which knows nothing of Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda.h"
#include "bindings/dispatcher.h"
#include "bindings/plan.h"
#include "bindings/recorder.h"
#include "bindings/tensor_view.h"
#include "bindings/watch.h"
#include "cpu/dispatch.h"
#include "ops/attention.h"
#include "ops/attention_backward.h"
#include "ops/attention_decode.h"
#include "ops/attention_panels.h"
#include "ops/attention_varlen.h"
#include "ops/checks.h"
#include "ops/concatenate.h"
#include "ops/conv2d.h"
#include "ops/copy.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/fingerprint.h"
#include "ops/group_norm.h"
#include "ops/gru.h"
#include "ops/int8_conv2d.h"
#include "ops/int8_gru.h"
#include "ops/int8_linear.h"
#include "ops/int8_lstm.h"
#include "ops/int8_pool2d.h"
#include "ops/layer_norm.h"
#include "ops/layer_norm_panels.h"
#include "ops/linear.h"
#include "ops/lstm.h"
#include "ops/parallel.h"
#include "ops/peak_probe.h"
#include "ops/pool2d.h"
#include "ops/quantize_rows.h"
#include "ops/reduce.h"
#include "ops/rms_norm.h"
#include "ops/rnn.h"
#include "ops/rnn_relu.h"
#include "ops/rnn_tanh.h"
#include "ops/softmax.h"
#include "ops/sparse_conv2d.h"
#include "ops/sparse_int8_linear.h"
#include "ops/sparse_linear.h"
#include "ops/token_panels.h"
#include "ops/weight_only_linear.h"
#include "ops/workspace.h"

namespace py = pybind11;
using namespace lamina;

PYBIND11_MODULE(_C, m) {
  check_kernel_records();
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const FormatError& error) {
      py::set_error(py::module_::import("lamina.errors").attr("FormatError"), error.what());
    }
  });
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("force_isa", &force_isa);
  m.def("last_isa", [] { return isa_name(last_isa()); });
  m.def("poison_workspace", &WorkspaceFrame::set_poison);
  m.def("max_threads", [] { return max_threads(); });

  m.def("skips_dispatcher", &skips_dispatcher);

  m.def("probe_peak", &probe_peak, no_gil, py::arg("kind"), py::arg("threads"), py::arg("seconds"));
  m.def("probe_read_bandwidth", &probe_read_bandwidth, no_gil, py::arg("bytes"), py::arg("threads"),
        py::arg("seconds"));

  using OptionalTensor = std::optional<TensorView>;
  define_op(
      m, "attention",
      +[](const TensorView& query, const TensorView& key, const TensorView& value, const OptionalTensor& mask,
          bool is_causal, double scale, const TensorView& out) {
        AttentionOptions options;
        options.is_causal = is_causal;
        options.scale = scale;
        attention(query, key, value, mask, options, out);
      });
  define_op(
      m, "attention_with_lse",
      +[](const TensorView& query, const TensorView& key, const TensorView& value, const OptionalTensor& mask,
          bool is_causal, double scale, int64_t window_left, int64_t window_right, bool bottom_right, double softcap,
          const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, bool bfloat16_products, double dropout_p,
          int64_t seed, bool int8_scores, const TensorView& out, const TensorView& lse) {
        attention(query, key, value, mask,
                  {is_causal, scale, window_left, window_right, bottom_right, softcap, alibi_slopes, sinks, dropout_p,
                   seed, lse, bfloat16_products, int8_scores},
                  out);
      });
  define_op(
      m, "attention_varlen",
      +[](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cu_seqlens_q,
          const TensorView& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool is_causal, double scale,
          int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
          const OptionalTensor& sinks, const TensorView& out, const OptionalTensor& lse) {
        attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                         {.is_causal = is_causal,
                          .scale = scale,
                          .window_left = window_left,
                          .window_right = window_right,
                          .bottom_right = true,
                          .softcap = softcap,
                          .alibi_slopes = alibi_slopes,
                          .sinks = sinks,
                          .lse = lse},
                         out);
      });
  define_op(m, "attention_decode", &attention_decode);
  define_op(m, "attention_decode_append", &attention_decode_append);
  define_op(
      m, "attention_backward",
      +[](const TensorView& grad_out, const TensorView& query, const TensorView& key, const TensorView& value,
          const TensorView& out, const TensorView& lse, const OptionalTensor& grad_lse, const OptionalTensor& mask,
          bool is_causal, double scale, int64_t window_left, int64_t window_right, bool bottom_right, double softcap,
          const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double dropout_p, int64_t seed,
          const TensorView& grad_query, const TensorView& grad_key, const TensorView& grad_value,
          const OptionalTensor& grad_mask, const OptionalTensor& grad_slopes, const OptionalTensor& grad_sinks) {
        attention_backward(
            grad_out, query, key, value, out, lse, grad_lse, mask,
            {is_causal, scale, window_left, window_right, bottom_right, softcap, alibi_slopes, sinks, dropout_p, seed},
            {grad_query, grad_key, grad_value, grad_mask, grad_slopes, grad_sinks});
      });

  define_op(m, "conv2d", &conv2d);
  define_op(
      m, "attention_panels",
      +[](const TensorView& query, const TensorView& key, const TensorView& value, const OptionalTensor& mask,
          int64_t length, int64_t heads, double scale, bool bfloat16_products, const OptionalTensor& out,
          const OptionalTensor& codes, const OptionalTensor& scales) {
        attention_panels(query, key, value, mask, {length, heads, scale, bfloat16_products}, out, codes, scales);
      });
  m.def("conv2d_packed_size", &conv2d_packed_size);
  define_op(m, "conv2d_pack", &conv2d_pack);

  define_op(m, "gru", &gru);
  define_op(m, "concatenate", &concatenate);
  define_op(m, "copy", &lamina::copy);
  define_op(m, "elementwise", &elementwise);
  define_op(m, "pool2d", &pool2d);
  define_op(m, "embedding", &embedding);
  define_op(m, "group_norm", &group_norm);

  define_op(m, "int8_conv2d", &int8_conv2d);
  define_op(m, "int8_conv2d_pack", &int8_conv2d_pack);
  define_op(m, "int8_conv2d_unpack", &int8_conv2d_unpack);
  m.def("int8_conv2d_packed_size", &int8_conv2d_packed_size);
  m.def("int8_conv2d_compensation_size", &int8_conv2d_compensation_size);

  define_op(m, "int8_pool2d", &int8_pool2d);

  define_op(m, "int8_linear", &int8_linear);
  define_op(m, "int8_linear_pack", &int8_linear_pack);
  define_op(m, "int8_linear_unpack", &int8_linear_unpack);
  m.def("int8_linear_packed_size", &int8_linear_packed_size);

  define_op(m, "layer_norm", &layer_norm);
  define_op(m, "rms_norm", &rms_norm);
  define_op(m, "quantize_rows", &quantize_rows);
  define_op(m, "sparse_int8_linear", &sparse_int8_linear);
  define_op(m, "sparse_int8_linear_pack", &sparse_int8_linear_pack);
  define_op(m, "sparse_int8_linear_unpack", &sparse_int8_linear_unpack);
  define_op(m, "linear", &linear);
  define_op(m, "linear_pack", &linear_pack);
  define_op(m, "linear_unpack", &linear_unpack);
  define_op(m, "reduce", &reduce);
  define_op(m, "softmax", &softmax);
  define_op(m, "layer_norm_panels", &layer_norm_panels);
  define_op(m, "sparse_int8_linear_panels", &sparse_int8_linear_panels);
  m.def("sparse_int8_linear_packed_size", &sparse_int8_linear_packed_size, no_gil);
  define_op(m, "sparse_conv2d", &sparse_conv2d);
  define_op(m, "sparse_linear", &sparse_linear);
  define_op(m, "sparse_linear_pack", &sparse_linear_pack);
  define_op(m, "sparse_linear_unpack", &sparse_linear_unpack);
  m.def("sparse_linear_packed_size", &sparse_linear_packed_size, no_gil);
  m.def("sparse_linear_info", [](const TensorView& data) {
    const SparseLinearInfo info = sparse_linear_info(data);
    return py::make_tuple(info.pattern, info.dtype, info.n, info.k, info.blocks, info.nonzeros);
  });
  define_op(m, "weight_only_linear", &weight_only_linear);
  define_op(m, "weight_only_linear_pack", &weight_only_linear_pack);
  define_op(m, "weight_only_linear_unpack", &weight_only_linear_unpack);
  define_op(m, "token_panels", &token_panels);
  define_op(m, "token_rows", &token_rows);
  define_op(m, "quantize_panels", &quantize_panels);
  m.def("weight_only_linear_packed_size", &weight_only_linear_packed_size);

  define_op(m, "lstm", &lstm);
  define_op(m, "int8_gru", &int8_gru);
  define_op(m, "int8_lstm", &int8_lstm);
  define_op(m, "rnn_tanh", &rnn_tanh);
  define_op(m, "rnn_relu", &rnn_relu);
  define_op(m, "rnn_backward", &rnn_backward);
  m.def("weight_fingerprint", &weight_fingerprint, no_gil);

  define_plan(m);
  define_watch(m);
  define_cuda(m);
}
