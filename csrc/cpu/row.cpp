// Compiled once per instruction set, with KL_ROW_KERNELS naming the table (see setup.py).
#include "row.h"

#include "backward.h"
#include "fold.h"
#include "mixture.h"
#include "scale.h"

namespace kl_kernels {

extern const RowKernels KL_ROW_KERNELS = {fold_row, backward_row, mix_row, mix_row_backward,
                                          scale_row};

}  // namespace kl_kernels
