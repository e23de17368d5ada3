#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/quantize_journal.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/numbers.h"
#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::quantize {
namespace {

namespace fs = std::filesystem;

constexpr char kFormat[] = "refinery.quantize_journal";
constexpr int kVersion = 1;
constexpr char kStateFile[] = "journal.json";
constexpr char kSuffix[] = ".safetensors";

// Names, types, shapes and bytes of all tensors.
std::string ContentDigest(const std::map<std::string, at::Tensor>& tensors) {
  Sha256 hash;
  for (const auto& [name, tensor] : tensors) {
    std::string head = name + ":" + std::string(c10::toString(tensor.scalar_type()));
    for (const int64_t size : tensor.sizes()) head += Join(",", size);
    hash.Update(head);
    const at::Tensor bytes = tensor.contiguous();
    hash.Update({static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()});
  }
  return hash.Finish();
}

nlohmann::json ReadState(const fs::path& folder) {
  const StatusOr<std::string> text = ReadFile(folder / kStateFile);
  if (!text.ok()) return {};
  const nlohmann::json state = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!state.is_object() || state.value("format", "") != kFormat || state.value("version", 0) != kVersion ||
      !state.contains("fingerprint")) {
    return {};
  }
  return state["fingerprint"];
}

// What is the matter with a journal of that fingerprint, or "".
std::string Foreign(const nlohmann::json& found, const nlohmann::json& wanted) {
  if (!found.is_object()) return "has no readable journal.json";
  for (const auto& [key, value] : wanted.items()) {
    const nlohmann::json other = found.value(key, nlohmann::json());
    if (other != value) return Join("is of another run: '", key, "' is ", other.dump(), " there, ", value.dump(), " here");
  }
  return found.size() == wanted.size() ? "" : "is of another version";
}

std::set<std::string> ModulesIn(const fs::path& folder) {
  std::set<std::string> modules;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (entry.path().extension() == kSuffix) modules.insert(entry.path().stem().string());
  }
  return modules;
}

// A second name for the file, or a copy where the file system has no links.
Status LinkOrCopy(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::create_hard_link(from, to, error);
  if (error) fs::copy_file(from, to, fs::copy_options::overwrite_existing, error);
  if (error) return Unavailable(to.string(), ": cannot copy ", from.string(), " here: ", error.message());
  return absl::OkStatus();
}

StatusOr<ModuleShape> ShapeOf(const checkpoint::SafetensorsFile& file) {
  const auto& facts = file.metadata();
  const auto number = [&facts](const char* key) {
    int64_t value = 0;
    const auto found = facts.find(key);
    return found != facts.end() && absl::SimpleAtoi(found->second, &value) ? value : 0;
  };
  ModuleShape shape{.bits = number("bits"), .group_size = number("group_size")};
  const auto qweight = file.tensors().find("qweight");
  if (qweight == file.tensors().end() || qweight->second.shape.size() != 2 || shape.bits <= 0 || shape.group_size <= 0) {
    return DataLoss("it is not a finished module");
  }
  shape.in = qweight->second.shape[0] * 32 / shape.bits;
  shape.out = qweight->second.shape[1];
  return shape;
}

StatusOr<JournalEntry> Parse(const fs::path& path, const std::string& fingerprint) try {
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(path));
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, info] : file->tensors()) {
    RF_ASSIGN_OR_RETURN(tensors[name], file->Get(name));
  }
  const auto& facts = file->metadata();
  if (facts.at("fingerprint") != fingerprint) return DataLoss("it belongs to another run");
  if (facts.at("content") != ContentDigest(tensors)) return DataLoss("its tensors do not have their digest");
  JournalEntry entry{.report = ReportFromJson(nlohmann::json::parse(facts.at("report")))};
  RF_ASSIGN_OR_RETURN(const ModuleShape shape, ShapeOf(*file));
  const int64_t groups = (shape.in + shape.group_size - 1) / shape.group_size;
  // The packer's own inverse, over plain zero points, on which qweight does not depend.
  PackedGptq packed = PackGptqV1({.codes = at::zeros({shape.out, shape.in}, at::kByte),
                                  .scales = at::ones({shape.out, groups}, at::kHalf), .bits = shape.bits, .group_size = shape.group_size});
  packed.qweight = tensors.at("qweight");
  entry.linear = UnpackGptqV1(packed, shape.bits, shape.group_size);
  entry.linear.zeros.reset();
  entry.linear.scales = tensors.at("scales").clone();
  if (tensors.contains("zeros")) entry.linear.zeros = tensors.at("zeros").clone();
  if (tensors.contains("group_index")) entry.linear.group_index = tensors.at("group_index").clone();
  return entry;
} catch (const std::exception& e) {  // a missing key, a number or JSON that does not parse, tensors of other shapes
  return DataLoss(e.what());
}

}  // namespace

nlohmann::json ReportToJson(const GptqReport& report) {
  return {{"relative_error", report.relative_error},
          {"rtn_relative_error", report.rtn_relative_error},
          {"damp_fraction", report.damp_fraction},
          {"dead_columns", report.dead_columns},
          {"notes", report.notes}};
}

GptqReport ReportFromJson(const nlohmann::json& json) {
  GptqReport report;
  json.at("relative_error").get_to(report.relative_error);
  json.at("rtn_relative_error").get_to(report.rtn_relative_error);
  json.at("damp_fraction").get_to(report.damp_fraction);
  json.at("dead_columns").get_to(report.dead_columns);
  json.at("notes").get_to(report.notes);
  return report;
}

StatusOr<Journal> Journal::Open(const fs::path& folder, const nlohmann::json& fingerprint, runtime::Reporter& reporter) {
  Journal journal;
  journal.folder_ = folder;
  journal.fingerprint_ = fingerprint;
  journal.fingerprint_digest_ = DigestOf(fingerprint.dump());
  std::error_code error;
  if (fs::exists(folder, error) && !fs::is_empty(folder, error)) {
    const std::string foreign = Foreign(ReadState(folder), fingerprint);
    if (foreign.empty()) {
      journal.modules_ = ModulesIn(folder);
      return journal;
    }
    reporter.Note("journal_ignored", Join(folder.string(), " ", foreign, "; every module is quantized anew"));
    fs::remove_all(folder, error);
  }
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  const nlohmann::json state = {{"format", kFormat}, {"version", kVersion}, {"fingerprint", fingerprint}};
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / kStateFile, state.dump(1) + "\n"));
  return journal;
}

Status Journal::Adopt(const fs::path& checkpoint, runtime::Reporter& reporter) {
  const std::string foreign = Foreign(ReadState(checkpoint), fingerprint_);
  if (!foreign.empty()) {
    reporter.Note("journal_ignored", Join(checkpoint.string(), " ", foreign, "; every module is quantized anew"));
    return absl::OkStatus();
  }
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(checkpoint, error)) {
    const fs::path target = folder_ / entry.path().filename();
    if (fs::exists(target, error)) continue;
    RF_RETURN_IF_ERROR(LinkOrCopy(entry.path(), target));
  }
  modules_ = ModulesIn(folder_);
  return absl::OkStatus();
}

StatusOr<std::optional<JournalEntry>> Journal::Read(const std::string& module, runtime::Reporter& reporter) {
  if (!modules_.contains(module)) return std::nullopt;
  StatusOr<JournalEntry> entry = Parse(FileOf(module), fingerprint_digest_);
  if (entry.ok()) return *std::move(entry);
  reporter.Note("journal_damaged", Join(FileOf(module).string(), ": ", Message(entry.status()), "; the module is quantized anew"));
  modules_.erase(module);
  std::error_code error;
  fs::remove(FileOf(module), error);
  return std::nullopt;
}

StatusOr<ModuleShape> Journal::Shape(const std::string& module) const {
  const StatusOr<std::shared_ptr<checkpoint::SafetensorsFile>> file = checkpoint::SafetensorsFile::Open(FileOf(module));
  if (!file.ok()) return file.status();
  StatusOr<ModuleShape> shape = ShapeOf(**file);
  return shape.ok() ? shape : Annotate(shape.status(), FileOf(module).string());
}

Status Journal::Write(const std::string& module, const QuantizedLinear& linear, const GptqReport& report) {
  std::map<std::string, at::Tensor> tensors;
  tensors["qweight"] =
      PackGptqV1({.codes = linear.codes, .scales = linear.scales, .bits = linear.bits, .group_size = linear.group_size}).qweight;
  tensors["scales"] = linear.scales;
  if (linear.zeros.defined()) tensors["zeros"] = linear.zeros;
  if (linear.group_index.defined()) tensors["group_index"] = linear.group_index;
  const std::map<std::string, std::string> facts = {{"bits", Join(linear.bits)},
                                                    {"group_size", Join(linear.group_size)},
                                                    {"report", ReportToJson(report).dump()},
                                                    {"fingerprint", fingerprint_digest_},
                                                    {"content", ContentDigest(tensors)}};
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(FileOf(module), tensors, facts));
  modules_.insert(module);
  return absl::OkStatus();
}

Status Journal::WriteFact(const std::string& name, const nlohmann::json& fact) {
  return WriteFileAtomically(folder_ / (name + ".json"), fact.dump(1) + "\n");
}

nlohmann::json Journal::ReadFact(const std::string& name) const {
  const StatusOr<std::string> text = ReadFile(folder_ / (name + ".json"));
  if (!text.ok()) return nullptr;
  nlohmann::json fact = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  return fact.is_discarded() ? nlohmann::json() : fact;
}

Status Journal::Publish(const std::string& name) const {
  const fs::path target = folder_.parent_path() / name;
  const fs::path temporary = folder_.parent_path() / Join(".", name);
  std::error_code error;
  fs::remove_all(temporary, error);
  RF_RETURN_IF_ERROR(CreateFolders(temporary));
  for (const auto& entry : fs::directory_iterator(folder_, error)) {
    if (!entry.path().filename().string().ends_with(".json") && entry.path().extension() != kSuffix) continue;
    RF_RETURN_IF_ERROR(LinkOrCopy(entry.path(), temporary / entry.path().filename()));
  }
  fs::remove_all(target, error);
  fs::rename(temporary, target, error);
  if (error) return Unavailable(target.string(), ": cannot rename the checkpoint here: ", error.message());
  return SyncPath(folder_.parent_path());
}

}  // namespace refinery::quantize
