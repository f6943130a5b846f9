#include "tokenize/gene_values.hpp"

#include <algorithm>
#include <bit>
#include <string>

#include "base/errors.hpp"

namespace scfm {
namespace {

constexpr double kTargetSum = 1e4;

[[noreturn]] void fail(const std::string& function, const std::string& message) {
  throw InvalidArgument(function + ": " + message);
}

void expect_length(const char* argument, std::size_t found, std::size_t expected) {
  if (found != expected) {
    fail("gene_values", std::string(argument) + " has " + std::to_string(found) + " entries, expected " +
                            std::to_string(expected));
  }
}

void expect_ascending(const char* argument, std::span<const std::uint64_t> keys, bool strictly) {
  for (std::size_t i = 1; i < keys.size(); ++i) {
    if (keys[i] < keys[i - 1] || (strictly && keys[i] == keys[i - 1])) {
      fail("merge_keys", std::string(argument) + " does not ascend at " + std::to_string(i));
    }
  }
}

/// Adds to the last key, or begins another.
void append(CountedKeys& counted, std::uint64_t key, std::int64_t number) {
  if (!counted.keys.empty() && counted.keys.back() == key) {
    counted.numbers.back() += number;
  } else {
    counted.keys.push_back(key);
    counted.numbers.push_back(number);
  }
}

}  // namespace

std::vector<std::uint64_t> gene_values(const CsrView& csr, std::span<const std::int32_t> column_gene,
                                       std::span<const double> library_size,
                                       std::span<const std::uint8_t> counted) {
  require_indptr(csr.indptr, csr.num_data, "gene_values");
  const auto num_rows = static_cast<std::size_t>(csr.num_rows());
  expect_length("indices", static_cast<std::size_t>(csr.num_columns), static_cast<std::size_t>(csr.num_data));
  expect_length("library_size", library_size.size(), num_rows);
  if (!counted.empty()) expect_length("counted", counted.size(), num_rows);
  std::vector<std::uint64_t> keys;
  keys.reserve(static_cast<std::size_t>(csr.num_data));
  const auto num_genes = static_cast<std::uint64_t>(column_gene.size());
  const auto add_rows = [&](const auto* columns, const auto* values) {
    for (std::size_t row = 0; row < num_rows; ++row) {
      if (!counted.empty() && counted[row] == 0) continue;
      for (std::int64_t i = csr.indptr[row]; i < csr.indptr[row + 1]; ++i) {
        const auto column = static_cast<std::uint64_t>(columns[i]);
        if (column >= num_genes) {
          fail("gene_values", "row " + std::to_string(row) + " has column " + std::to_string(columns[i]) +
                                  ", expected 0 to " + std::to_string(num_genes) + " - 1");
        }
        const std::int32_t gene = column_gene[column];
        const auto count = static_cast<double>(values[i]);
        if (gene < 0 || count == 0.0) continue;
        if (!(library_size[row] > 0.0)) {
          fail("gene_values", "row " + std::to_string(row) + " has counts and the library size " +
                                  std::to_string(library_size[row]));
        }
        const auto value = static_cast<float>(count / library_size[row] * kTargetSum);
        keys.push_back(static_cast<std::uint64_t>(gene) << 32 | std::bit_cast<std::uint32_t>(value));
      }
    }
  };
  with_columns(csr.column_type, csr.columns, [&](const auto* columns) {
    with_data(csr.data_type, csr.data, [&](const auto* values) { add_rows(columns, values); });
  });
  return keys;
}

CountedKeys merge_keys(std::span<const std::uint64_t> keys, std::span<const std::int64_t> numbers,
                       std::span<const std::uint64_t> more, int num_bits) {
  if (numbers.size() != keys.size()) fail("merge_keys", "keys and numbers differ in length");
  if (num_bits < 0 || num_bits > 63)
    fail("merge_keys", "num_bits = " + std::to_string(num_bits) + ", expected 0 to 63");
  expect_ascending("keys", keys, true);
  expect_ascending("more", more, false);
  const std::uint64_t mask = ~std::uint64_t{0} << num_bits;
  CountedKeys merged;
  merged.keys.reserve(keys.size() + more.size() / 4);
  merged.numbers.reserve(keys.size() + more.size() / 4);
  std::size_t i = 0;
  for (const std::uint64_t key : more) {
    while (i < keys.size() && (keys[i] & mask) <= (key & mask)) {
      append(merged, keys[i] & mask, numbers[i]);
      ++i;
    }
    append(merged, key & mask, 1);
  }
  for (; i < keys.size(); ++i) append(merged, keys[i] & mask, numbers[i]);
  return merged;
}

}  // namespace scfm
