// The dtypes the compiled backends take logits in.
#pragma once

namespace kl_kernels {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace kl_kernels
