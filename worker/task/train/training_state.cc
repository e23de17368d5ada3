#include "worker/task/runtime/torch.h"

#include "worker/task/train/training_state.h"

#include <unistd.h>

#include <cstdio>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::train {
namespace {

namespace fs = std::filesystem;

constexpr char kFormat[] = "refinery.training_state";
constexpr int64_t kVersion = 1;
constexpr char kStateFile[] = "state.json";
constexpr char kOptimizerFile[] = "optimizer.safetensors";
constexpr char kCurveFile[] = "curve.jsonl";

Status WriteFiles(const TrainingState& state, const fs::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  RF_RETURN_IF_ERROR(checkpoint::SavePeftAdapter(state.adapter, folder));
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(folder / kOptimizerFile, state.optimizer));
  RF_RETURN_IF_ERROR(WriteCurve(state.curve, folder / kCurveFile));
  RF_ASSIGN_OR_RETURN(const std::vector<FileEntry> files, ListFolder(folder));
  nlohmann::json digests = nlohmann::json::object();
  for (const FileEntry& file : files) digests[file.path] = file.digest;
  const nlohmann::json json = {{"format", kFormat},
                               {"version", kVersion},
                               {"step", state.step},
                               {"epoch", state.cursor.epoch},
                               {"position", state.cursor.position},
                               {"tokens", state.tokens},
                               {"fingerprint", state.fingerprint},
                               {"files", digests}};
  return WriteFileAtomically(folder / kStateFile, json.dump(1) + "\n");
}

StatusOr<nlohmann::json> ReadState(const fs::path& path) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return DataLoss(path.string(), ": not a JSON object");
  const auto is_count = [&json](const char* key) {
    return json.contains(key) && json[key].is_number_integer() && json[key].get<int64_t>() >= 0;
  };
  if (json.value("format", nlohmann::json()) != kFormat || !is_count("version") || json["version"] != kVersion) {
    return DataLoss(path.string(), ": not a '", kFormat, "' of version ", kVersion);
  }
  for (const char* key : {"step", "epoch", "position", "tokens"}) {
    if (!is_count(key)) return DataLoss(path.string(), ": '", key, "' is missing or not a number >= 0");
  }
  for (const char* key : {"fingerprint", "files"}) {
    if (!json.contains(key) || !json[key].is_object()) return DataLoss(path.string(), ": '", key, "' is missing");
  }
  return json;
}

// The files beside state.json are those that were written with it.
Status CheckFiles(const nlohmann::json& digests, const fs::path& folder) {
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors", kOptimizerFile, kCurveFile}) {
    if (!digests.contains(name)) return DataLoss((folder / kStateFile).string(), ": names no file '", name, "'");
    RF_ASSIGN_OR_RETURN(const std::string digest, DigestOfFile(folder / name));
    if (digests[name] != digest)
      return DataLoss((folder / name).string(), ": does not have its digest; the file is damaged");
  }
  return absl::OkStatus();
}

Status CheckFingerprint(const nlohmann::json& found, const nlohmann::json& wanted, const fs::path& folder) {
  for (const auto& [key, value] : wanted.items()) {
    const nlohmann::json other = found.value(key, nlohmann::json());
    if (other == value) continue;
    return FailedPrecondition(folder.string(), ": is the checkpoint of another run: '", key, "' is ", other.dump(),
                              " there, ", value.dump(), " here");
  }
  return absl::OkStatus();
}

}  // namespace

std::string CheckpointName(int64_t step) {
  char name[32];
  std::snprintf(name, sizeof(name), "step-%06lld", static_cast<long long>(step));
  return name;
}

Status SaveTrainingState(const TrainingState& state, const fs::path& folder) {
  const fs::path target = folder / CheckpointName(state.step);
  const fs::path temporary = folder / Join(".", CheckpointName(state.step), ".", static_cast<int64_t>(::getpid()));
  std::error_code error;
  fs::remove_all(temporary, error);
  Status written = WriteFiles(state, temporary);
  if (written.ok()) written = SyncPath(temporary);
  if (written.ok()) {
    fs::remove_all(target, error);
    fs::rename(temporary, target, error);
    if (error) written = Unavailable(target.string(), ": cannot rename the checkpoint here: ", error.message());
  }
  if (!written.ok()) {
    fs::remove_all(temporary, error);
    return written;
  }
  return SyncPath(folder);
}

StatusOr<TrainingState> LoadTrainingState(const fs::path& path, const nlohmann::json& fingerprint) {
  RF_ASSIGN_OR_RETURN(const nlohmann::json json, ReadState(path / kStateFile));
  RF_RETURN_IF_ERROR(CheckFiles(json["files"], path));
  RF_RETURN_IF_ERROR(CheckFingerprint(json["fingerprint"], fingerprint, path));
  TrainingState state{.step = json["step"].get<int64_t>(),
                      .cursor = {.epoch = json["epoch"].get<int64_t>(), .position = json["position"].get<int64_t>()},
                      .tokens = json["tokens"].get<uint64_t>(),
                      .fingerprint = fingerprint};
  RF_ASSIGN_OR_RETURN(state.adapter, checkpoint::LoadPeftAdapter(path));
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(path / kOptimizerFile));
  for (const auto& [name, info] : file->tensors()) {
    RF_ASSIGN_OR_RETURN(state.optimizer[name], file->Get(name));
  }
  RF_ASSIGN_OR_RETURN(state.curve, ReadCurve(path / kCurveFile));
  return state;
}

}  // namespace refinery::train
