#include "common/digest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>

namespace refinery {
namespace {

constexpr std::string_view kPrefix = "sha256:";

// A relative path that stays inside its folder.
bool IsSafePath(std::string_view path) {
  if (path.empty() || path.front() == '/' || path.back() == '/') return false;
  size_t begin = 0;
  while (begin <= path.size()) {
    size_t end = std::min(path.find('/', begin), path.size());
    std::string_view part = path.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") return false;
    begin = end + 1;
  }
  return path.find('\n') == std::string_view::npos && path.find('\0') == std::string_view::npos;
}

}  // namespace

struct Sha256::Impl {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~Impl() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : impl_(std::make_unique<Impl>()) {
  RF_CHECK(EVP_DigestInit_ex(impl_->context, EVP_sha256(), nullptr) == 1);
}
Sha256::~Sha256() = default;

void Sha256::Update(std::string_view bytes) {
  RF_CHECK(EVP_DigestUpdate(impl_->context, bytes.data(), bytes.size()) == 1);
}

std::string Sha256::Finish() {
  std::array<unsigned char, 32> raw{};
  unsigned int size = raw.size();
  RF_CHECK(EVP_DigestFinal_ex(impl_->context, raw.data(), &size) == 1);
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out(kPrefix);
  for (unsigned char byte : raw) {
    out += kHex[byte >> 4];
    out += kHex[byte & 15];
  }
  return out;
}

std::string DigestOf(std::string_view bytes) {
  Sha256 hash;
  hash.Update(bytes);
  return hash.Finish();
}

StatusOr<std::string> DigestOfFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("cannot read ", path.string());
  Sha256 hash;
  std::vector<char> buffer(1 << 20);
  while (file) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    hash.Update({buffer.data(), static_cast<size_t>(file.gcount())});
  }
  if (file.bad()) return Unavailable("reading ", path.string(), " failed half-way");
  return hash.Finish();
}

bool IsDigest(std::string_view digest) {
  if (digest.size() != kPrefix.size() + 64 || digest.substr(0, kPrefix.size()) != kPrefix) return false;
  return std::all_of(digest.begin() + kPrefix.size(), digest.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

uint64_t DeriveSeed(uint64_t seed, std::string_view path) {
  std::string hex = DigestOf(Join(seed, "/", path)).substr(kPrefix.size(), 16);
  return std::stoull(hex, nullptr, 16);
}

std::string ManifestText(std::vector<FileEntry> files) {
  std::sort(files.begin(), files.end(),
            [](const FileEntry& a, const FileEntry& b) { return a.path < b.path; });
  std::string text;
  for (const FileEntry& file : files) text += Join(file.digest, " ", file.size, " ", file.path, "\n");
  return text;
}

StatusOr<std::vector<FileEntry>> ParseManifest(std::string_view text) {
  std::vector<FileEntry> files;
  size_t line_number = 0;
  while (!text.empty()) {
    ++line_number;
    size_t end = text.find('\n');
    if (end == std::string_view::npos) return InvalidArgument("manifest line ", line_number, " is cut off");
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end + 1);
    size_t first = line.find(' ');
    size_t second = first == std::string_view::npos ? first : line.find(' ', first + 1);
    if (second == std::string_view::npos) return InvalidArgument("manifest line ", line_number, " has no three fields");
    FileEntry file{.path = std::string(line.substr(second + 1)), .digest = std::string(line.substr(0, first))};
    std::string_view size = line.substr(first + 1, second - first - 1);
    auto [rest, error] = std::from_chars(size.data(), size.data() + size.size(), file.size);
    const bool is_canonical = size == "0" || !size.starts_with('0');
    if (error != std::errc() || rest != size.data() + size.size() || !is_canonical)
      return InvalidArgument("manifest line ", line_number, " has a bad size");
    if (!IsDigest(file.digest)) return InvalidArgument("manifest line ", line_number, " has a bad digest");
    if (!IsSafePath(file.path)) return InvalidArgument("manifest line ", line_number, " has an unsafe path");
    if (!files.empty() && !(files.back().path < file.path))
      return InvalidArgument("manifest line ", line_number, " is out of order");
    files.push_back(std::move(file));
  }
  return files;
}

StatusOr<std::vector<FileEntry>> ListFolder(const std::filesystem::path& folder) {
  std::vector<FileEntry> files;
  std::error_code error;
  auto it = std::filesystem::recursive_directory_iterator(folder, error);
  if (error) return NotFound("cannot read folder ", folder.string(), ": ", error.message());
  for (const auto& entry : it) {
    if (entry.is_symlink()) return FailedPrecondition(entry.path().string(), " is a link; artifacts hold plain files");
    if (entry.is_directory()) continue;
    if (!entry.is_regular_file()) return FailedPrecondition(entry.path().string(), " is not a plain file");
    RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(entry.path()));
    files.push_back({.path = std::filesystem::relative(entry.path(), folder).generic_string(),
                     .digest = std::move(digest),
                     .size = entry.file_size()});
  }
  std::sort(files.begin(), files.end(),
            [](const FileEntry& a, const FileEntry& b) { return a.path < b.path; });
  return files;
}

}  // namespace refinery
