#include "server/store/snapshots.h"

#include <algorithm>
#include <charconv>
#include <cstdio>

#include "common/digest.h"
#include "common/files.h"
#include "server/store/failpoint.h"

namespace refinery::store {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "refinery snapshot 1\n";
constexpr size_t kSeqBytes = 8;
constexpr size_t kDigestBytes = 71;  // "sha256:" and 64 hex digits
constexpr size_t kHeaderBytes = kMagic.size() + kSeqBytes + kDigestBytes;
constexpr size_t kKept = 2;

fs::path FileOf(const fs::path& state, uint64_t seq) {
  char name[40];
  std::snprintf(name, sizeof(name), "%020llu.snapshot", static_cast<unsigned long long>(seq));
  return state / "snapshots" / name;
}

std::string SeqBytes(uint64_t seq) {
  std::string bytes(kSeqBytes, '\0');
  for (size_t i = 0; i < kSeqBytes; ++i) bytes[i] = static_cast<char>(seq >> (8 * i));
  return bytes;
}

}  // namespace

Status WriteSnapshot(const fs::path& state, uint64_t seq, std::string_view bytes) {
  RF_RETURN_IF_ERROR(CreateFolders(state / "snapshots"));
  std::string file;
  file.reserve(kHeaderBytes + bytes.size());
  file.append(kMagic).append(SeqBytes(seq)).append(DigestOf(bytes)).append(bytes);
  Failpoint("snapshot_before_rename");
  RF_RETURN_IF_ERROR(WriteFileAtomically(FileOf(state, seq), file));
  Failpoint("snapshot_after_rename");
  const std::vector<uint64_t> all = ListSnapshots(state);
  std::error_code ignored;  // one too many does no harm and goes next time
  for (fs::directory_iterator it(state / "snapshots", ignored), end; !ignored && it != end; it.increment(ignored)) {
    if (it->path().extension() != ".snapshot") fs::remove(it->path(), ignored);  // of a process that was killed
  }
  for (size_t i = kKept; i < all.size(); ++i) fs::remove(FileOf(state, all[i]), ignored);
  return absl::OkStatus();
}

std::vector<uint64_t> ListSnapshots(const fs::path& state) {
  std::vector<uint64_t> seqs;
  std::error_code error;
  for (fs::directory_iterator file(state / "snapshots", error), end; !error && file != end; file.increment(error)) {
    if (file->path().extension() != ".snapshot") continue;
    const std::string stem = file->path().stem().string();
    uint64_t seq = 0;
    const auto [rest, bad] = std::from_chars(stem.data(), stem.data() + stem.size(), seq);
    if (bad == std::errc() && rest == stem.data() + stem.size()) seqs.push_back(seq);
  }
  std::sort(seqs.rbegin(), seqs.rend());
  return seqs;
}

StatusOr<StoredSnapshot> ReadSnapshotFile(const fs::path& state, uint64_t seq) {
  const fs::path path = FileOf(state, seq);
  RF_ASSIGN_OR_RETURN(std::string file, ReadFile(path));
  const auto damaged = [&](std::string_view why) { return DataLoss(path.string(), ": ", why, "; remove the file"); };
  if (file.size() < kHeaderBytes || !std::string_view(file).starts_with(kMagic)) return damaged("it is no snapshot");
  if (std::string_view(file).substr(kMagic.size(), kSeqBytes) != SeqBytes(seq)) return damaged("it is of another event");
  const std::string digest = file.substr(kMagic.size() + kSeqBytes, kDigestBytes);
  file.erase(0, kHeaderBytes);
  if (DigestOf(file) != digest) return damaged("its bytes are damaged");
  return StoredSnapshot{.seq = seq, .bytes = std::move(file)};
}

StatusOr<StoredSnapshot> ReadNewestSnapshot(const fs::path& state, uint64_t max_seq) {
  Status last = NotFound(state.string(), " has no snapshot");
  for (const uint64_t seq : ListSnapshots(state)) {
    if (seq > max_seq) continue;
    StatusOr<StoredSnapshot> snapshot = ReadSnapshotFile(state, seq);
    if (snapshot.ok()) return snapshot;
    last = NotFound("no snapshot can be read: ", Message(snapshot.status()));
  }
  return last;
}

}  // namespace refinery::store
