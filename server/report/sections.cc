#include "server/report/sections.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "common/status.h"
#include "server/report/numbers.h"
#include "server/report/variants.h"

namespace refinery::report {
namespace {

constexpr char kNone[] = "–";
constexpr int kMaxTaskRows = 1000;

std::string Short(double value) { return absl::StrFormat("%.4g", value); }

std::string StateText(const v1::Trial& trial) {
  switch (trial.state()) {
    case v1::Trial::SUCCEEDED: return "succeeded";
    case v1::Trial::INFEASIBLE: return "diverged";
    case v1::Trial::STOPPED_EARLY: return "stopped early";
    default: return "not finished";
  }
}

std::string OriginText(const v1::Trial& trial) {
  if (trial.origin() == "sobol") return "Sobol";
  if (trial.origin() == "expected_improvement") return "model";
  return trial.origin();
}

int FinishedSeeds(const v1::Trial& trial) {
  return static_cast<int>(std::count_if(trial.replicates().begin(), trial.replicates().end(),
                                        [](const v1::Replicate& r) { return r.finished() && !r.infeasible(); }));
}

void AddCounts(const nlohmann::json& json, const std::string& prefix, Table* table) {
  for (const auto& [key, value] : json.items()) {
    const std::string name = prefix.empty() ? key : Join(prefix, ".", key);
    if (value.is_object()) {
      AddCounts(value, name, table);
    } else {
      table->rows.push_back({name, value.is_string() ? value.get<std::string>() : value.dump()});
    }
  }
}

}  // namespace

std::string KindName(v1::TaskKind kind) {
  const std::string name = v1::TaskKind_Name(kind);
  return absl::AsciiStrToLower(absl::string_view(name.data(), name.size()));
}

Table TrialRows(const v1::Job& job) {
  Table table{.header = {"trial", "from", "optimizer", "learning rate", "temperature", "KL weight", "rank",
                         "validation loss", "seeds", "state"},
              .right = {true, false, false, true, true, true, true, true, true, false}};
  const std::optional<uint32_t> best = BestTrial(job);
  for (const v1::Trial& trial : job.trials()) {
    const v1::TrialSettings& s = trial.settings();
    const bool has_value = trial.state() == v1::Trial::SUCCEEDED || trial.state() == v1::Trial::STOPPED_EARLY;
    if (best == trial.index()) table.strong_row = static_cast<int>(table.rows.size());
    table.rows.push_back({Join(trial.index()), OriginText(trial), s.optimizer(), Short(s.learning_rate()),
                          Short(s.temperature()), Short(s.kl_weight()), Join(s.lora_rank()),
                          has_value ? WithError(trial.mean(), trial.standard_error()) : kNone,
                          Join(FinishedSeeds(trial), " of ", trial.replicates_size()), StateText(trial)});
  }
  return table;
}

Table DataRows(const std::string& summary) {
  Table table{.header = {"examples", "count"}, .right = {false, true}};
  const nlohmann::json json = nlohmann::json::parse(summary, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return table;
  // Known totals first, in the order of the work; everything else is a reason for a drop.
  static constexpr std::pair<const char*, const char*> kTotals[] = {{"raw", "written by the teacher"},
                                                                    {"kept", "kept"},
                                                                    {"train", "in the train split"},
                                                                    {"validation", "in the validation split"},
                                                                    {"held_out", "held out for evaluation"}};
  nlohmann::json rest = json;
  for (const auto& [key, words] : kTotals) {
    if (!json.contains(key)) continue;
    table.rows.push_back({words, json[key].dump()});
    rest.erase(key);
  }
  Table drops;
  AddCounts(rest, "", &drops);
  for (auto& row : drops.rows) table.rows.push_back({"dropped or set aside: " + row[0], row[1]});
  return table;
}

Table NoteRows(const std::vector<v1::Event>& notes) {
  Table table{.header = {"task", "code", "what happened", "times"}, .right = {false, false, false, true}};
  std::vector<std::pair<std::vector<std::string>, int>> rows;
  for (const v1::Event& event : notes) {
    if (!event.has_task_note()) continue;
    std::vector<std::string> row = {event.task_note().path(), event.task_note().note().code(),
                                    event.task_note().note().text()};
    auto it = std::find_if(rows.begin(), rows.end(), [&](const auto& other) { return other.first == row; });
    if (it == rows.end()) {
      rows.emplace_back(std::move(row), 1);
    } else {
      ++it->second;
    }
  }
  for (auto& [row, times] : rows) {
    row.push_back(Join(times));
    table.rows.push_back(std::move(row));
  }
  return table;
}

Table FailureRows(const v1::Job& job) {
  Table table{.header = {"task", "class", "reason"}};
  for (const v1::Task& task : job.tasks()) {
    if (task.state() != v1::Task::DEAD) continue;
    table.rows.push_back({task.path(), v1::FailureClass_Name(task.error().failure_class()), task.error().message()});
  }
  return table;
}

Table QuantizationRows(const v1::Job& job) {
  Table table{.header = {"task", "weights", "held-out tokens", "perplexity", "over the source's", "KL to the source"},
              .right = {false, false, true, true, true, true}};
  constexpr std::pair<const char*, const char*> kWeights[] = {{"rounded", "plainly rounded"}, {"quantized", "GPTQ"}, {"recovered", "recovered"}};
  for (const v1::Task& task : job.tasks()) {
    if (task.kind() != v1::QUANTIZE && task.kind() != v1::RECOVER) continue;
    std::map<std::string, const v1::Measurement*> found;
    for (const v1::Measurement& measurement : task.measurements()) found[measurement.name()] = &measurement;
    for (const auto& [prefix, name] : kWeights) {
      const std::string perplexity = Join(prefix, "_perplexity"), kl = Join(prefix, "_kl");
      if (!found.contains("source_perplexity") || !found.contains(perplexity) || !found.contains(kl)) continue;
      const double value = found[perplexity]->value();
      table.rows.push_back({task.path(), name, Join(found[kl]->count()), Digits(value, 4), Digits(value / found["source_perplexity"]->value(), 4),
                            Digits(found[kl]->value(), 4)});
    }
  }
  return table;
}

Table ExportRows(const v1::Job& job) {
  Table table{.header = {"format", "model", "without embeddings", "linear layers / bfloat16"}, .right = {false, true, true, true}};
  for (const v1::Task& task : job.tasks()) {
    if (task.kind() != v1::EXPORT) continue;
    std::map<std::string, std::map<std::string, double>> formats;  // by format and what
    for (const v1::Measurement& measurement : task.measurements()) {
      const size_t slash = measurement.name().find('/');
      if (slash != std::string::npos) formats[measurement.name().substr(0, slash)][measurement.name().substr(slash + 1)] = measurement.value();
    }
    for (auto& [format, bytes] : formats)
      table.rows.push_back({format, Megabytes(bytes["model_bytes"]), Megabytes(bytes["model_bytes_without_embeddings"]),
                            Digits(bytes["linear_bytes_to_bf16"], 4)});
  }
  return table;
}

Table KindTimeRows(const v1::Job& job) {
  struct Total {
    int done = 0;
    int reused = 0;
    double seconds = 0;
    uint64_t peak = 0;
  };
  std::map<v1::TaskKind, Total> totals;
  for (const v1::Task& task : job.tasks()) {
    Total& total = totals[task.kind()];
    total.done += task.state() == v1::Task::DONE;
    total.reused += task.state() == v1::Task::CACHED;
    total.seconds += task.seconds();
    total.peak = std::max(total.peak, static_cast<uint64_t>(task.peak_memory_bytes()));
  }
  Table table{.header = {"kind", "run", "reused", "time", "peak memory of a process"},
              .right = {false, true, true, true, true}};
  for (const auto& [kind, total] : totals)
    table.rows.push_back({KindName(kind), Join(total.done), Join(total.reused), Seconds(total.seconds),
                          total.peak == 0 ? kNone : Megabytes(static_cast<double>(total.peak))});
  return table;
}

Table TaskTimeRows(const v1::Job& job) {
  Table table{.header = {"task", "state", "attempts", "time", "peak memory", "worker"},
              .right = {false, false, true, true, true, false}};
  for (const v1::Task& task : job.tasks()) {
    if (table.rows.size() == kMaxTaskRows) {
      table.rows.push_back({Join("and ", job.tasks_size() - kMaxTaskRows, " more"), "", "", "", "", ""});
      break;
    }
    const std::string state = v1::Task::State_Name(task.state());
    table.rows.push_back(
        {task.path(), absl::AsciiStrToLower(absl::string_view(state.data(), state.size())), Join(task.attempt()),
         Seconds(task.seconds()),
         task.peak_memory_bytes() == 0 ? kNone : Megabytes(static_cast<double>(task.peak_memory_bytes())),
         task.worker()});
  }
  return table;
}

}  // namespace refinery::report
