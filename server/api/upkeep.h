// server/api/upkeep.h
//
// What the coordinator does beside its loop, on one thread of low priority: checks the log after an unclean stop, makes snapshots,
// collects blobs. The loop decides when and says what; nothing here touches the loop's state, so it never waits for any of it.
//
//   snapshot     the newest snapshot + the log's events after it, played into a state of its own and written down. So each snapshot
//                also proves that the log can be replayed.
//   collection   the loop names the artifacts that its state refers to; here their manifests are read and the rest is swept. What is
//                missing of them is told to the loop: active jobs make it again.
//
// Threads: Start from the loop; the work runs on a thread of this object, `done` as well.

#pragma once

#include <condition_variable>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/status.h"
#include "server/jobs/state.h"
#include "server/store/blob_store.h"

namespace refinery::api {

class Upkeep {
 public:
  Upkeep();
  // Waits for the work that runs.
  ~Upkeep();

  // Runs `work` beside the loop. False when other work is running: ask again later.
  bool Start(std::function<void()> work);

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::function<void()> work_;  // guarded; empty = idle
  bool stopping_ = false;       // guarded
  std::thread thread_;
};

// Writes the snapshot of the state after event `up_to` of the log in `state`.
Status MakeSnapshot(const std::filesystem::path& state, const std::string& code_version, uint64_t up_to);

// Digests of every artifact that `job` refers to: its files, what its tasks read, wrote and committed, its report.
void AddReferences(const jobs::JobState& job, std::vector<std::string>* artifacts);

struct Collected {
  store::BlobStore::Swept swept;
  std::vector<std::string> lost;  // artifacts of which a part is not there
};
// One pass of the collection: `artifacts` and every blob that their manifests name are live.
StatusOr<Collected> Collect(store::BlobStore& blobs, const std::vector<std::string>& artifacts, std::chrono::milliseconds now,
                            std::chrono::milliseconds grace);

}  // namespace refinery::api
