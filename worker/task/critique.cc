#include "worker/task/runtime/torch.h"

#include "worker/task/data/critique.h"
#include "worker/task/eval/scorer.h"
#include "worker/task/models.h"
#include "worker/task/runtime/device.h"
#include "worker/task/seeds.h"
#include "worker/task/tasks.h"

namespace refinery::task {

Status Critique(const CritiqueSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(ResolvedModel resolved, ResolveInput(context, "teacher"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(resolved.folder->path()));
  model::LoadOptions options{.dtype = runtime::ComputeType(), .device = runtime::DefaultDevice()};
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> judge, model::CausalLm::Load(*resolved.folder, options));
  RF_ASSIGN_OR_RETURN(std::vector<data::Example> examples, data::ReadExamples(context.inputs / "raw" / "raw.jsonl"));
  RF_ASSIGN_OR_RETURN(std::vector<data::MultipleChoiceItem> items, ReadSeeds(context, spec.task, spec.seed_limit));
  std::vector<data::Example> seeds;
  for (const data::MultipleChoiceItem& item : items) seeds.push_back(data::ExampleFromItem(item));

  RF_ASSIGN_OR_RETURN(data::TaskFormat format, data::FormatOf(spec.task));
  eval::Scorer scorer(judge, tokenizer, context.events);
  data::CritiqueSettings settings{.keep_fraction = spec.keep_fraction, .seed = context.seed};
  RF_RETURN_IF_ERROR(data::Critique(format, seeds, settings, scorer.AsScoreFn(), &examples));
  return data::WriteExamples(context.outputs / "scored.jsonl", examples);
}

}  // namespace refinery::task
