// worker/task/quantize/quantize_journal.h
//
// What a quantization has finished, on disk, module by module: a run that was killed goes on at the first module that is missing,
// and no code waits in memory for the end.
//
//   journal.json             {"format": "refinery.quantize_journal", "version": 1, "fingerprint": {...}}
//   <module>.safetensors     qweight int32 [in*bits/32, out] as GPTQ v1 packs codes, scales float16 [out, groups], and where the
//                            module has them zeros uint8 [out, groups] and group_index int32 [in]; its metadata holds "bits",
//                            "group_size", "report" (JSON), "fingerprint" (digest) and "content" (digest of the tensors' bytes)
//
// Every file appears complete or not at all (written beside, flushed, renamed). The fingerprint says what the codes depend on: a
// journal with another one is never used. A file whose content does not have its digest counts as missing.
//
// Errors: RESOURCE_EXHAUSTED, UNAVAILABLE for what the disk does.  Threads: one caller.

#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/quantize/gptq.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {

struct ModuleShape {
  int64_t out = 0, in = 0, bits = 0, group_size = 0;
};

struct JournalEntry {
  QuantizedLinear linear;
  GptqReport report;
};

nlohmann::json ReportToJson(const GptqReport& report);
// Throws nlohmann::json::exception for a missing or wrongly typed field.
GptqReport ReportFromJson(const nlohmann::json& json);

class Journal {
 public:
  // Opens the journal in `folder` for a run with that fingerprint. What an earlier run left there stays when its fingerprint is the
  // same; else it is removed, with the note "journal_ignored" that names the first field that differs.
  static StatusOr<Journal> Open(const std::filesystem::path& folder, const nlohmann::json& fingerprint, runtime::Reporter& reporter);
  // Takes over the modules of a published checkpoint. One of another run is left alone, with the same note.
  Status Adopt(const std::filesystem::path& checkpoint, runtime::Reporter& reporter);

  // Names of the modules whose files are there. Their content is checked in Read.
  const std::set<std::string>& modules() const { return modules_; }
  // nullopt where the module is missing, or damaged: then with the note "journal_damaged".
  StatusOr<std::optional<JournalEntry>> Read(const std::string& module, runtime::Reporter& reporter);
  // From the file's header alone. DATA_LOSS where the module is missing or unreadable.
  StatusOr<ModuleShape> Shape(const std::string& module) const;
  Status Write(const std::string& module, const QuantizedLinear& linear, const GptqReport& report);
  // Small facts beside the modules (an allotment of bits); "" where there is none.
  Status WriteFact(const std::string& name, const nlohmann::json& fact);
  nlohmann::json ReadFact(const std::string& name) const;

  // Makes <parent of the journal>/<name> a copy of everything finished so far, by links: the form in which a checkpoint is handed
  // to the agent, which removes it after its upload.
  Status Publish(const std::string& name) const;

  const std::filesystem::path& folder() const { return folder_; }

 private:
  std::filesystem::path FileOf(const std::string& module) const { return folder_ / (module + ".safetensors"); }

  std::filesystem::path folder_;
  nlohmann::json fingerprint_;
  std::string fingerprint_digest_;
  std::set<std::string> modules_;
};

}  // namespace refinery::quantize
