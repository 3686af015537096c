#include "document.h"

namespace rmse {

Document document_of(const Dials& dials) {
  Document found = Document::object({{"max_loops", dials.max_loops}, {"min_loops", dials.min_loops}});
  for (const ExitDial& dial : kExitDials) {
    const double value = dials.*dial.value;
    found[dial.name] = dial.dtype == Dtype::kInt64 ? Document(static_cast<int64_t>(value)) : Document(value);
  }
  return found;
}

std::vector<int64_t> histogram(const std::vector<int64_t>& depth, int64_t full) {
  std::vector<int64_t> counts(full);
  for (const int64_t k : depth) ++counts[k - 1];
  return counts;
}

}  // namespace rmse
