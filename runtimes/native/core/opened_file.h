// A file that is read in pieces by several threads, and must stay as it was when it was opened.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>

namespace rmse {

class OpenedFile {
 public:
  // Throws std::runtime_error, one line, where it cannot be opened.
  explicit OpenedFile(const std::string& path);
  ~OpenedFile();
  OpenedFile(const OpenedFile&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return opened_.size; }  // bytes, when it was opened
  int descriptor() const { return file_; }
  // Reads what lies at `offset` into pieces of memory, one after the other. Returns nothing, or why it could not.
  std::string read(int64_t offset, std::span<const iovec> to) const;
  // Whether somebody has written to the file since it was opened: nothing, or a line that says so.
  std::string written_to() const;
  // The same, and also where anything else about it was changed: a link more, or a time that was put back.
  std::string changed() const;

 private:
  struct Stamp {
    int64_t size, modified, changed;  // bytes, nanoseconds

    bool operator==(const Stamp&) const = default;
  };
  bool stamp(Stamp& found) const;
  std::string complaint() const;

  std::string path_;
  int file_;
  Stamp opened_ = {};
};

}  // namespace rmse
