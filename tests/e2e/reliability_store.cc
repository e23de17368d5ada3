// The store: every failpoint, lost blobs, a small disk.

#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "common/artifact_client.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/temporary_folder.h"
#include "refinery/v1/admin_service.grpc.pb.h"
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
  // On a slow machine the first snapshot is of the middle of the first job, and its events go only after one more: work brings it.
  const bool passed_by_itself = !failpoint.empty() && failpoint != "checkpoint_wal";
  for (int extra = 1; passed_by_itself && coordinator.deaths() == 0 && extra <= 3; ++extra) {
    for (const Clock::time_point start = Clock::now(); coordinator.deaths() == 0 && SecondsSince(start) < 8;) Sleep(0.1);
    if (coordinator.deaths() > 0) break;
    RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("x", 2, 2 + extra), Join("more-", extra)));
    RF_RETURN_IF_ERROR(PlayToTheEnd(channel, job).status());
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

constexpr uint32_t kShards = 24;

// Takes every byte that is left.
void Fill(const fs::path& file) {
  const int fd = open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  for (size_t block = 1 << 16; block > 0;) {
    const std::string bytes(block, 'x');
    if (write(fd, bytes.data(), bytes.size()) <= 0) block /= 2;
  }
  close(fd);
}

// Completes what comes before the shards, leases all of those and uploads what they are said to have made; completes none.
StatusOr<std::vector<v1::CompleteTaskRequest>> UploadShards(testing::FakeWorker& worker) {
  std::vector<v1::CompleteTaskRequest> ends;
  for (int polls = 0; polls < 20 && ends.size() < kShards; ++polls) {
    RF_ASSIGN_OR_RETURN(const v1::SynchronizeResponse leases, worker.Synchronize(worker.Request({}, kShards)));
    for (const v1::Lease& lease : leases.grants()) {
      RF_ASSIGN_OR_RETURN(v1::CompleteTaskRequest end, worker.MakeSuccess(lease));
      if (!lease.token().path().starts_with("synthesize/")) {
        RF_RETURN_IF_ERROR(worker.Complete(end));
      } else {
        ends.push_back(std::move(end));
      }
    }
  }
  return ends;
}

// When the process that answers was started, by its own word; 0 without an answer.
int64_t StartTimeOf(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::CoordinatorInfo info;
  return v1::AdminService::NewStub(channel)->GetCoordinator(&context, {}, &info).ok() ? info.start_time_ms() : 0;
}

// Removes the manifests of everything that the job has made so far; returns how many.
int RemoveOutputs(const fs::path& state, const v1::Job& job) {
  int removed = 0;
  for (const v1::Task& task : job.tasks()) {
    const std::string hex = task.output().digest().substr(task.output().digest().find(':') + 1);
    if (!task.output().digest().empty()) removed += fs::remove(state / "cas" / hex.substr(0, 2) / hex);
  }
  return removed;
}

// A job loses everything that it made when its first training starts.
StatusOr<v1::Job> RunWithLoss(const fs::path& state) {
  Coordinator coordinator({.state = state, .environment = {{"REFINERY_COLLECT_MS", "1000"}}});
  const auto channel = coordinator.Connect();
  RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("x", 2, 1), "five"));
  testing::FakeWorker worker(channel, "w");
  for (bool trains = false; !trains;) {
    RF_ASSIGN_OR_RETURN(const v1::Lease lease, worker.Next());
    if (lease.token().job().empty()) return Internal("no task was granted");
    trains = lease.spec().has_train();
    if (trains) {
      RF_ASSIGN_OR_RETURN(const v1::Job now, Describe(channel, job));
      if (RemoveOutputs(state, now) == 0) return Internal("nothing was there to be removed");
      Sleep(3);  // these workers download nothing, so it is upkeep that finds the loss: it looks once a second
    }
    RF_RETURN_IF_ERROR(worker.Run(lease));
  }
  return PlayToTheEnd(channel, job);
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

  const auto disturbed = RunWithLoss(settings.folder / "loss_within_a_job");
  uint32_t losses = 0;
  const v1::Job shown = disturbed.value_or(v1::Job());
  for (const v1::Task& task : shown.tasks()) losses += task.losses();
  const bool same = disturbed.ok() && disturbed->state() == v1::Job::SUCCEEDED && OutputsOf(*disturbed) == OutputsOf(*first);
  checks.Row(disturbed.ok() ? "results lost in the middle of a job that ran again, with the end of an undisturbed run"
                            : Message(disturbed.status()), losses, "", ">= 1", same && losses >= 1);

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

// Goal: the disk fills in the middle of completions: callers whose change did not fit are told so, nothing acknowledged is lost, nothing
// refused is kept, and the same process goes on when there is room.  Method: a worker holds many leases and has uploaded its outputs; a
// third of the completions, another third from four threads while the disk is filled to the last byte, all of them on the full disk,
// and again with room; a kill.
void DiskFillsUnderLoad(const fs::path& disk, Checks& checks) {
  const auto fail = [&](const Status& status) { checks.Row("disk that fills: " + Message(status), 0, "", "", false); };
  Coordinator coordinator({.state = disk / "state", .own_disk = true});
  const auto channel = coordinator.Connect();
  const auto job = Submit(channel, Recipe("x", kShards, 1), "one");
  if (!job.ok()) return fail(job.status());
  testing::FakeWorker worker(channel, "w");
  const auto uploaded = UploadShards(worker);
  if (!uploaded.ok()) return fail(uploaded.status());
  const std::vector<v1::CompleteTaskRequest>& ends = *uploaded;
  const int64_t started = StartTimeOf(channel);
  std::vector<char> done(ends.size(), 0);  // acknowledged
  std::mutex mutex;
  std::string in_log;                      // what a caller heard whose change did not fit into the log
  const auto complete = [&](size_t first, size_t end) {
    for (size_t i = first; i < end; i += 4) {
      if (done[i]) continue;
      const Status status = worker.Complete(ends[i]);
      done[i] = status.ok();
      const std::lock_guard lock(mutex);
      if (absl::IsResourceExhausted(status) && in_log.empty() && Message(status).find("event log") != std::string::npos) {
        in_log = Message(status);
      }
    }
  };
  const auto from_four_threads = [&](size_t end) {
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; ++t) threads.emplace_back(complete, t, end);
    for (std::thread& thread : threads) thread.join();
  };
  const auto count = [&] { return std::count(done.begin(), done.end(), 1); };
  for (size_t i = 0; i < ends.size() / 3; ++i) done[i] = worker.Complete(ends[i]).ok();
  std::thread filler([&] { Fill(disk / "ballast"); });
  from_four_threads(2 * ends.size() / 3);
  filler.join();
  Fill(disk / "ballast");
  from_four_threads(ends.size());
  const auto before_room = count();
  // Every task that is DONE was acknowledged, and the other way round.
  const auto equals_acknowledged = [&] {
    const auto now = Describe(channel, *job);
    if (!now.ok()) return false;
    const auto outputs = OutputsOf(*now);
    for (size_t i = 0; i < ends.size(); ++i) {
      const auto found = outputs.find(ends[i].lease().path());
      const bool is_done = found != outputs.end() && found->second == ends[i].success().output().digest();
      if (is_done != static_cast<bool>(done[i])) return false;
    }
    return true;
  };
  const bool exact = equals_acknowledged();
  fs::remove(disk / "ballast");
  for (const Clock::time_point start = Clock::now(); count() < static_cast<ptrdiff_t>(ends.size()) && SecondsSince(start) < 10;) {
    from_four_threads(ends.size());
    Sleep(0.1);
  }
  const bool same_process = coordinator.deaths() == 0 && StartTimeOf(channel) == started && started > 0;
  coordinator.Kill();
  coordinator.Start();
  const bool kept = Persist([&] { return Describe(channel, *job).status(); }).ok() && equals_acknowledged();
  checks.Row(in_log.empty() ? "disk that fills: the log had room for everything" : "disk that fills: changes did not fit into the log",
             static_cast<double>(ends.size() - before_room), "", Join(">= ", kShards / 3, ", of ", ends.size()),
             !in_log.empty() && before_room <= static_cast<ptrdiff_t>(2 * kShards / 3) &&
                 before_room >= static_cast<ptrdiff_t>(kShards / 3));
  checks.Row("disk that fills: tasks done are those acknowledged, then and after a kill", exact && kept, "", "= 1", exact && kept);
  checks.Row("disk that fills: with room the same process took the rest", static_cast<double>(count()), "", Join("= ", kShards),
             same_process && count() == static_cast<ptrdiff_t>(kShards));
}

// Goal: a full disk refuses work in words, goes on reading and recovers.  Method: the state folder on a tmpfs of 8 MiB.
void SmallDisk(const Settings& settings, Checks& checks) {
  const fs::path disk = settings.folder / "disk";
  RF_CHECK(CreateFolders(disk).ok() && CreateFolders(settings.folder / "filling").ok());
  for (const fs::path& folder : {disk, settings.folder / "filling"}) {
    if (mount("tmpfs", folder.c_str(), "tmpfs", 0, "size=8m") == 0) continue;
    return checks.Skip("a disk of 8 MiB", Join("mounting a tmpfs is not permitted (", std::strerror(errno), ")"));
  }
  struct Unmount {
    fs::path path;
    ~Unmount() { umount2(path.c_str(), MNT_DETACH); }
  } const unmount{disk}, unmount_filling{settings.folder / "filling"};
  DiskFillsUnderLoad(settings.folder / "filling", checks);
  Coordinator coordinator({.state = disk / "state", .own_disk = true});
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
