// The operators of kl_kernels/schemas.py that every compiled backend implements, in their order.
// The schemas themselves are defined in Python (kl_kernels/backends/compiled.py).
#pragma once

#include <torch/csrc/stable/library.h>

#define KL_KERNELS_REGISTER(library, device)                                    \
  STABLE_TORCH_LIBRARY_IMPL(library, device, m) {                               \
    using namespace kl_kernels;                                                 \
    m.impl("fold_part", TORCH_BOX(&bindings::fold_part));                       \
    m.impl("fold_tail", TORCH_BOX(&bindings::fold_tail));                       \
    m.impl("finish_parts", TORCH_BOX(&bindings::finish_parts));                 \
    m.impl("token_stats", TORCH_BOX(&bindings::token_stats));                   \
    m.impl("token_stats_backward", TORCH_BOX(&bindings::token_stats_backward)); \
    m.impl("token_kl", TORCH_BOX(&bindings::token_kl));                         \
    m.impl("token_kl_backward", TORCH_BOX(&bindings::token_kl_backward));       \
    m.impl("token_jsd", TORCH_BOX(&bindings::token_jsd));                       \
    m.impl("mixture_part", TORCH_BOX(&bindings::mixture_part));                 \
    m.impl("token_jsd_backward", TORCH_BOX(&bindings::token_jsd_backward));     \
    m.impl("kl_rewards", TORCH_BOX(&bindings::kl_rewards));                     \
    m.impl("policy_loss", TORCH_BOX(&bindings::policy_loss));                   \
    m.impl("scale_gradient", TORCH_BOX(&bindings::scale_gradient));             \
    m.impl("gae", TORCH_BOX(&bindings::gae));                                   \
  }
