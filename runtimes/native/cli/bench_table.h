// The bench's document as Markdown, for people: what rmse-bench shows.
#pragma once

#include <string>

namespace rmse {

class Json;

std::string markdown(const Json& document);

}  // namespace rmse
