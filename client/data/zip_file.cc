#include "client/data/zip_file.h"

#include <zip.h>
#include <zlib.h>

#include <fstream>
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

using Archive = std::unique_ptr<zip_t, void (*)(zip_t*)>;

StatusOr<Archive> OpenArchive(const std::filesystem::path& path) {
  int error = 0;
  Archive zip(zip_open(path.c_str(), ZIP_RDONLY, &error), zip_discard);
  if (zip == nullptr) return NotFound("cannot open ", path.string(), " as a zip archive (libzip error ", error, ")");
  return zip;
}

// Calls `on_piece` with the member's bytes, in pieces.
Status ReadMember(const std::filesystem::path& archive, const std::string& member,
                  const std::function<Status(std::vector<unsigned char>& buffer, size_t size)>& on_piece) {
  RF_ASSIGN_OR_RETURN(Archive zip, OpenArchive(archive));
  std::unique_ptr<zip_file_t, int (*)(zip_file_t*)> file(zip_fopen(zip.get(), member.c_str(), 0), zip_fclose);
  if (file == nullptr) return NotFound(archive.string(), " holds no ", member);
  std::vector<unsigned char> buffer(kBuffer);
  while (true) {
    zip_int64_t got = zip_fread(file.get(), buffer.data(), buffer.size());
    if (got < 0) return DataLoss(archive.string(), ": ", member, " is damaged");
    if (got == 0) return absl::OkStatus();
    RF_RETURN_IF_ERROR(on_piece(buffer, static_cast<size_t>(got)));
  }
}

}  // namespace

StatusOr<std::vector<std::string>> ListMembers(const std::filesystem::path& archive) {
  RF_ASSIGN_OR_RETURN(Archive zip, OpenArchive(archive));
  std::vector<std::string> names;
  for (zip_int64_t i = 0; i < zip_get_num_entries(zip.get(), 0); ++i) {
    const char* name = zip_get_name(zip.get(), static_cast<zip_uint64_t>(i), 0);
    if (name != nullptr) names.emplace_back(name);
  }
  return names;
}

Status ExtractMember(const std::filesystem::path& archive, const std::string& member, const std::filesystem::path& file) {
  std::ofstream out(file, std::ios::binary | std::ios::trunc);
  RF_RETURN_IF_ERROR(ReadMember(archive, member, [&](std::vector<unsigned char>& buffer, size_t size) {
    out.write(reinterpret_cast<char*>(buffer.data()), static_cast<std::streamsize>(size));
    return absl::OkStatus();
  }));
  out.close();
  return out ? absl::OkStatus() : Unavailable(file.string(), ": writing failed; is the disk full?");
}

Status ReadGzipMember(const std::filesystem::path& archive, const std::string& member,
                      const std::function<Status(std::string_view line)>& on_line) {
  GzipLines lines(on_line);
  RF_RETURN_IF_ERROR(ReadMember(archive, member, [&](std::vector<unsigned char>& buffer, size_t size) {
    return lines.Add(buffer, size);
  }));
  return lines.Finish();
}

}  // namespace refinery::client
