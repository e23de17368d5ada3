#include "worker/task/eval_command.h"

#include "worker/task/runtime/torch.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <iostream>

#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/eval/figures.h"
#include "worker/task/eval/harness.h"
#include "worker/task/eval/scorer.h"
#include "worker/task/eval/task_set.h"
#include "worker/task/runtime/device.h"
#include "worker/task/start.h"

namespace refinery::task {
namespace {

using Clock = std::chrono::steady_clock;

// One line on a terminal, overwritten; a line every ten seconds elsewhere.
class ProgressLine final : public runtime::Reporter {
 public:
  void Report(const runtime::Progress& progress) override {
    const bool last = progress.total > 0 && progress.done >= progress.total;
    const auto pause = std::chrono::milliseconds(terminal_ ? 200 : 10'000);
    if (!last && Clock::now() - shown_ < pause) return;
    shown_ = Clock::now();
    std::fprintf(stderr, "%s%s: %.0f of %.0f requests, %.0f tokens/s%s", terminal_ ? "\r" : "", progress.phase.c_str(),
                 progress.done, progress.total, progress.tokens_per_second, terminal_ && !last ? "   " : "\n");
  }
  void Note(const std::string& code, const std::string& text) override {
    std::fprintf(stderr, "note %s: %s\n", code.c_str(), text.c_str());
  }
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {}

 private:
  const bool terminal_ = ::isatty(STDERR_FILENO) != 0;
  Clock::time_point shown_{};
};

struct LoadedModel {
  std::shared_ptr<model::CausalLm> lm;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;
};

StatusOr<LoadedModel> LoadModel(const EvalOptions& options, const std::string& uri, const std::vector<std::string>& adapters) {
  const std::string cache = CacheFolder(options.cache);
  RF_ASSIGN_OR_RETURN(const checkpoint::ModelRef ref, checkpoint::ImportModel(uri, cache));
  RF_ASSIGN_OR_RETURN(const std::filesystem::path path, checkpoint::ResolveModel(ref, cache));
  RF_ASSIGN_OR_RETURN(const auto folder, checkpoint::ModelFolder::Open(path));
  const at::ScalarType dtype = options.dtype == "float32" ? at::kFloat : at::kBFloat16;
  LoadedModel loaded;
  RF_ASSIGN_OR_RETURN(loaded.lm, model::CausalLm::Load(*folder, {.dtype = dtype, .device = runtime::DefaultDevice()}));
  for (const std::string& adapter : adapters) {
    RF_ASSIGN_OR_RETURN(const checkpoint::PeftAdapter lora, checkpoint::LoadPeftAdapter(adapter));
    RF_RETURN_IF_ERROR(loaded.lm->MergeAdapter(lora));
  }
  RF_ASSIGN_OR_RETURN(loaded.tokenizer, tokenizer::Tokenizer::Load(path));
  return loaded;
}

// All that one model's evaluation yields.
struct Scores {
  std::vector<eval::Figure> figures;
  std::vector<eval::ScoredItems> items;
};

class Evaluation {
 public:
  Evaluation(const EvalOptions& options, eval::Harness harness) : options_(options), harness_(std::move(harness)) {}

  // The items of every task, before a model is loaded: what is missing shows at once.
  Status LoadTasks() {
    const eval::TaskSource source{.data = options_.data, .shots = static_cast<size_t>(options_.shots),
                                  .limit = static_cast<size_t>(options_.limit), .split = options_.split, .pool = options_.pool};
    for (const std::string& name : options_.tasks) {
      RF_ASSIGN_OR_RETURN(eval::TaskItems task, eval::LoadTaskItems(name, source));
      tasks_.push_back(std::move(task));
    }
    return absl::OkStatus();
  }

  StatusOr<Scores> Run(const LoadedModel& model, const std::string& items_folder) {
    eval::Scorer scorer(model.lm, model.tokenizer, progress_,
                        {.max_length = options_.max_length, .special_tokens = harness_.special_tokens});
    Scores scores;
    for (const eval::TaskItems& task : tasks_) {
      RF_RETURN_IF_ERROR(task.pages.empty() ? RunChoices(task, model, scorer, items_folder, &scores)
                                            : RunText(task, model, scorer, items_folder, &scores));
    }
    return scores;
  }

 private:
  Status RunChoices(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                    Scores* scores) {
    int64_t requests = 0;
    for (const data::MultipleChoiceItem& item : task.items) requests += static_cast<int64_t>(item.continuations.size());
    scorer.Expect(task.name, requests);
    eval::MultipleChoiceOptions choices{.acc_norm = task.acc_norm};
    choices.prompt.system = options_.system;
    choices.prompt.multi_turn = !options_.single_turn;
    if (options_.chat_template) choices.prompt.chat_template = model.tokenizer.get();
    RF_ASSIGN_OR_RETURN(const eval::MultipleChoiceResult result,
                        eval::EvaluateMultipleChoice(task.items, scorer.AsScoreFn(), choices));
    for (eval::Figure& figure : eval::FiguresOf(task.name, result)) scores->figures.push_back(std::move(figure));
    for (eval::ScoredItems& items : eval::ScoresOf(task.name, result)) scores->items.push_back(std::move(items));
    if (folder.empty()) return absl::OkStatus();
    std::string lines;
    for (const eval::ItemResult& item : result.items) lines += eval::ToJson(item).dump() + "\n";
    return WriteFileAtomically(std::filesystem::path(folder) / (task.name + ".jsonl"), lines);
  }

  Status RunText(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                 Scores* scores) {
    scorer.Expect(task.name, 0);
    const int64_t window = scorer.options().max_length;
    RF_ASSIGN_OR_RETURN(const eval::TextResult result,
                        eval::EvaluateText(task.pages, *model.tokenizer,
                                           {.window = window, .special_tokens = harness_.special_tokens}, window, scorer));
    for (eval::Figure& figure : eval::FiguresOf(task.name, result)) scores->figures.push_back(std::move(figure));
    if (folder.empty()) return absl::OkStatus();
    std::string lines;
    for (size_t i = 0; i < result.per_page.size(); ++i) {
      const nlohmann::json page = {{"row", i}, {"log_likelihood", result.per_page[i]}, {"tokens", result.page_tokens[i]},
                                   {"words", result.page_words[i]}, {"bytes", result.page_bytes[i]}};
      lines += page.dump() + "\n";
    }
    return WriteFileAtomically(std::filesystem::path(folder) / (task.name + ".jsonl"), lines);
  }

  const EvalOptions& options_;
  const eval::Harness harness_;
  std::vector<eval::TaskItems> tasks_;
  ProgressLine progress_;
};

nlohmann::ordered_json Head(const EvalOptions& options, const std::string& model, const eval::Harness& harness) {
  return {{"model", model}, {"dtype", options.dtype}, {"shots", options.shots}, {"harness_version", harness.version},
          {"chat_template", options.chat_template}};
}

}  // namespace

Status RunEvalCommand(const EvalOptions& options) {
  const c10::InferenceMode inference;
  runtime::SetThreads(options.threads);
  if (options.tasks.empty()) return InvalidArgument("no tasks: name some with --tasks arc_easy,hellaswag");
  RF_ASSIGN_OR_RETURN(const eval::Harness harness, eval::HarnessOf(options.harness_version));
  Evaluation evaluation(options, harness);
  RF_RETURN_IF_ERROR(evaluation.LoadTasks());
  const bool compared = !options.compare.empty() || !options.compare_adapters.empty();
  const std::string second = options.compare.empty() ? options.model : options.compare;
  const auto folder = [&](const char* part) {
    return options.items.empty() || !compared ? options.items : (std::filesystem::path(options.items) / part).string();
  };
  Scores scores, other;
  {
    RF_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(options, options.model, options.adapters));
    RF_ASSIGN_OR_RETURN(scores, evaluation.Run(model, folder("A")));
  }
  nlohmann::ordered_json json = Head(options, options.model, harness);
  json["results"] = eval::ToJson(scores.figures);
  std::string text = eval::TableOf(scores.figures);
  if (compared) {
    RF_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(options, second, options.compare_adapters));
    RF_ASSIGN_OR_RETURN(other, evaluation.Run(model, folder("B")));
    RF_ASSIGN_OR_RETURN(const std::vector<eval::Comparison> comparisons, eval::Compare(scores.items, other.items));
    json["compared_with"] = Head(options, second, harness);
    json["compared_with"]["results"] = eval::ToJson(other.figures);
    json["comparison"] = eval::ToJson(comparisons);
    text = Join("A\n", text, "\nB\n", eval::TableOf(other.figures), "\n", eval::TableOf(comparisons, options.model, second));
  }
  std::cout << (options.output == "json" ? json.dump(2) + "\n" : text) << std::flush;
  return absl::OkStatus();
}

}  // namespace refinery::task
