#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "common/files.h"

namespace refinery::checkpoint {
namespace {

constexpr uint64_t kDataAlignment = 64;

Status WriteError(const std::filesystem::path& path, int error) {
  std::string message = Join("cannot write ", path.string(), ": ", std::strerror(error));
  return error == ENOSPC || error == EDQUOT ? ResourceExhausted(message) : Unavailable(message);
}

// The length prefix and the JSON header, padded with blanks so that the data starts aligned.
StatusOr<std::string> Header(const std::map<std::string, TensorSpec>& specs,
                             const std::map<std::string, std::string>& metadata, uint64_t* data_bytes) {
  // Joined by hand: an ordered_json object searches its keys one by one, which is quadratic here.
  std::string text = "{";
  if (!metadata.empty()) text += Join("\"__metadata__\":", nlohmann::json(metadata).dump(), ",");
  uint64_t offset = 0;
  for (const auto& [name, spec] : specs) {
    std::string_view dtype = SafetensorsDtypeName(spec.dtype);
    if (dtype.empty()) return InvalidArgument("tensor ", name, " has a dtype that safetensors files cannot hold");
    uint64_t bytes = c10::elementSize(spec.dtype);
    for (int64_t size : spec.shape) bytes *= static_cast<uint64_t>(size);
    nlohmann::ordered_json entry = {
        {"dtype", dtype}, {"shape", spec.shape}, {"data_offsets", {offset, offset + bytes}}};
    text += Join(nlohmann::json(name).dump(), ":", entry.dump(), ",");
    offset += bytes;
  }
  if (text.back() == ',') text.pop_back();
  text += "}";
  uint64_t unpadded = sizeof(uint64_t) + text.size();
  text.append((kDataAlignment - unpadded % kDataAlignment) % kDataAlignment, ' ');
  std::string prefix(sizeof(uint64_t), '\0');
  for (size_t i = 0; i < prefix.size(); ++i) prefix[i] = static_cast<char>(text.size() >> (8 * i));
  *data_bytes = offset;
  return prefix + text;
}

}  // namespace

std::string_view SafetensorsDtypeName(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return "F64";
    case at::kFloat: return "F32";
    case at::kHalf: return "F16";
    case at::kBFloat16: return "BF16";
    case at::kLong: return "I64";
    case at::kInt: return "I32";
    case at::kShort: return "I16";
    case at::kChar: return "I8";
    case at::kByte: return "U8";
    case at::kBool: return "BOOL";
    default: return "";
  }
}

StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::filesystem::path& path, const std::map<std::string, TensorSpec>& specs,
    const std::map<std::string, std::string>& metadata) {
  static std::atomic<uint64_t> counter{0};
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  uint64_t data_bytes = 0;
  RF_ASSIGN_OR_RETURN(std::string header, Header(specs, metadata, &data_bytes));
  RF_RETURN_IF_ERROR(CreateFolders(path.has_parent_path() ? path.parent_path() : "."));
  writer->path_ = path;
  writer->temporary_ = path;
  writer->temporary_ += Join(".tmp", ::getpid(), "-", ++counter);
  writer->fd_ = ::open(writer->temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (writer->fd_ < 0) return WriteError(path, errno);
  writer->missing_ = header.size() + data_bytes;
  RF_RETURN_IF_ERROR(writer->Append(header));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

Status SafetensorsWriter::Append(std::string_view bytes) {
  if (bytes.size() > missing_) return Internal("more tensor bytes than announced for ", path_.string());
  missing_ -= bytes.size();
  while (!bytes.empty()) {
    ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return WriteError(path_, errno);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

Status SafetensorsWriter::Finish() {
  if (missing_ != 0) return Internal(missing_, " tensor bytes are missing in ", path_.string());
  if (::fsync(fd_) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) return WriteError(path_, errno);
  ::close(fd_);
  fd_ = -1;
  return SyncPath(path_.has_parent_path() ? path_.parent_path() : ".");
}

}  // namespace refinery::checkpoint
