#include "worker/task/checkpoint/import.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <optional>
#include <vector>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/gguf.h"
#include "worker/task/checkpoint/gguf_model.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/families/family.h"

namespace refinery::checkpoint {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// Part of the name of a converted folder: a change of what the importer writes makes folders of its own.
constexpr char kImporterVersion[] = "v1";
constexpr char kFactsFile[] = "import.json";
constexpr uint64_t kMaxFactsBytes = 1 << 20;
constexpr int64_t kSettledSeconds = 3;
constexpr size_t kDigestPrefix = sizeof("sha256:") - 1;

fs::path PathOf(const std::string& uri) {
  constexpr std::string_view kScheme = "file://";
  return uri.rfind(kScheme, 0) == 0 ? fs::path(uri.substr(kScheme.size())) : fs::path(uri);
}

std::string TimeText(const struct timespec& time) {
  return Join(static_cast<int64_t>(time.tv_sec), ".", static_cast<int64_t>(time.tv_nsec));
}

// The digest of a large file, remembered in the cache together with the file's size, inode and times of change:
// models are named again by every task of a job.
StatusOr<std::string> RememberedDigest(const fs::path& path, const fs::path& cache) {
  std::error_code error;
  fs::path absolute = fs::absolute(path, error);
  struct stat facts {};
  if (error || ::stat(absolute.c_str(), &facts) != 0) return NotFound("no such file: ", path.string());
  std::string state = Join(static_cast<uint64_t>(facts.st_size), " ", static_cast<uint64_t>(facts.st_ino), " ",
                           TimeText(facts.st_mtim), " ", TimeText(facts.st_ctim));
  fs::path note = cache / "digests" / DigestOf(absolute.string()).substr(kDigestPrefix);
  StatusOr<std::string> known = ReadFile(note, kMaxFactsBytes);
  if (known.ok() && known->size() > state.size() && known->compare(0, state.size(), state) == 0) {
    std::string digest = known->substr(state.size() + 1);
    if (IsDigest(digest)) return digest;
  }
  struct timespec now {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(absolute));
  // A file that changed a moment ago may change again within the same tick of the file system's clock.
  if (now.tv_sec - facts.st_ctim.tv_sec < kSettledSeconds) return digest;
  // Only a saving of time: a cache that cannot be written costs a hash per task, no more.
  WriteFileAtomically(note, Join(state, " ", digest)).IgnoreError();
  return digest;
}

// The files that make up the internal form, relative to the folder.
std::vector<std::string> CanonicalFiles(const ModelFolder& model) {
  std::vector<std::string> names = model.WeightFiles();
  std::error_code error;
  for (const char* name : {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                           "chat_template.jinja"})
    if (fs::is_regular_file(model.path() / name, error)) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

// Everything about a Hugging Face folder but uri and source_digest. Without a cache every file is hashed.
StatusOr<ModelRef> DescribeFolder(const fs::path& folder, const std::optional<fs::path>& cache) {
  RF_ASSIGN_OR_RETURN(std::shared_ptr<ModelFolder> model, ModelFolder::Open(folder));
  std::string config_file = (folder / "config.json").string();
  ModelRef ref;
  json architectures = model->config().value("architectures", json());
  if (!architectures.is_array() || architectures.empty() || !architectures[0].is_string())
    return InvalidArgument(config_file, ": architectures is missing");
  ref.architecture = architectures[0].get<std::string>();
  if (families::FindArchitecture(ref.architecture) == nullptr)
    return InvalidArgument(config_file, ": the architecture ", ref.architecture, " is not supported (known: ",
                           families::KnownArchitectures(), ")");
  json vocab_size = model->config().value("vocab_size", json());
  if (!vocab_size.is_number_unsigned()) return InvalidArgument(config_file, ": vocab_size is missing");
  ref.vocab_size = vocab_size.get<uint64_t>();
  ref.parameters = model->ParameterCount();

  std::vector<FileEntry> entries;
  for (const std::string& name : CanonicalFiles(*model)) {
    FileEntry entry{.path = name};
    RF_ASSIGN_OR_RETURN(entry.digest, cache ? RememberedDigest(folder / name, *cache) : DigestOfFile(folder / name));
    std::error_code error;
    entry.size = fs::file_size(folder / name, error);
    if (error) return NotFound("no such file: ", (folder / name).string());
    if (name == "tokenizer.json") ref.tokenizer_digest = entry.digest;
    entries.push_back(std::move(entry));
  }
  if (ref.tokenizer_digest.empty())
    return NotFound(folder.string(), " holds no tokenizer.json; save the model with its fast tokenizer");
  ref.digest = DigestOf(ManifestText(entries));
  return ref;
}

fs::path ConvertedFolder(const std::string& source_digest, const fs::path& cache) {
  return cache / "models" / Join(source_digest.substr(kDigestPrefix), "-", kImporterVersion);
}

// The facts of a converted folder; NOT_FOUND when it is not there.
StatusOr<ModelRef> ReadConverted(const fs::path& folder) {
  RF_ASSIGN_OR_RETURN(std::string text, ReadFile(folder / kFactsFile, kMaxFactsBytes));
  StatusOr<ModelRef> ref = ModelRefFromJson(json::parse(text, nullptr, /*allow_exceptions=*/false));
  if (!ref.ok()) return Annotate(ref.status(), (folder / kFactsFile).string());
  return ref;
}

// An exclusive lock on a file, held until the object dies; other processes wait.
class FileLock {
 public:
  explicit FileLock(const fs::path& path) : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    while (fd_ >= 0 && ::flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~FileLock() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_;
};

// Removes the folder unless it was renamed away.
struct TemporaryFolder {
  fs::path path;
  ~TemporaryFolder() {
    std::error_code error;
    fs::remove_all(path, error);
  }
};

// What a killed import left behind. The lock is held, so nobody else writes there.
void RemoveLeftovers(const fs::path& parent, const std::string& prefix) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(parent, error))
    if (entry.path().filename().string().rfind(prefix, 0) == 0) fs::remove_all(entry.path(), error);
}

StatusOr<ModelRef> Convert(const GgufFile& file, const std::string& source_digest, const fs::path& target) {
  RF_RETURN_IF_ERROR(CreateFolders(target.parent_path()));
  FileLock lock(target.parent_path() / Join(".", target.filename().string(), ".lock"));
  StatusOr<ModelRef> ready = ReadConverted(target);
  if (ready.ok()) return ready;  // another process was first
  std::string prefix = Join(".", target.filename().string(), ".partial-");
  RemoveLeftovers(target.parent_path(), prefix);
  static std::atomic<int> counter{0};
  TemporaryFolder temporary{target.parent_path() / Join(prefix, ::getpid(), "-", ++counter)};
  RF_RETURN_IF_ERROR(CreateFolders(temporary.path));
  RF_RETURN_IF_ERROR(WriteGgufModelFolder(file, temporary.path));
  RF_ASSIGN_OR_RETURN(ModelRef ref, DescribeFolder(temporary.path, std::nullopt));
  std::error_code error;
  ref.source_digest = source_digest;
  RF_RETURN_IF_ERROR(WriteFileAtomically(temporary.path / kFactsFile, ToJson(ref).dump(2) + "\n"));
  fs::remove_all(target, error);  // an unreadable folder of that name, see ReadConverted above
  fs::rename(temporary.path, target, error);
  if (error) return Unavailable("cannot create ", target.string(), ": ", error.message());
  RF_RETURN_IF_ERROR(SyncPath(target.parent_path()));
  return ref;
}

}  // namespace

StatusOr<ModelRef> ImportModel(const std::string& uri, const fs::path& cache) {
  fs::path path = PathOf(uri);
  std::error_code error;
  ModelRef ref;
  if (fs::is_directory(path, error)) {
    RF_ASSIGN_OR_RETURN(ref, DescribeFolder(path, cache));
    ref.source_digest = ref.digest;
  } else if (fs::is_regular_file(path, error)) {
    RF_ASSIGN_OR_RETURN(std::shared_ptr<const GgufFile> file, GgufFile::Open(path));
    RF_ASSIGN_OR_RETURN(std::string source_digest, RememberedDigest(path, cache));
    fs::path target = ConvertedFolder(source_digest, cache);
    StatusOr<ModelRef> ready = ReadConverted(target);
    if (!ready.ok()) ready = Convert(*file, source_digest, target);
    RF_ASSIGN_OR_RETURN(ref, std::move(ready));
  } else {
    return NotFound("no such model: ", path.string(), " (a GGUF file or a Hugging Face folder is expected)");
  }
  ref.uri = uri;
  return ref;
}

StatusOr<fs::path> ResolveModel(const ModelRef& ref, const fs::path& cache) {
  if (ref.source_digest != ref.digest && IsDigest(ref.source_digest)) {
    fs::path folder = ConvertedFolder(ref.source_digest, cache);
    StatusOr<ModelRef> ready = ReadConverted(folder);
    if (ready.ok() && ready->digest == ref.digest) return folder;
  }
  RF_ASSIGN_OR_RETURN(ModelRef again, ImportModel(ref.uri, cache));
  if (again.digest != ref.digest || again.source_digest != ref.source_digest)
    return FailedPrecondition("the model ", ref.uri, " is not the one that the job was planned with (digest ",
                              again.digest, ", expected ", ref.digest, "); restore it or submit the job again");
  return again.source_digest == again.digest ? PathOf(ref.uri) : ConvertedFolder(again.source_digest, cache);
}

json ToJson(const ModelRef& ref) {
  return {{"uri", ref.uri},
          {"source_digest", ref.source_digest},
          {"digest", ref.digest},
          {"tokenizer_digest", ref.tokenizer_digest},
          {"architecture", ref.architecture},
          {"parameters", ref.parameters},
          {"vocab_size", ref.vocab_size}};
}

StatusOr<ModelRef> ModelRefFromJson(const json& value) {
  if (!value.is_object()) return InvalidArgument("a model reference must be a JSON object");
  ModelRef ref;
  for (auto [key, text] : {std::pair{"uri", &ref.uri}, std::pair{"source_digest", &ref.source_digest},
                           std::pair{"digest", &ref.digest}, std::pair{"tokenizer_digest", &ref.tokenizer_digest},
                           std::pair{"architecture", &ref.architecture}}) {
    auto found = value.find(key);
    if (found == value.end() || !found->is_string()) return InvalidArgument("model reference: ", key, " is not text");
    *text = found->get<std::string>();
  }
  for (auto [key, number] : {std::pair{"parameters", &ref.parameters}, std::pair{"vocab_size", &ref.vocab_size}}) {
    auto found = value.find(key);
    if (found == value.end() || !found->is_number_unsigned())
      return InvalidArgument("model reference: ", key, " is not a whole number");
    *number = found->get<uint64_t>();
  }
  for (const std::string& digest : {ref.source_digest, ref.digest, ref.tokenizer_digest})
    if (!IsDigest(digest)) return InvalidArgument("model reference: \"", digest, "\" is not a digest");
  return ref;
}

}  // namespace refinery::checkpoint
