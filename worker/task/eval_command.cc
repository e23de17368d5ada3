#include "worker/task/eval_command.h"

#include "worker/task/runtime/torch.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <iostream>

#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/data/encoded.h"
#include "worker/task/eval/exact_match.h"
#include "worker/task/eval/figures.h"
#include "worker/task/eval/harness.h"
#include "worker/task/eval/scorer.h"
#include "worker/task/eval/task_set.h"
#include "worker/task/generate/engine.h"
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
  RF_ASSIGN_OR_RETURN(loaded.lm, model::CausalLm::Load(*folder, {.dtype = dtype, .device = runtime::DefaultDevice(), .keep_packed = adapters.empty()}));
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
  int64_t computed_tokens = 0, requested_tokens = 0;
  double seconds = 0;          // of the tasks, without loading the model

  void Add(std::vector<eval::Figure> more) {
    for (eval::Figure& figure : more) figures.push_back(std::move(figure));
  }
};

Status WriteLines(const std::string& folder, const std::string& task, const std::vector<nlohmann::json>& rows) {
  if (folder.empty()) return absl::OkStatus();
  std::string lines;
  for (const nlohmann::json& row : rows) lines += row.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  return WriteFileAtomically(std::filesystem::path(folder) / (task + ".jsonl"), lines);
}

// Greedy answers by the generation engine. A prompt that is too long loses its beginning, as in the harness.
StatusOr<std::vector<std::string>> Answers(const LoadedModel& model, const std::vector<std::string>& prompts,
                                           const eval::ExactMatchRules& rules, int64_t max_length, bool special_tokens,
                                           runtime::Reporter& reporter) {
  const int64_t room = max_length - rules.max_new_tokens;
  if (room < 1) return InvalidArgument("max_new_tokens ", rules.max_new_tokens, " leaves no room in ", max_length, " tokens");
  std::vector<generate::Request> requests;
  for (const std::string& prompt : prompts) {
    RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, data::EncodeText(prompt, *model.tokenizer, special_tokens));
    if (static_cast<int64_t>(ids.size()) > room) ids.erase(ids.begin(), ids.end() - room);
    requests.push_back({.prompt = std::move(ids), .max_new_tokens = rules.max_new_tokens, .sampling = {.temperature = 0},
                        .end_ids = model.tokenizer->end_ids(), .stop_strings = rules.stop});
  }
  generate::Engine engine(model.lm, {.tokenizer = model.tokenizer});
  RF_ASSIGN_OR_RETURN(const std::vector<generate::Completion> completions, engine.Generate(requests, reporter));
  std::vector<std::string> answers;
  for (const generate::Completion& completion : completions) answers.push_back(completion.text);
  return answers;
}

class Evaluation {
 public:
  Evaluation(const EvalOptions& options, eval::Harness harness) : options_(options), harness_(std::move(harness)) {}

  // The items of every task, before a model is loaded: what is missing shows at once.
  Status LoadTasks() {
    const Clock::time_point start = Clock::now();
    eval::TaskSource source{.data = options_.data, .limit = static_cast<size_t>(options_.limit), .split = options_.split,
                            .pool = options_.pool};
    if (options_.shots >= 0) source.shots = static_cast<size_t>(options_.shots);
    for (const std::string& name : options_.tasks) {
      RF_ASSIGN_OR_RETURN(eval::TaskItems task, eval::LoadTaskItems(name, source));
      tasks_.push_back(std::move(task));
    }
    loading_seconds_ = Since(start);
    return absl::OkStatus();
  }

  StatusOr<Scores> Run(const LoadedModel& model, const std::string& items_folder) {
    const Clock::time_point start = Clock::now();
    eval::Scorer scorer(model.lm, model.tokenizer, progress_,
                        {.max_length = options_.max_length, .special_tokens = harness_.special_tokens});
    Scores scores;
    for (const eval::TaskItems& task : tasks_) RF_RETURN_IF_ERROR(RunTask(task, model, scorer, items_folder, &scores));
    scores.computed_tokens = scorer.computed_tokens();
    scores.requested_tokens = scorer.requested_tokens();
    scores.seconds = loading_seconds_ + Since(start);
    return scores;
  }

 private:
  static double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

  eval::PromptOptions Prompt(const LoadedModel& model) const {
    return {.system = options_.system, .chat_template = options_.chat_template ? model.tokenizer.get() : nullptr,
            .multi_turn = !options_.single_turn};
  }

  Status RunTask(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                 Scores* scores) {
    int64_t requests = 0;
    for (const data::MultipleChoiceItem& item : task.items) requests += static_cast<int64_t>(item.continuations.size());
    scorer.Expect(task.name, requests);
    switch (task.kind) {
      case eval::TaskItems::Kind::kMultipleChoice: return RunChoices(task, model, scorer, folder, scores);
      case eval::TaskItems::Kind::kText: return RunText(task, model, scorer, folder, scores);
      case eval::TaskItems::Kind::kAnswer: return RunAnswers(task, model, scorer, folder, scores);
      case eval::TaskItems::Kind::kExactMatch: return RunExactMatch(task, model, scorer, folder, scores);
    }
    return absl::OkStatus();
  }

  Status RunChoices(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                    Scores* scores) {
    RF_ASSIGN_OR_RETURN(const eval::MultipleChoiceResult result,
                        eval::EvaluateMultipleChoice(task.items, scorer.AsScoreFn(),
                                                     {.prompt = Prompt(model), .acc_norm = task.acc_norm}));
    scores->Add(eval::FiguresOf(task.name, result));
    for (eval::ScoredItems& items : eval::ScoresOf(task.name, result)) scores->items.push_back(std::move(items));
    std::vector<nlohmann::json> rows;
    for (const eval::ItemResult& item : result.items) rows.push_back(eval::ToJson(item));
    return WriteLines(folder, task.name, rows);
  }

  Status RunText(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                 Scores* scores) {
    const int64_t window = scorer.options().max_length;
    RF_ASSIGN_OR_RETURN(const eval::TextResult result,
                        eval::EvaluateText(task.pages, *model.tokenizer,
                                           {.window = window, .special_tokens = harness_.special_tokens,
                                            .detokenize_wikitext = task.detokenize}, window, scorer));
    scores->Add(eval::FiguresOf(task.name, result));
    std::vector<nlohmann::json> rows;
    for (size_t i = 0; i < result.per_page.size(); ++i) {
      rows.push_back({{"row", i}, {"log_likelihood", result.per_page[i]}, {"tokens", result.page_tokens[i]},
                      {"words", result.page_words[i]}, {"bytes", result.page_bytes[i]}});
    }
    return WriteLines(folder, task.name, rows);
  }

  Status RunAnswers(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                    Scores* scores) {
    RF_ASSIGN_OR_RETURN(const eval::AnswerLikelihoods result,
                        eval::EvaluateAnswerLikelihoods(task, scorer.AsScoreFn(), Prompt(model)));
    scores->Add(result.figures);
    eval::ScoredItems greedy{.task = task.name, .metric = "acc"};
    std::vector<nlohmann::json> rows;
    for (size_t i = 0; i < result.items.size(); ++i) {
      const data::Score& item = result.items[i];
      greedy.scores.push_back(item.is_greedy ? 1 : 0);
      rows.push_back({{"row", i}, {"log_likelihood", item.log_likelihood}, {"tokens", item.tokens}, {"is_greedy", item.is_greedy}});
    }
    scores->items.push_back(std::move(greedy));
    return WriteLines(folder, task.name, rows);
  }

  Status RunExactMatch(const eval::TaskItems& task, const LoadedModel& model, eval::Scorer& scorer, const std::string& folder,
                       Scores* scores) {
    const auto generate = [&](const std::vector<std::string>& prompts, const eval::ExactMatchRules& rules) {
      return Answers(model, prompts, rules, scorer.options().max_length, harness_.special_tokens, progress_);
    };
    RF_ASSIGN_OR_RETURN(const eval::ExactMatchResult result, eval::EvaluateExactMatch(task, generate, Prompt(model)));
    scores->Add(result.figures);
    eval::ScoredItems matches{.task = task.name, .metric = "exact_match"};
    std::vector<nlohmann::json> rows;
    for (size_t i = 0; i < result.items.size(); ++i) {
      const eval::GeneratedItem& item = result.items[i];
      matches.scores.push_back(item.correct ? 1 : 0);
      rows.push_back({{"row", i}, {"context", item.prompt_digest}, {"answer", item.answer}, {"expected", item.expected},
                      {"correct", item.correct}});
    }
    scores->items.push_back(std::move(matches));
    return WriteLines(folder, task.name, rows);
  }

  const EvalOptions& options_;
  const eval::Harness harness_;
  std::vector<eval::TaskItems> tasks_;
  double loading_seconds_ = 0;
  ProgressLine progress_;
};

nlohmann::ordered_json Head(const EvalOptions& options, const std::string& model, const eval::Harness& harness) {
  return {{"model", model}, {"dtype", options.dtype}, {"shots", std::max<int64_t>(0, options.shots)},
          {"harness_version", harness.version}, {"chat_template", options.chat_template}};
}

void AddScores(const Scores& scores, nlohmann::ordered_json* json) {
  (*json)["results"] = eval::ToJson(scores.figures);
  (*json)["seconds"] = {{"tasks", scores.seconds}};
  (*json)["tokens"] = {{"computed", scores.computed_tokens}, {"requested", scores.requested_tokens}};
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
  AddScores(scores, &json);
  std::string text = eval::TableOf(scores.figures);
  if (compared) {
    RF_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(options, second, options.compare_adapters));
    RF_ASSIGN_OR_RETURN(other, evaluation.Run(model, folder("B")));
    RF_ASSIGN_OR_RETURN(const std::vector<eval::Comparison> comparisons, eval::Compare(scores.items, other.items));
    json["compared_with"] = Head(options, second, harness);
    AddScores(other, &json["compared_with"]);
    json["comparison"] = eval::ToJson(comparisons);
    text = Join("A\n", text, "\nB\n", eval::TableOf(other.figures), "\n", eval::TableOf(comparisons, options.model, second));
  }
  std::cout << (options.output == "json" ? json.dump(2) + "\n" : text) << std::flush;
  return absl::OkStatus();
}

}  // namespace refinery::task
