#include "cuda/device_gene_table.hpp"

namespace scfm::cuda {

SummedColumns summed_columns(const GeneTable& table) {
  SummedColumns summed;
  summed.offsets.assign(static_cast<std::size_t>(table.num_summed) + 1, 0);
  const auto number_of = [&](std::int32_t slot) { return static_cast<std::size_t>(slot - table.num_single); };
  for (const std::int32_t slot : table.column_slot) {
    if (slot >= table.num_single) ++summed.offsets[number_of(slot) + 1];
  }
  for (std::size_t j = 1; j < summed.offsets.size(); ++j) summed.offsets[j] += summed.offsets[j - 1];
  summed.columns.resize(static_cast<std::size_t>(summed.offsets.back()));
  std::vector<std::int32_t> places(summed.offsets.begin(), summed.offsets.end() - 1);
  for (std::size_t column = 0; column < table.column_slot.size(); ++column) {
    const std::int32_t slot = table.column_slot[column];
    if (slot < table.num_single) continue;
    summed.columns[static_cast<std::size_t>(places[number_of(slot)]++)] = static_cast<std::int32_t>(column);
  }
  return summed;
}

}  // namespace scfm::cuda
