// Between torch's tensors and the pointers the kernels take.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "../common/tensors.h"
#include "row.h"

namespace kl_kernels {

// Logits [B, T, V] with stride 1 over V, and the scale their rows are read with.
class Logits {
 public:
  Logits(const Tensor& tensor, const char* name, double temperature, std::optional<double> softcap)
      : tensor_(tensor),
        data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(dtype_of(tensor, name)),
        element_size_(dtype_ == Dtype::float32 ? 4 : 2),
        k_(float(kLog2e / temperature)),
        softcap_(float(softcap.value_or(0))) {
    check_layout(tensor, name);
    n_batch_ = tensor.size(0);
    n_tokens_ = tensor.size(1);
    vocab_size_ = tensor.size(2);
    batch_stride_ = tensor.stride(0);
    token_stride_ = tensor.stride(1);
  }

  const Tensor& tensor() const { return tensor_; }
  int64_t n_rows() const { return n_batch_ * n_tokens_; }
  int64_t n_batch() const { return n_batch_; }
  int64_t n_tokens() const { return n_tokens_; }
  int64_t vocab_size() const { return vocab_size_; }
  int64_t row_bytes() const { return vocab_size_ * element_size_; }
  Row row(int64_t index) const {
    const int64_t offset = index / n_tokens_ * batch_stride_ + index % n_tokens_ * token_stride_;
    return {data_ + offset * element_size_, dtype_, k_, softcap_};
  }
  bool contiguous() const {
    return token_stride_ == vocab_size_ && batch_stride_ == n_tokens_ * vocab_size_;
  }

 private:
  Tensor tensor_;
  const char* data_;
  Dtype dtype_;
  int64_t element_size_;
  float k_, softcap_;
  int64_t n_batch_, n_tokens_, vocab_size_, batch_stride_, token_stride_;
};

inline const Row kNoReference{nullptr, Dtype::float32, 1, 0};

// The policy's logits and the reference's, if there is one.
struct Models {
  Logits logits;
  std::optional<Logits> ref_logits;

  Models(const Tensor& policy, const OptionalTensor& reference, double temperature,
         double ref_temperature, std::optional<double> softcap, std::optional<double> ref_softcap)
      : logits(policy, "logits", temperature, softcap) {
    if (!reference) return;
    ref_logits.emplace(*reference, "ref_logits", ref_temperature, ref_softcap);
    check_like(*reference, "ref_logits", policy);
  }

  Row policy(int64_t row) const { return logits.row(row); }
  Row reference(int64_t row) const { return ref_logits ? ref_logits->row(row) : kNoReference; }
  int64_t n_rows() const { return logits.n_rows(); }
  int64_t vocab_size() const { return logits.vocab_size(); }
};

// Anchor and sum of one model's row, [2, B, T] float32.
class States {
 public:
  explicit States(const Tensor& logits)
      : tensor_(new_rows(logits, 2)), data_(floats(tensor_)), n_rows_(n_rows_of(logits)) {}

  void set(int64_t row, double anchor, double sum) {
    data_[row] = float(anchor);
    data_[n_rows_ + row] = float(sum);
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
  float* data_;
  int64_t n_rows_;
};

// Whether logits are all of their vocabulary, or a part that a token need not be in.
enum class Vocabulary { whole, part };

// The sampled tokens of the rows that count.
class Tokens {
 public:
  template <class Mask>  // Tensor or OptionalTensor
  Tokens(const Tensor& token_ids, const Mask& mask, const Logits& logits,
         Vocabulary vocabulary = Vocabulary::whole)
      : ids_(token_ids_of(token_ids, logits.tensor())), mask_(mask_of(mask, logits.tensor())) {
    const int64_t n_rows = logits.n_rows();
    for (int64_t row = 0; row < n_rows; ++row) {
      const bool outside = vocabulary == Vocabulary::part && ids_[row] == kNoToken;
      if (counts(row) && !outside && (ids_[row] < 0 || ids_[row] >= logits.vocab_size()))
        throw std::invalid_argument("token_ids holds " + std::to_string(ids_[row]) +
                                    " at an unmasked position; accepted: 0 to " +
                                    std::to_string(logits.vocab_size() - 1));
    }
  }

  bool counts(int64_t row) const { return mask_ == nullptr || mask_[row]; }
  int64_t operator[](int64_t row) const { return ids_[row]; }

 private:
  const int64_t* ids_;
  const bool* mask_;
};

// Upstream gradients or saved values of every row; what is absent reads as 0.
struct PerToken {
  double operator[](int64_t row) const { return data == nullptr ? 0 : data[row]; }
  const float* data = nullptr;
};

inline Finished<float> to_float(const Finished<double>& f) {
  return {float(f.logprob), float(f.ref_logprob), float(f.kl), float(f.forward_kl),
          float(f.entropy)};
}

// The anchor backward will subtract is a float, so the saved sums must belong to that. Beyond
// reach it is the next float above, from which sums are small or 0: so a part of a row that lies
// far below the others adds nothing, where an overflow would be an infinity or NaN in all of the
// row.
inline RowState<double> as_saved(const RowState<double>& s) {
  const auto saved = [](double anchor) {
    const double lowest = Limits<float>::kEmptyAnchor, kept = std::max(anchor, lowest);
    const float nearest = float(kept);
    const bool within = std::abs(kept) <= kFarthestAnchor;
    return double(within || !(nearest < kept) ? nearest : std::nextafter(nearest, INFINITY));
  };
  return move(s, saved(s.anchor), saved(s.ref_anchor));
}

// Rounded to floats, sums lose 6e-8 of their ratio. Of a KL's gradient, p (log p - log q - KL),
// that can be all: its norm is about sqrt(2 KL) where the KL is small, and the probability of all
// other tokens, which the entropy is at least, where one token is sure. Sums depend on their
// anchors, and among the floats next to the reference's is one where its sum is rounded as the
// policy's is. Where these floats are far apart there are few: half the sum has the same digits.
inline RowState<double> keep_ratio(const RowState<double>& saved, const Finished<float>& row) {
  constexpr int kTries = 256;
  constexpr double kPart = 1e-6, kLeastEnough = 3e-10, kLeastStep = 0x1p-20, kMost = 1;
  const double norm = std::min(std::sqrt(2.0 * row.kl), double(row.entropy));
  const double enough = std::max(kPart * norm, kLeastEnough);
  const auto rounding = [](double sum) { return float(sum) / sum; };
  const double start = saved.ref_anchor, own = rounding(saved.sums.sx);
  const double step = std::max(std::ldexp(std::abs(start), -23), kLeastStep);
  double best = start, least = INFINITY;
  // The series is as good as 2^t for all of its first steps but those from a far anchor.
  const bool series_will_do = kTries * step < 0x1p-8;
  for (int i = 0; i < kTries && i * step < kMost && !(least <= enough); ++i) {
    const double anchor = float(start + i * step), t = kLn2 * (start - anchor);
    const double sum =
        saved.sums.sy * (series_will_do ? 1 + t * (1 + t / 2 * (1 + t / 3)) : std::exp(t));
    const double error = std::abs(rounding(sum) - own);
    if (error < least) {
      least = error;
      best = anchor;
    }
  }
  return move(saved, saved.anchor, best);
}

}  // namespace kl_kernels
