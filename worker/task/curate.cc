#include "common/files.h"
#include "worker/task/data/filters.h"
#include "worker/task/seeds.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

StatusOr<std::vector<data::Example>> ReadShards(const TaskContext& context) {
  std::vector<data::Example> raw;
  for (int shard = 0; context.HasInput(Join("scored-", shard)); ++shard) {
    RF_ASSIGN_OR_RETURN(std::vector<data::Example> part, data::ReadExamples(context.inputs / Join("scored-", shard) / "scored.jsonl"));
    raw.insert(raw.end(), std::make_move_iterator(part.begin()), std::make_move_iterator(part.end()));
  }
  return raw;
}

// Items of every benchmark the job is evaluated on: they must not be trained on.
StatusOr<std::vector<data::MultipleChoiceItem>> ReadBenchmarks(const TaskContext& context) {
  std::vector<data::MultipleChoiceItem> items;
  for (const auto& entry : std::filesystem::directory_iterator(context.inputs)) {
    std::string name = entry.path().filename();
    if (!name.starts_with("benchmark-")) continue;
    RF_ASSIGN_OR_RETURN(std::filesystem::path file, context.InputJsonl(name));
    RF_ASSIGN_OR_RETURN(std::vector<data::MultipleChoiceItem> part, data::ReadItems(name.substr(std::string("benchmark-").size()), file));
    items.insert(items.end(), std::make_move_iterator(part.begin()), std::make_move_iterator(part.end()));
  }
  return items;
}

}  // namespace

Status Curate(const CurateSpec& spec, TaskContext& context) {
  context.events.Report({.phase = "curating", .total = 1});
  RF_ASSIGN_OR_RETURN(data::TaskFormat format, data::FormatOf(spec.task));
  RF_ASSIGN_OR_RETURN(std::vector<data::Example> raw, ReadShards(context));
  RF_ASSIGN_OR_RETURN(std::vector<data::MultipleChoiceItem> items, ReadSeeds(context, spec.task, spec.seed_limit));
  RF_ASSIGN_OR_RETURN(std::vector<data::MultipleChoiceItem> benchmarks, ReadBenchmarks(context));
  std::vector<data::Example> seeds;
  for (const data::MultipleChoiceItem& item : items) seeds.push_back(data::ExampleFromItem(item));

  data::CurateSettings settings{.validation_fraction = spec.validation_fraction,
                                .held_out_fraction = spec.held_out_fraction,
                                .duplicate_threshold = spec.duplicate_threshold,
                                .seed_examples = static_cast<size_t>(spec.seed_examples),
                                .seed = context.seed};
  RF_ASSIGN_OR_RETURN(data::Curated curated, data::Curate(format, raw, seeds, benchmarks, settings));
  RF_RETURN_IF_ERROR(data::WriteExamples(context.outputs / "train.jsonl", curated.train));
  RF_RETURN_IF_ERROR(data::WriteExamples(context.outputs / "validation.jsonl", curated.validation));
  RF_RETURN_IF_ERROR(data::WriteExamples(context.outputs / "held_out.jsonl", curated.held_out));
  RF_RETURN_IF_ERROR(data::WriteLedger(context.outputs / "ledger.jsonl", curated.ledger));
  nlohmann::json summary = curated.counts;
  RF_RETURN_IF_ERROR(WriteFileAtomically(context.outputs / "summary.json", summary.dump(2) + "\n"));
  for (const auto& [name, examples] : {std::pair<const char*, size_t>{"train_examples", curated.train.size()},
                                       {"validation_examples", curated.validation.size()},
                                       {"held_out_examples", curated.held_out.size()}})
    context.events.Measure({.name = name, .value = static_cast<double>(examples), .count = raw.size()});
  return absl::OkStatus();
}

}  // namespace refinery::task
