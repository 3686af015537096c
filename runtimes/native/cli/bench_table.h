// The bench's document as Markdown, for people: what rmse-bench shows.
#pragma once

#include <string>

#include "../core/json.h"

namespace rmse {

std::string markdown(const Document& document);

}  // namespace rmse
