// The store: every failpoint, lost blobs, a small disk.

#include <sys/mount.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "common/artifact_client.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/temporary_folder.h"
#include "server/store/failpoint.h"
#include "tests/e2e/reliability.h"
#include "tests/server/api/fake_worker.h"

namespace refinery::reliability {
namespace {

namespace fs = std::filesystem;

struct Ending {
  std::map<std::string, std::string> first, second;  // outputs of two jobs
  bool succeeded = false;
  int deaths = 0;
  int last_code = 0;
  int stop_code = 0;
};

StatusOr<v1::ArtifactRef> UploadText(const std::shared_ptr<grpc::Channel>& channel, const std::string& text) {
  RF_ASSIGN_OR_RETURN(const TemporaryFolder folder, TemporaryFolder::Make("refinery-reliability"));
  const fs::path path = folder.path();
  RF_RETURN_IF_ERROR(WriteFileAtomically(path / "text", text));
  return ArtifactClient(channel, {.max_attempts = 3}).UploadFolder(path, "text");
}

// Two jobs one after the other, an artifact that nobody refers to, time for snapshots, compaction and collection, a gentle stop.
// With a failpoint the coordinator dies in the middle and is started again without it.
StatusOr<Ending> RunScript(const fs::path& state, const std::string& failpoint) {
  std::map<std::string, std::string> first;
  if (!failpoint.empty()) first["REFINERY_FAILPOINT"] = failpoint;
  Coordinator coordinator({.state = state,
                           .environment = {{"REFINERY_SNAPSHOT_EVERY", "10"},
                                           {"REFINERY_COLLECT_MS", "500"},
                                           {"REFINERY_RETENTION_MS", "0"}},
                           .first_environment = first,
                           });
  const auto channel = coordinator.Connect();
  RF_RETURN_IF_ERROR(Persist([&] { return UploadText(channel, "nobody wants this\n").status(); }));
  Ending ending;
  for (auto* outputs : {&ending.first, &ending.second}) {
    const bool is_first = outputs == &ending.first;
    RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("x", 2, is_first ? 1 : 2), is_first ? "one" : "two"));
    RF_ASSIGN_OR_RETURN(const v1::Job ended, PlayToTheEnd(channel, job));
    if (ended.state() != v1::Job::SUCCEEDED) return Internal("the job ended ", ended.ShortDebugString().substr(0, 200));
    *outputs = OutputsOf(ended);
    Sleep(2.5);  // upkeep looks once a second
  }
  for (const Clock::time_point start = Clock::now(); !failpoint.empty() && failpoint != "checkpoint_wal" &&
       coordinator.deaths() == 0 && SecondsSince(start) < 8;) {
    Sleep(0.1);
  }
  ending.succeeded = true;
  ending.stop_code = coordinator.StopGently();
  ending.deaths = coordinator.deaths();
  ending.last_code = coordinator.last_code();
  coordinator.Start();  // and everything can be read again
  for (const char* id : {"one", "two"}) {
    RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("x", 2, std::string(id) == "one" ? 1 : 2), id));
    RF_ASSIGN_OR_RETURN(const v1::Job again, Describe(channel, job));
    ending.succeeded &= OutputsOf(again) == (std::string(id) == "one" ? ending.first : ending.second);
  }
  return ending;
}

int RemoveBlobs(const fs::path& state) {
  int removed = 0;
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(state / "cas")) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  for (const fs::path& file : files) removed += fs::remove(file);
  return removed;
}

}  // namespace

// Goal: wherever the coordinator dies, the end is that of an undisturbed run.  Method: the same script once undisturbed and once for
// each failpoint; outputs of every task, exit code 137 as proof that the place was passed.
void Failpoints(const Settings& settings, Checks& checks) {
  const auto undisturbed = RunScript(settings.folder / "undisturbed", "");
  if (!undisturbed.ok()) return checks.Row("failpoints: " + Message(undisturbed.status()), 0, "", "", false);
  std::vector<std::string> names;
  for (const std::string_view name : store::kFailpoints) {
    names.emplace_back(name);
    if (name.starts_with("append") || name == "reply_before") names.push_back(Join(name, ":20"));
  }
  std::atomic<size_t> next{0};
  std::atomic<int> equal{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {  // they mostly wait
    threads.emplace_back([&] {
      for (size_t n = next++; n < names.size(); n = next++) {
        const auto ending = RunScript(settings.folder / Join("failpoint", n), names[n]);
        const bool at_stop = names[n] == "checkpoint_wal";
        const bool died = ending.ok() && (at_stop ? ending->stop_code == 137 : ending->deaths == 1 && ending->last_code == 137);
        const bool same = ending.ok() && ending->succeeded && ending->first == undisturbed->first &&
                          ending->second == undisturbed->second;
        if (died && same) ++equal;
        if (!died || !same) {
          checks.Row(Join("failpoint ", names[n], ending.ok() ? died ? ": another end" : ": was not passed"
                                                              : ": " + Message(ending.status())), 0, "", "", false);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  checks.Row("failpoints walked with the end of an undisturbed run", equal, "", Join("= ", names.size()),
             equal == static_cast<int>(names.size()) && undisturbed->deaths == 0 && undisturbed->stop_code == 0);
}

// Goal: lost or damaged blobs cost work, never a wrong result.  Method: a job runs, its blobs vanish, the same recipe runs again: its
// tasks must run again instead of being taken from the cache. And a result whose blobs are lost is refused by name.
void BlobLoss(const Settings& settings, Checks& checks) {
  const fs::path state = settings.folder / "blob_loss";
  Coordinator coordinator({.state = state});
  const auto channel = coordinator.Connect();
  const auto run = [&](const char* id) -> StatusOr<v1::Job> {
    RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("x", 2, 1), id));
    return PlayToTheEnd(channel, job);
  };
  const auto first = run("one");
  const auto cached = run("two");
  const int removed = RemoveBlobs(state);
  const auto second = run("three");
  if (!first.ok() || !cached.ok() || !second.ok()) {
    return checks.Row("blob loss: " + Message(!first.ok() ? first.status() : !cached.ok() ? cached.status() : second.status()), 0,
                      "", "", false);
  }
  const auto count = [](const v1::Job& job, v1::Task::State state) {
    return std::count_if(job.tasks().begin(), job.tasks().end(), [&](const v1::Task& task) { return task.state() == state; });
  };
  // Some tasks of one job are identical to each other: those are taken from the cache in every run.
  const auto reused = count(*second, v1::Task::CACHED) - count(*first, v1::Task::CACHED);
  checks.Row("after the loss of every blob: results reused from before it", static_cast<double>(reused), "", "= 0",
             reused == 0 && count(*cached, v1::Task::CACHED) > count(*first, v1::Task::CACHED) + 3 && removed > 0 &&
             second->state() == v1::Job::SUCCEEDED && OutputsOf(*first) == OutputsOf(*second));

  const auto job = Submit(channel, Recipe("x", 1, 7), "four");
  testing::FakeWorker worker(channel, "w");
  const auto lease = worker.Next();
  auto request = lease.ok() ? worker.MakeSuccess(*lease) : StatusOr<v1::CompleteTaskRequest>(lease.status());
  RemoveBlobs(state);
  const Status refused = request.ok() ? worker.Complete(*request) : request.status();
  const bool clear = absl::IsFailedPrecondition(refused) && Message(refused).find("upload") != std::string::npos;
  checks.Row(clear ? "a result without its blobs is refused and says what to upload" : Message(refused), clear ? 1 : 0, "", "= 1",
             job.ok() && clear && worker.Run(*lease).ok());
}

// Goal: a full disk refuses work in words, goes on reading and recovers.  Method: the state folder on a tmpfs of 8 MiB.
void SmallDisk(const Settings& settings, Checks& checks) {
  const fs::path disk = settings.folder / "disk";
  RF_CHECK(CreateFolders(disk).ok());
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=8m") != 0) {
    return checks.Skip("a disk of 8 MiB", Join("mounting a tmpfs is not permitted (", std::strerror(errno), ")"));
  }
  struct Unmount {
    fs::path path;
    ~Unmount() { umount2(path.c_str(), MNT_DETACH); }
  } const unmount{disk};
  Coordinator coordinator({.state = disk / "state"});
  const auto channel = coordinator.Connect();
  const auto fail = [&](const Status& status) { checks.Row("small disk: " + Message(status), 0, "", "", false); };
  const auto job = Submit(channel, Recipe("x", 2, 1), "one");
  if (!job.ok()) return fail(job.status());
  Status refused;
  int uploads = 0;
  for (; refused.ok() && uploads < 100; ++uploads) {
    refused = UploadText(channel, Join(uploads, std::string(300'000, 'x'))).status();
  }
  const bool full = absl::IsResourceExhausted(refused) && Message(refused).find("free space") != std::string::npos;
  std::ofstream ballast(disk / "ballast", std::ios::binary);
  ballast << std::string(8 << 20, 'x');  // as much as fits
  ballast.close();
  Sleep(2.2);  // looked at once a second
  const auto second = Submit(channel, Recipe("x", 2, 2), "two");
  const bool no_jobs = absl::IsResourceExhausted(second.status());
  const bool reads = Describe(channel, *job).ok();
  fs::remove(disk / "ballast");
  int removed = 0;
  for (const auto& entry : fs::recursive_directory_iterator(disk / "state" / "cas")) {
    if (entry.is_regular_file() && entry.file_size() > 200'000) removed += fs::remove(entry.path());
  }
  Sleep(2.2);
  const auto third = Submit(channel, Recipe("x", 2, 2), "two");
  coordinator.Kill();
  coordinator.Start();
  const auto ended = third.ok() ? PlayToTheEnd(channel, *third) : StatusOr<v1::Job>(third.status());
  const bool recovered = ended.ok() && ended->state() == v1::Job::SUCCEEDED && removed > 0;
  checks.Row("disk of 8 MiB: an upload is refused in words", full, "", "= 1", full);
  checks.Row("disk of 8 MiB: no new job, everything can be read", no_jobs && reads, "", "= 1", no_jobs && reads);
  checks.Row("disk of 8 MiB: works again when there is room", recovered, "", "= 1", recovered && coordinator.deaths() == 0);
  if (!full) fail(refused);
  if (!no_jobs) fail(second.status());
  if (!ended.ok()) fail(ended.status());
}

}  // namespace refinery::reliability
