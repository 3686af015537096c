// The file that a program's experts lie in, beside the mapping that the engine has of it.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>

#include "../core/opened_file.h"

namespace rmse {

class ExpertFile {
 public:
  // Throws std::runtime_error, one line, where it cannot be opened.
  explicit ExpertFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  // Where in the file what this process has mapped at `address` lies; -1: it is nothing of this file.
  int64_t offset_of(const void* address) const;

  // Reads what lies at `offset` into pieces of memory, one after the other; once more where that fails. Returns nothing, or in one
  // line why it did not work. What was read is what the file was opened with only if it has not `changed` afterwards.
  std::string read(int64_t offset, std::span<const iovec> to) const;

  // Whether somebody has written to the file since it was opened: nothing, or a line that says so.
  std::string changed() const { return file_.changed(); }

 private:
  OpenedFile file_;
};

}  // namespace rmse
