#include "tokenize/gene_table.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "base/errors.hpp"

namespace scfm {
namespace {

[[noreturn]] void fail(const std::string& message) { throw InvalidArgument("rank_value: " + message); }

void check_slots(const GeneSlots& slots) {
  const auto num_slots = static_cast<std::int64_t>(slots.slot_token.size());
  if (slots.column_slot.size() >
      static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()) - slots.slot_token.size()) {
    fail("column_slot has " + std::to_string(slots.column_slot.size()) +
         " entries, more than 2^31 columns and slots");
  }
  if (slots.slot_median.size() != slots.slot_token.size()) {
    fail("slot_median has " + std::to_string(slots.slot_median.size()) + " entries, expected " +
         std::to_string(num_slots) + " as in slot_token");
  }
  if (slots.num_single < 0 || slots.num_single > num_slots) {
    fail("num_single = " + std::to_string(slots.num_single) + ", expected 0 to " + std::to_string(num_slots));
  }
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    const double median = slots.slot_median[static_cast<std::size_t>(slot)];
    if (!(median > 0.0) || !std::isfinite(median)) {
      fail("slot_median[" + std::to_string(slot) + "] = " + std::to_string(median) +
           ", expected a finite number above 0");
    }
  }
}

RankArithmetic widened(RankArithmetic arithmetic, bool has_sums) noexcept {
  if (!has_sums) return arithmetic;
  const bool divides = arithmetic == RankArithmetic::divide32 || arithmetic == RankArithmetic::divide64;
  return divides ? RankArithmetic::divide64 : RankArithmetic::multiply64;
}

}  // namespace

GeneTable make_gene_table(const GeneSlots& slots, RankArithmetic arithmetic) {
  check_slots(slots);
  const auto num_slots = static_cast<std::int64_t>(slots.slot_token.size());
  GeneTable table;
  table.num_genes = static_cast<std::int64_t>(slots.column_slot.size());
  table.num_single = slots.num_single;
  table.num_summed = num_slots - slots.num_single;
  table.arithmetic = widened(arithmetic, table.num_summed > 0);
  table.column_slot = slots.column_slot;
  const bool divides =
      table.arithmetic == RankArithmetic::divide32 || table.arithmetic == RankArithmetic::divide64;
  const auto factor_of = [&](std::int64_t slot) {
    const double median = slots.slot_median[static_cast<std::size_t>(slot)];
    return divides ? median : 1.0 / median;
  };
  table.factors.assign(slots.column_slot.size(), 0.0);
  table.tokens.assign(slots.column_slot.size(), 0);
  std::int64_t next_single = 0;
  for (std::size_t column = 0; column < slots.column_slot.size(); ++column) {
    const std::int64_t slot = slots.column_slot[column];
    if (slot == -1) continue;
    if (slot < 0 || slot >= num_slots) {
      fail("column_slot[" + std::to_string(column) + "] = " + std::to_string(slot) + ", expected -1 to " +
           std::to_string(num_slots - 1));
    }
    if (slot >= slots.num_single) continue;
    if (slot != next_single) {
      fail("column_slot[" + std::to_string(column) + "] = " + std::to_string(slot) + ", expected " +
           std::to_string(next_single) + ": single slots follow the columns in order, one column each");
    }
    ++next_single;
    table.factors[column] = factor_of(slot);
    table.tokens[column] = slots.slot_token[static_cast<std::size_t>(slot)];
  }
  if (next_single != slots.num_single) {
    fail("column_slot feeds " + std::to_string(next_single) +
         " single slots, expected num_single = " + std::to_string(slots.num_single));
  }
  for (std::int64_t slot = slots.num_single; slot < num_slots; ++slot) {
    table.summed_factors.push_back(factor_of(slot));
    table.tokens.push_back(slots.slot_token[static_cast<std::size_t>(slot)]);
  }
  return table;
}

}  // namespace scfm
