// The tensors of a stored weight as an op's arguments, checked and held for the call.
#pragma once

#include "binding.h"
#include "stored_weight.h"

namespace narrowcast {

class StoredWeightArguments {
 public:
  StoredWeightArguments(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                        const std::optional<Tensor>& levels, int64_t bits, int64_t group, int64_t columns,
                        const char* op);

  const StoredWeight& weight() const { return weight_; }
  int64_t rows() const { return rows_; }

 private:
  Contiguous codes_, scale_, zero_point_, levels_;
  StoredWeight weight_;
  int64_t rows_;
};

}  // namespace narrowcast
