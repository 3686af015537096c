#include "document.h"

#include <algorithm>
#include <cstdio>

#include "../executorch/engine.h"

namespace rmse {

Document document_of(const Dials& dials) {
  Document found = Document::object({{"max_loops", dials.max_loops}, {"min_loops", dials.min_loops}});
  for (const ExitDial& dial : kExitDials) {
    const double value = dials.*dial.value;
    found[dial.name] = dial.dtype == Dtype::kInt64 ? Document(static_cast<int64_t>(value)) : Document(value);
  }
  return found;
}

Document offload_document(Model& model, int64_t tokens) {
  const Offload* offload = offload_of(model.engine());
  if (offload == nullptr) return {};
  const Document figures = Document::parse(offload->figures());
  const auto whole = [&](const char* name) { return figures.at(name).get<int64_t>(); };
  const auto rate = [](const Document& of) {
    const auto wanted = of.at("wanted").get<int64_t>();
    return known(wanted > 0, of.at("found").get<double>() / static_cast<double>(std::max<int64_t>(1, wanted)));
  };
  Document all = figures.at("outside"), rates = Document::array();
  for (const Document& loop : figures.at("loops")) {
    rates.push_back(rate(loop));
    for (const char* name : {"wanted", "found"}) all[name] = all.at(name).get<int64_t>() + loop.at(name).get<int64_t>();
  }
  const double each = std::max<int64_t>(1, tokens);
  return Document::object({{"expert_bytes", whole("expert_bytes")},
                           {"budget_bytes", whole("budget_bytes")},
                           {"resident_expert_bytes", whole("resident_bytes")},
                           {"hit_rate", rate(all)},
                           {"hit_rate_per_loop", rates},
                           {"mib_read_per_token", whole("bytes_read") / each / 0x1p20},
                           {"stall_ms_per_token", whole("stall_ns") / each / 1e6},
                           {"prefetched", whole("read_ahead")},
                           {"prefetched_used", whole("used")},
                           {"prefetched_wasted", whole("wasted")}});
}

std::string offload_lines(const Document& offload) {
  const auto number = [&](const char* name) { return offload.at(name).get<double>(); };
  const auto percent = [](const Document& rate) {
    char text[16] = "-";
    if (!rate.is_null()) std::snprintf(text, sizeof text, "%.0f%%", 100 * rate.get<double>());
    return std::string(text);
  };
  char text[512];
  std::snprintf(text, sizeof text,
                "experts: %.1f of %.1f MiB in memory, at most %.1f; %s were there when they were needed\n"
                "read per token: %.2f MiB, waited for %.2f ms; read ahead %.0f experts, used %.0f, in vain %.0f so far\n",
                number("resident_expert_bytes") / 0x1p20, number("expert_bytes") / 0x1p20, number("budget_bytes") / 0x1p20,
                percent(offload.at("hit_rate")).c_str(), number("mib_read_per_token"), number("stall_ms_per_token"),
                number("prefetched"), number("prefetched_used"), number("prefetched_wasted"));
  std::string lines = text + std::string("there when needed, by loops:");
  const Document& rates = offload.at("hit_rate_per_loop");
  for (size_t k = 0; k < rates.size(); ++k) lines.append(" ").append(std::to_string(k + 1)).append(":").append(percent(rates[k]));
  return lines.append("\n");
}

std::vector<int64_t> histogram(const std::vector<int64_t>& depth, int64_t full) {
  std::vector<int64_t> counts(full);
  for (const int64_t k : depth) ++counts[k - 1];
  return counts;
}

}  // namespace rmse
