#include "document.h"

namespace rmse {

Document document_of(const Dials& dials) {
  return Document::object({{"max_loops", dials.max_loops},
                           {"min_loops", dials.min_loops},
                           {"exit_threshold", dials.exit_threshold},
                           {"exit_epsilon", dials.exit_epsilon},
                           {"exit_entropy", dials.exit_entropy}});
}

std::vector<int64_t> histogram(const std::vector<int64_t>& depth, int64_t full) {
  std::vector<int64_t> counts(full);
  for (const int64_t k : depth) ++counts[k - 1];
  return counts;
}

}  // namespace rmse
