#include "tests/simulation/fake_log.h"

#include <cstring>

namespace refinery::simulation {
namespace {

constexpr size_t kHeaderBytes = 12;  // length (4), checksum (8)

uint64_t Checksum(std::string_view bytes) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  return hash;
}

void AppendSized(std::string* out, std::string_view part) {
  const auto size = static_cast<uint32_t>(part.size());
  out->append(reinterpret_cast<const char*>(&size), sizeof(size));
  out->append(part);
}

}  // namespace

Status FakeLog::Write(const jobs::Events& events) {
  if (full_) return ResourceExhausted("the simulated disk is full");
  std::string batch;
  for (const v1::Event& event : events) AppendSized(&batch, event.SerializeAsString());
  const auto size = static_cast<uint32_t>(batch.size());
  const uint64_t checksum = Checksum(batch);
  bytes_.append(reinterpret_cast<const char*>(&size), sizeof(size));
  bytes_.append(reinterpret_cast<const char*>(&checksum), sizeof(checksum));
  bytes_ += batch;
  return absl::OkStatus();
}

void FakeLog::Crash(Random& random) {
  if (synced_ == bytes_.size()) return;
  const auto unsynced = static_cast<int64_t>(bytes_.size() - synced_);
  // Often all or nothing, else any length; a torn end may also hold bytes of something else.
  const int64_t kept = random.Chance(0.3) ? unsynced : random.Chance(0.4) ? 0 : random.Between(0, unsynced);
  bytes_.resize(synced_ + static_cast<size_t>(kept));
  if (kept > 0 && kept < unsynced && random.Chance(0.5)) bytes_.back() = static_cast<char>(~bytes_.back());
  synced_ = bytes_.size();
}

StatusOr<jobs::Events> FakeLog::Recover() {
  jobs::Events events;
  size_t position = 0;
  while (position + kHeaderBytes <= bytes_.size()) {
    uint32_t size = 0;
    uint64_t checksum = 0;
    std::memcpy(&size, &bytes_[position], sizeof(size));
    std::memcpy(&checksum, &bytes_[position + sizeof(size)], sizeof(checksum));
    if (position + kHeaderBytes + size > bytes_.size()) break;
    const std::string_view batch = std::string_view(bytes_).substr(position + kHeaderBytes, size);
    if (Checksum(batch) != checksum) break;
    for (size_t at = 0; at < batch.size();) {
      uint32_t part = 0;
      std::memcpy(&part, &batch[at], sizeof(part));
      v1::Event event;
      if (!event.ParseFromArray(&batch[at + sizeof(part)], static_cast<int>(part))) {
        return DataLoss("an event in the simulated log cannot be parsed");
      }
      events.push_back(std::move(event));
      at += sizeof(part) + part;
    }
    position += kHeaderBytes + size;
  }
  bytes_.resize(position);
  synced_ = position;
  return events;
}

void FakeLog::Compact() {
  RF_CHECK(synced_ == bytes_.size());
  bytes_.clear();
  bytes_.shrink_to_fit();
  synced_ = 0;
}

}  // namespace refinery::simulation
