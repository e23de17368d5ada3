#include "client/data/zip_file.h"

#include <zip.h>
#include <zlib.h>

#include <memory>
#include <vector>

namespace refinery::client {
namespace {

constexpr size_t kBuffer = 256 << 10;
constexpr size_t kMaxLineBytes = 16 << 20;
constexpr int kGzipWindow = 15 + 16;

// Inflates a gzip stream that comes in pieces and cuts it into lines.
class GzipLines {
 public:
  explicit GzipLines(const std::function<Status(std::string_view)>& on_line) : on_line_(on_line) {
    RF_CHECK(inflateInit2(&stream_, kGzipWindow) == Z_OK);
  }
  ~GzipLines() { inflateEnd(&stream_); }
  GzipLines(const GzipLines&) = delete;
  GzipLines& operator=(const GzipLines&) = delete;

  Status Add(std::vector<unsigned char>& bytes, size_t size) {
    stream_.next_in = bytes.data();
    stream_.avail_in = static_cast<uInt>(size);
    while (stream_.avail_in > 0) {
      stream_.next_out = out_.data();
      stream_.avail_out = static_cast<uInt>(out_.size());
      int code = inflate(&stream_, Z_NO_FLUSH);
      if (code != Z_OK && code != Z_STREAM_END) return DataLoss("the gzip data is damaged");
      RF_RETURN_IF_ERROR(Cut({reinterpret_cast<char*>(out_.data()), out_.size() - stream_.avail_out}));
      ended_ = code == Z_STREAM_END;
      if (ended_ && stream_.avail_in > 0) inflateReset(&stream_);   // members may follow one another
    }
    return absl::OkStatus();
  }

  Status Finish() {
    if (!ended_) return DataLoss("the gzip data ends early");
    return line_.empty() ? absl::OkStatus() : on_line_(line_);
  }

 private:
  Status Cut(std::string_view text) {
    while (!text.empty()) {
      size_t end = text.find('\n');
      line_ += text.substr(0, end);
      if (line_.size() > kMaxLineBytes) return ResourceExhausted("a line is longer than ", kMaxLineBytes, " bytes");
      if (end == std::string_view::npos) return absl::OkStatus();
      RF_RETURN_IF_ERROR(on_line_(line_));
      line_.clear();
      text.remove_prefix(end + 1);
    }
    return absl::OkStatus();
  }

  const std::function<Status(std::string_view)>& on_line_;
  z_stream stream_{};
  std::vector<unsigned char> out_ = std::vector<unsigned char>(kBuffer);
  std::string line_;
  bool ended_ = false;
};

}  // namespace

Status ReadGzipMember(const std::filesystem::path& archive, const std::string& member,
                      const std::function<Status(std::string_view line)>& on_line) {
  int error = 0;
  std::unique_ptr<zip_t, void (*)(zip_t*)> zip(zip_open(archive.c_str(), ZIP_RDONLY, &error), zip_discard);
  if (zip == nullptr) return NotFound("cannot open ", archive.string(), " as a zip archive (libzip error ", error, ")");
  std::unique_ptr<zip_file_t, int (*)(zip_file_t*)> file(zip_fopen(zip.get(), member.c_str(), 0), zip_fclose);
  if (file == nullptr) return NotFound(archive.string(), " holds no ", member);
  GzipLines lines(on_line);
  std::vector<unsigned char> buffer(kBuffer);
  while (true) {
    zip_int64_t got = zip_fread(file.get(), buffer.data(), buffer.size());
    if (got < 0) return DataLoss(archive.string(), ": ", member, " is damaged");
    if (got == 0) break;
    RF_RETURN_IF_ERROR(lines.Add(buffer, static_cast<size_t>(got)));
  }
  return lines.Finish();
}

}  // namespace refinery::client
