#include "worker/task/runtime/torch.h"

#include <algorithm>
#include <optional>

#include "common/digest.h"
#include "worker/task/data/prompts.h"
#include "worker/task/data/structured.h"
#include "worker/task/generate/engine.h"
#include "worker/task/models.h"
#include "worker/task/runtime/device.h"
#include "worker/task/seeds.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

constexpr int64_t kTopicTokens = 64;
constexpr int64_t kTopicsPerPrompt = 6;

// Everything the three rounds of generation share.
struct Writer {
  const SynthesizeSpec& spec;
  TaskContext& context;
  const tokenizer::Tokenizer& tokenizer;
  generate::Engine& engine;
  data::TaskFormat format;
  std::vector<data::Example> seeds;
  uint64_t tokens_generated = 0;

  // temperature 0 = the likeliest text.
  StatusOr<generate::Request> MakeRequest(const std::string& prompt, const std::string& stop, int64_t max_new_tokens, uint64_t seed,
                                          double temperature) {
    RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(prompt));
    RF_ASSIGN_OR_RETURN(std::vector<int32_t> stop_ids, tokenizer.Encode(stop, /*add_special_tokens=*/false));
    return generate::Request{.prompt = std::move(ids),
                             .max_new_tokens = max_new_tokens,
                             .sampling = {.temperature = temperature, .top_p = spec.top_p},
                             .seed = seed,
                             .end_ids = tokenizer.end_ids(),
                             .stop_sequences = {std::move(stop_ids)}};
  }

  // The completions as text.
  StatusOr<std::vector<std::pair<std::string, std::string>>> Run(const std::vector<generate::Request>& requests, const std::string& phase) {
    struct Phase final : runtime::Reporter {
      EventWriter& events;
      std::string name;
      uint64_t before;
      Phase(EventWriter& e, std::string n, uint64_t b) : events(e), name(std::move(n)), before(b) {}
      void Report(const runtime::Progress& progress) override {
        runtime::Progress named = progress;
        named.phase = name;
        named.tokens_generated += before;
        events.Report(named);
      }
      void Note(const std::string& code, const std::string& text) override { events.Note(code, text); }
      void CheckpointReady(const std::string&, uint64_t) override {}
      void Check() override { events.Check(); }
    } reporter(context.events, phase, tokens_generated);
    std::vector<std::pair<std::string, std::string>> texts;
    RF_ASSIGN_OR_RETURN(const std::vector<generate::Completion> completions, engine.Generate(requests, reporter));
    for (const generate::Completion& completion : completions) {
      tokens_generated += completion.tokens.size();
      RF_ASSIGN_OR_RETURN(std::string text, tokenizer.Decode(completion.tokens));
      texts.emplace_back(std::move(text), completion.finish_reason);
    }
    return texts;
  }
};

// The topics are asked for with a seed that all shards share, so that every shard works through the same list.
StatusOr<std::vector<std::string>> MakeTopics(Writer& writer, uint64_t seed) {
  std::vector<std::string> topics = writer.format.topics;
  std::vector<generate::Request> requests;
  int64_t prompts = (writer.spec.topics + kTopicsPerPrompt - 1) / kTopicsPerPrompt;
  for (int64_t i = 0; i < prompts; ++i) {
    std::string prompt = data::TopicsPrompt(writer.format, seed, static_cast<size_t>(i));
    RF_ASSIGN_OR_RETURN(generate::Request request, writer.MakeRequest(prompt, "\n\n", kTopicTokens,
                                                                      DeriveSeed(seed, Join("topics/", i)), writer.spec.temperature));
    requests.push_back(std::move(request));
  }
  RF_ASSIGN_OR_RETURN(auto texts, writer.Run(requests, "topics"));
  for (const auto& [text, finish_reason] : texts)
    for (std::string& topic : data::ParseTopics(text, topics, nullptr)) topics.push_back(std::move(topic));
  return topics;
}

// The constraint ends the answer; stop sequences would cut it.
void Constrain(generate::Request& request, generate::Constraint::Kind kind, const std::string& source) {
  request.constraint = {kind, source};
  request.stop_sequences.clear();
}

// Questions first, all at once, sampled for variety; then the likeliest answer to each that may be used.
StatusOr<std::vector<data::Example>> MakeExamples(Writer& writer, const std::vector<std::string>& topics, uint64_t seed) {
  const SynthesizeSpec& spec = writer.spec;
  data::PlanSettings settings{.seed = seed, .few_shot = static_cast<size_t>(spec.few_shot)};
  std::vector<std::string> seed_topics = data::SeedTopics(writer.format, writer.seeds);
  std::vector<data::QuestionPlan> plans;
  std::vector<generate::Request> requests;
  for (int64_t index = spec.shard; index < spec.examples; index += spec.shards) {
    plans.push_back(data::PlanQuestion(writer.format, writer.seeds, seed_topics, topics, static_cast<size_t>(index), settings));
    if (spec.structured) plans.back().prompt = data::StructuredPrompt(writer.format, writer.seeds, seed_topics, plans.back());
    RF_ASSIGN_OR_RETURN(generate::Request request, writer.MakeRequest(plans.back().prompt, data::QuestionStop(writer.format),
                                                                      spec.max_new_tokens, plans.back().question_seed, spec.temperature));
    if (spec.structured) Constrain(request, generate::Constraint::Kind::kJsonSchema, data::QuestionSchema(writer.format));
    requests.push_back(std::move(request));
  }
  RF_ASSIGN_OR_RETURN(auto questions, writer.Run(requests, "questions"));

  std::string shots = data::AnswerShots(writer.format, writer.seeds, settings);
  std::vector<data::Parsed> parsed;
  std::vector<size_t> asked;
  requests.clear();
  for (size_t i = 0; i < plans.size(); ++i) {
    const auto parse = spec.structured ? data::ParseStructuredQuestion : data::ParseQuestion;
    parsed.push_back(parse(writer.format, questions[i].first, questions[i].second));
    if (!parsed.back().ok()) continue;
    RF_ASSIGN_OR_RETURN(generate::Request request,
                        writer.MakeRequest(data::AnswerPrompt(writer.format, shots, parsed.back().text), data::AnswerStop(),
                                           spec.max_new_tokens, plans[i].answer_seed, /*temperature=*/0));
    if (const std::string regex = data::AnswerRegex(writer.format); spec.structured && !regex.empty())
      Constrain(request, generate::Constraint::Kind::kRegex, regex);
    requests.push_back(std::move(request));
    asked.push_back(i);
  }
  RF_ASSIGN_OR_RETURN(auto answers, writer.Run(requests, "answers"));

  std::vector<std::optional<data::Parsed>> answered(plans.size());
  for (size_t k = 0; k < asked.size(); ++k)
    answered[asked[k]] = data::ParseAnswer(writer.format, parsed[asked[k]].text, answers[k].first, answers[k].second);
  std::vector<data::Example> examples;
  for (size_t i = 0; i < plans.size(); ++i)
    examples.push_back(data::RawExample(writer.format, plans[i], parsed[i], answered[i].value_or(data::Parsed{})));
  return examples;
}

}  // namespace

Status Synthesize(const SynthesizeSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(ResolvedModel resolved, ResolveInput(context, "teacher"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(resolved.folder->path()));
  model::LoadOptions options{.dtype = runtime::ComputeType(), .device = runtime::DefaultDevice()};
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> teacher, model::CausalLm::Load(*resolved.folder, options));
  generate::EngineOptions engine_options{.max_batch = 32};
  if (spec.structured) engine_options.tokenizer = tokenizer;  // constraints need it
  generate::Engine engine(teacher, engine_options);

  RF_ASSIGN_OR_RETURN(data::TaskFormat format, data::FormatOf(spec.task, spec.description));
  Writer writer{.spec = spec, .context = context, .tokenizer = *tokenizer, .engine = engine, .format = std::move(format)};
  RF_ASSIGN_OR_RETURN(std::vector<data::MultipleChoiceItem> items, ReadSeeds(context, spec.task, spec.seed_limit));
  if (items.empty()) return InvalidArgument("the seeds file holds no examples: self-instruct needs a few");
  for (const data::MultipleChoiceItem& item : items) writer.seeds.push_back(data::ExampleFromItem(item));

  // Shards of one job differ in their path and thus in their seed; what they share derives from the job alone.
  uint64_t shared_seed = DeriveSeed(0, Join(spec.task, "/", spec.examples));
  RF_ASSIGN_OR_RETURN(std::vector<std::string> topics, MakeTopics(writer, shared_seed));
  RF_ASSIGN_OR_RETURN(std::vector<data::Example> examples, MakeExamples(writer, topics, context.seed));
  auto usable = std::count_if(examples.begin(), examples.end(), [](const data::Example& e) { return !e.extra.contains("rejected"); });
  context.events.Measure({.name = "raw_examples", .value = static_cast<double>(examples.size()), .count = examples.size()});
  context.events.Measure({.name = "usable_examples", .value = static_cast<double>(usable), .count = examples.size()});
  context.events.Measure({.name = "topics", .value = static_cast<double>(topics.size()), .count = topics.size()});
  return data::WriteExamples(context.outputs / "raw.jsonl", examples);
}

}  // namespace refinery::task
