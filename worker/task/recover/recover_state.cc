#include "worker/task/runtime/torch.h"

#include "worker/task/recover/recover_state.h"

#include <unistd.h>

#include <cstdio>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/checkpoint/safetensors_writer.h"

namespace refinery::recover {
namespace {

namespace fs = std::filesystem;

constexpr char kFormat[] = "refinery.recover_state";
constexpr int64_t kVersion = 1;
constexpr char kStateFile[] = "state.json";
constexpr char kTensorFile[] = "values.safetensors";

Status WriteFiles(const RecoverState& state, const fs::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(folder / kTensorFile, state.tensors));
  RF_ASSIGN_OR_RETURN(const std::string digest, DigestOfFile(folder / kTensorFile));
  nlohmann::json curve = nlohmann::json::array();
  for (const RecoverPoint& point : state.curve) curve.push_back({{"step", point.step}, {"kl", point.kl}});
  const nlohmann::json json = {{"format", kFormat},
                               {"version", kVersion},
                               {"step", state.step},
                               {"epoch", state.cursor.epoch},
                               {"position", state.cursor.position},
                               {"tokens", state.tokens},
                               {"curve", curve},
                               {"best_step", state.best_step},
                               {"best_kl", state.best_kl},
                               {"fingerprint", state.fingerprint},
                               {"values", digest}};
  return WriteFileAtomically(folder / kStateFile, json.dump(1) + "\n");
}

// Throws nlohmann::json::exception for a missing or wrongly typed field.
void FromJson(const nlohmann::json& json, RecoverState* state) {
  json.at("step").get_to(state->step);
  json.at("epoch").get_to(state->cursor.epoch);
  json.at("position").get_to(state->cursor.position);
  json.at("tokens").get_to(state->tokens);
  json.at("best_step").get_to(state->best_step);
  json.at("best_kl").get_to(state->best_kl);
  for (const nlohmann::json& point : json.at("curve")) {
    state->curve.push_back({.step = point.at("step").get<int64_t>(), .kl = point.at("kl").get<double>()});
  }
}

Status ParseState(const fs::path& folder, const std::string& text, const nlohmann::json& fingerprint, RecoverState* state) try {
  const nlohmann::json json = nlohmann::json::parse(text);
  const fs::path path = folder / kStateFile;
  if (json.at("format").get<std::string>() != kFormat || json.at("version").get<int64_t>() != kVersion) {
    return DataLoss(path.string(), ": not a '", kFormat, "' of version ", kVersion);
  }
  FromJson(json, state);
  if (state->step < 0 || state->best_step < 0 || state->best_step > state->step || state->cursor.epoch < 0 ||
      state->cursor.position < 0 || state->curve.empty()) {
    return DataLoss(path.string(), ": step, best step, place in the data and measurements contradict each other");
  }
  for (const auto& [key, value] : fingerprint.items()) {
    const nlohmann::json other = json.at("fingerprint").value(key, nlohmann::json());
    if (other == value) continue;
    return FailedPrecondition(folder.string(), ": is the checkpoint of another run: '", key, "' is ", other.dump(), " there, ",
                              value.dump(), " here");
  }
  RF_ASSIGN_OR_RETURN(const std::string digest, DigestOfFile(folder / kTensorFile));
  if (json.at("values").get<std::string>() != digest) {
    return DataLoss((folder / kTensorFile).string(), ": does not have its digest; the file is damaged");
  }
  return absl::OkStatus();
} catch (const nlohmann::json::exception& e) {
  return DataLoss((folder / kStateFile).string(), ": ", e.what());
}

}  // namespace

std::string CheckpointName(int64_t step) {
  char name[32];
  std::snprintf(name, sizeof(name), "step-%06lld", static_cast<long long>(step));
  return name;
}

Status SaveRecoverState(const RecoverState& state, const fs::path& folder) {
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

StatusOr<RecoverState> LoadRecoverState(const fs::path& path, const nlohmann::json& fingerprint) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path / kStateFile));
  RecoverState state{.fingerprint = fingerprint};
  RF_RETURN_IF_ERROR(ParseState(path, text, fingerprint, &state));
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(path / kTensorFile));
  for (const auto& [name, info] : file->tensors()) {
    RF_ASSIGN_OR_RETURN(state.tensors[name], file->Get(name));
  }
  return state;
}

}  // namespace refinery::recover
