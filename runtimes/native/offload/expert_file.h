// The file that a program's experts lie in, beside the mapping that the engine has of it: read piece by piece, or mapped by its own
// account, where pages come and go as they are told to.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "../core/opened_file.h"

namespace rmse {

class ExpertFile {
 public:
  // Throws std::runtime_error, one line, where it cannot be opened.
  explicit ExpertFile(const std::string& path);
  ~ExpertFile();
  ExpertFile(const ExpertFile&) = delete;

  const std::string& path() const { return file_.path(); }
  // Where in the file what this process has mapped at `address` lies; -1: it is nothing of this file.
  int64_t offset_of(const void* address) const;

  // Reads what lies at `offset` into pieces of memory, one after the other; once more where that fails. Returns nothing, or in one
  // line why it did not work. What was read is what the file was opened with only if it has not `changed` afterwards.
  std::string read(int64_t offset, std::span<const iovec> to) const;

  // Maps the file. False where this system cannot say of mapped pages that they are to be there, or why they are not.
  bool map();
  // Where byte `offset` is mapped.
  const std::byte* at(int64_t offset) const { return mapped_ + offset; }
  // The system begins to read, and nobody waits.
  void announce(int64_t offset, size_t size) const;
  // All pages of a part are mapped, from the system's cache or from the disk; fails as `read` does.
  std::string bring(int64_t offset, size_t size) const;
  // The mapped pages that a part lies on.
  std::span<std::byte> pages(int64_t offset, size_t size) const;
  // Such pages are not mapped any more.
  void drop(std::span<const std::span<std::byte>> parts) const;

  // Whether somebody has written to the file since it was opened: nothing, or a line that says so.
  std::string changed() const { return file_.changed(); }

 private:
  std::string cannot_read(const std::string& problem) const;

  OpenedFile file_;
  std::byte* mapped_ = nullptr;  // null: it is not
  int self_ = -1;  // this process, for the one call that takes many parts
};

}  // namespace rmse
