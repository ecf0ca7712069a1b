// Contract of conv_direct: any kernel, stride, dilation and groups, on an image that is padded beforehand.
#pragma once

#include "cpu/kernels/conv_output.h"

namespace lamina {

// Rows of one image directly: any kernel, stride, dilation, groups. The input is padded beforehand.
struct ConvDirectArgs {
  const float* x;                  // where the first tap of the first output meets the input, group 0
  int64_t x_row, x_pixel;          // from one output row or column to the next
  int runs;                        // pieces of k that are adjacent in x: a tap, or a whole row of taps
  const int64_t* run_starts;       // [runs], in floats
  int64_t run_length;              // floats; k = runs * run_length
  const float* weights;            // [groups][panels]
  int64_t groups;                  // group g reads run_length input channels on from g * group_inputs
  int64_t group_inputs;            // floats from a group's inputs to the next one's
  int64_t group_outputs;           // output channels of a group
  int64_t first_panel, end_panel;  // over all groups
  int64_t rows, columns;
  ConvOutput to;
};

extern const KernelTable<void(const ConvDirectArgs&)> conv_direct_table;

}  // namespace lamina
