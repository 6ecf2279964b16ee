// Rows whose vocabulary comes in parts: the parts' states merged, finished and checked, row by row
// in float64. kl_kernels/algebra/parts.py says the same in PyTorch.
#pragma once

#include "row_math.h"

namespace kl_kernels {

struct PartStates {
  const float* data;    // [n_parts, kStateFields or kStateFieldsWithoutRef, n_rows]
  const float* ranges;  // [n_parts, 2]: a part's first token and how many; nullptr: not checked
  int64_t n_parts, n_rows;
  bool has_ref;

  KL_HOST_DEVICE double at(int64_t part, int field, int64_t row) const {
    const int n_fields = has_ref ? kStateFields : kStateFieldsWithoutRef;
    return data[(part * n_fields + field) * n_rows + row];
  }
  KL_HOST_DEVICE RowState<double> state(int64_t part, int64_t row) const {
    RowState<double> s{at(part, 0, row), 0, {at(part, 1, row), 0, at(part, 2, row), 0, 0}};
    s.ref_anchor = has_ref ? at(part, 4, row) : s.anchor;  // a policy without one is its own
    s.sums.sy = has_ref ? at(part, 5, row) : s.sums.sx;
    s.sums.rk = has_ref ? at(part, 6, row) : 0;
    s.sums.fk = has_ref ? at(part, 7, row) : 0;
    return s;
  }
  // Whether a part begins where those before it end. All do: they are 0 to V - 1, each token once.
  KL_HOST_DEVICE bool begins_right(int64_t part) const {
    if (ranges == nullptr) return true;
    double before = 0;
    for (int64_t i = 0; i < n_parts; ++i) {
      const float start = ranges[2 * i], own = ranges[2 * part];
      if (start < own || (start == own && i < part)) before += ranges[2 * i + 1];
    }
    return before == ranges[2 * part];
  }
};

struct WholeRow {
  Finished<double> finished;
  RowState<double> saved;
};

// NaN where not exactly one part holds the token. `tiled`: whether all parts begin right.
KL_HOST_DEVICE WholeRow whole_row(const PartStates& parts, int64_t row, bool tiled) {
  RowState<double> s = parts.state(0, row), holder = s;
  double tx = 0, ty = 0;
  int n_holders = 0;
  for (int64_t i = 0; i < parts.n_parts; ++i) {
    const RowState<double> own = parts.state(i, row);
    const double position = parts.at(i, 3, row);
    if (position != INFINITY) {
      ++n_holders;
      holder = own;
      tx = position;
      ty = parts.has_ref ? parts.at(i, 8, row) : position;
    }
    if (i > 0) s = merge(s, own);
  }
  if (!tiled || n_holders != 1) s = {NAN, NAN, {NAN, NAN, NAN, NAN, NAN}};
  s = within_reach(s);
  return {finish(s.sums, tx + (holder.anchor - s.anchor), ty + (holder.ref_anchor - s.ref_anchor)),
          s};
}

}  // namespace kl_kernels
