#include "worker/task/runtime/torch.h"

#include <algorithm>

#include "worker/task/data/encoded.h"
#include "worker/task/distill/logit_cache.h"
#include "worker/task/models.h"
#include "worker/task/runtime/device.h"
#include "worker/task/seeds.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

constexpr int64_t kTokensPerForward = 2048;

// What the teacher sees before an example: the system prompt and a fixed choice of seeds, never the example itself.
std::string ContextText(const TeacherLogitsSpec& spec, const std::vector<data::MultipleChoiceItem>& seeds,
                        const data::Example& example) {
  std::string text = spec.system_prompt;
  if (!text.empty()) text += "\n\n";
  int64_t shown = 0;
  for (const data::MultipleChoiceItem& seed : seeds) {
    if (shown == spec.few_shot) break;
    if (data::ExampleFromItem(seed).instruction == example.instruction) continue;
    text += seed.Shot() + "\n\n";
    ++shown;
  }
  return text;
}

struct Item {
  data::EncodedExample student;
  data::EncodedExample teacher;
};

StatusOr<std::vector<Item>> EncodeItems(const TeacherLogitsSpec& spec, const TaskContext& context,
                                        const tokenizer::Tokenizer& tokenizer) {
  std::vector<data::MultipleChoiceItem> seeds;
  if (spec.few_shot > 0) {
    RF_ASSIGN_OR_RETURN(seeds, ReadSeeds(context, spec.task, spec.seed_limit));
  }
  std::vector<Item> items;
  for (const char* split : {"train.jsonl", "validation.jsonl", "held_out.jsonl"}) {
    RF_ASSIGN_OR_RETURN(std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / split));
    for (const data::Example& example : examples) {
      Item item;
      RF_ASSIGN_OR_RETURN(item.student, data::Encode(example, tokenizer, /*append_end=*/false));
      std::string text = ContextText(spec, seeds, example);
      std::vector<int32_t> prefix;
      if (!text.empty()) {
        RF_ASSIGN_OR_RETURN(prefix, tokenizer.Encode(text));
      }
      item.teacher = data::WithContext(item.student, prefix);
      items.push_back(std::move(item));
    }
  }
  // Long ones first: equal lengths share one attention call.
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.teacher.tokens.size() > b.teacher.tokens.size(); });
  return items;
}

// One forward pass over items [begin, end).
void AddRows(const model::CausalLm& teacher, const std::vector<Item>& items, size_t begin, size_t end,
             distill::LogitCacheWriter& writer) {
  std::vector<int64_t> ids, positions, lengths, rows;
  for (size_t i = begin; i < end; ++i) {
    const data::EncodedExample& example = items[i].teacher;
    auto offset = static_cast<int64_t>(ids.size());
    auto length = static_cast<int64_t>(example.tokens.size());
    for (int64_t t = example.answer_begin; t < length; ++t) positions.push_back(offset + t - 1);
    rows.push_back(length - example.answer_begin);
    ids.insert(ids.end(), example.tokens.begin(), example.tokens.end());
    lengths.push_back(length);
  }
  at::Device device = teacher.device();
  at::Tensor hidden = teacher.Hidden({.token_ids = at::tensor(ids, at::kLong).to(device), .lengths = lengths});
  at::Tensor logits = teacher.Logits(hidden.index_select(0, at::tensor(positions, at::kLong).to(device)));
  int64_t row = 0;
  for (size_t i = begin; i < end; ++i) {
    const data::EncodedExample& student = items[i].student;
    writer.Add(student.key, logits.narrow(0, row, rows[i - begin]).cpu());
    row += rows[i - begin];
  }
}

}  // namespace

Status TeacherLogits(const TeacherLogitsSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(ResolvedModel resolved, ResolveInput(context, "teacher"));
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_RETURN_IF_ERROR(CheckSameTokenizer(resolved, student));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(resolved.folder->path()));
  model::LoadOptions options{.dtype = runtime::ComputeType(), .device = runtime::DefaultDevice()};
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> teacher, model::CausalLm::Load(*resolved.folder, options));
  RF_ASSIGN_OR_RETURN(std::vector<Item> items, EncodeItems(spec, context, *tokenizer));

  int64_t vocabulary = teacher->config().vocab_size;
  distill::LogitCacheWriter writer({.teacher_digest = resolved.ref.digest,
                                    .tokenizer_digest = resolved.ref.tokenizer_digest,
                                    .vocab_size = vocabulary,
                                    .top_k = std::min(spec.top_k, vocabulary)});
  size_t begin = 0;
  while (begin < items.size()) {
    context.events.Check();
    size_t end = begin;
    int64_t tokens = 0;
    while (end < items.size() && (end == begin || tokens < kTokensPerForward))
      tokens += static_cast<int64_t>(items[end++].teacher.tokens.size());
    AddRows(*teacher, items, begin, end, writer);
    begin = end;
    context.events.Report({.phase = "teacher logits", .done = static_cast<double>(begin), .total = static_cast<double>(items.size())});
  }
  return writer.Write(context.outputs);
}

}  // namespace refinery::task
