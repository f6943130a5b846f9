/// rank_value's loops in plain C++: the reference for the others, and what runs where nothing better can.
#include "tokenize/rank_scalar.hpp"

namespace scfm {
namespace {

struct MakeKeys {
  template <RankArithmetic kArithmetic, class Value>
  static KeySummary run(const KeyArguments& row) noexcept {
    RowState state;
    make_keys_scalar<kArithmetic, Value>(row, 0, state);
    return state.summary();
  }
};

ColumnScan scan_columns(const std::int32_t* columns, std::int64_t count) noexcept {
  return scan_columns_scalar(columns, 0, count, {0, true});
}

void compose(const std::uint64_t* keys, std::int64_t count, std::uint64_t highest, int shift, int index_bits,
             std::uint64_t* out) noexcept {
  compose_scalar(keys, 0, count, highest, shift, index_bits, out);
}

std::uint32_t make_offsets(std::uint32_t* sizes, std::int64_t count) noexcept {
  std::uint32_t sum = 0;
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t size = sizes[i];
    largest = size > largest ? size : largest;
    sizes[i] = sum;
    sum += size;
  }
  return largest;
}

/// Without vectors a plain insertion sort beats counted passes; elements are already near their places.
void settle(std::uint64_t* values, std::int64_t count, std::int64_t /*largest*/) noexcept {
  for (std::int64_t i = 1; i < count; ++i) {
    const std::uint64_t value = values[i];
    std::int64_t place = i;
    for (; place > 0 && values[place - 1] > value; --place) values[place] = values[place - 1];
    values[place] = value;
  }
}

bool any_tie(const std::uint64_t* values, std::int64_t count, int index_bits) noexcept {
  return any_tie_scalar(values, 0, count, index_bits);
}

}  // namespace

const RankKernels rank_kernels_generic = {
    scan_columns, make_keys_with<MakeKeys>, compose, make_offsets, settle, any_tie};

}  // namespace scfm
