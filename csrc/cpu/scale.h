// A row multiplied by a number.
#pragma once

#include "blocks.h"

namespace kl_kernels {
namespace {

template <class T>
void scale_as(T* row, int64_t size, float factor) {
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    const Pair pair = load_pair(row + i);
    store_pair(row + i, {pair.first * factor, pair.second * factor});
  }
  for (; i < size; ++i) from_float(to_float(row[i]) * factor, row[i]);
}

void scale_row(const Row& row, int64_t vocab_size, float factor) {
  void* const data = const_cast<void*>(row.logits);
  if (row.dtype == Dtype::float32) scale_as(static_cast<float*>(data), vocab_size, factor);
  if (row.dtype == Dtype::bfloat16) scale_as(static_cast<BFloat16*>(data), vocab_size, factor);
  if (row.dtype == Dtype::float16) scale_as(static_cast<Float16*>(data), vocab_size, factor);
}

}  // namespace
}  // namespace kl_kernels
