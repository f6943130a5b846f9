/// The part of a gene table that only the GPU needs: which columns feed each summed slot. The CPU walks a row
/// and adds each entry to its slot; a GPU's threads take a slot each and look its columns up in the row.
#pragma once

#include <cstdint>
#include <vector>

#include "tokenize/gene_table.hpp"

namespace scfm::cuda {

struct SummedColumns {
  std::vector<std::int32_t> offsets;  // num_summed + 1
  std::vector<std::int32_t> columns;  // rising in each slot
};

SummedColumns summed_columns(const GeneTable& table);

}  // namespace scfm::cuda
