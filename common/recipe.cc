#include "common/recipe.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <cstdlib>

#include "common/files.h"
#include "common/limits.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;

// The defaults of recipe.proto, beside the field numbers that document them.
template <typename T, typename Value>
T Or(T value, Value fallback) {
  return value == T{} ? static_cast<T>(fallback) : value;
}

void FillData(v1::Data* data) {
  if (!data->seeds().benchmark().empty() && data->seeds().split().empty())
    data->mutable_seeds()->set_split(data->seeds().benchmark() == "mmlu" ? "dev" : "train");
  v1::Synthesize* synthesize = data->mutable_synthesize();
  synthesize->set_examples(Or(synthesize->examples(), 128));
  synthesize->set_shards(Or(synthesize->shards(), 1));
  synthesize->set_topics(Or(synthesize->topics(), 12));
  const uint32_t limit = data->seeds().limit();
  synthesize->set_few_shot(Or(synthesize->few_shot(), limit == 0 ? 4 : std::min<uint32_t>(4, limit)));
  synthesize->set_temperature(Or(synthesize->temperature(), 0.8));
  synthesize->set_top_p(Or(synthesize->top_p(), 0.95));
  synthesize->set_max_new_tokens(Or(synthesize->max_new_tokens(), 96));
  data->mutable_critique()->set_keep_fraction(Or(data->critique().keep_fraction(), 0.7));
  v1::Curate* curate = data->mutable_curate();
  curate->set_validation_fraction(Or(curate->validation_fraction(), 0.15));
  curate->set_held_out_fraction(Or(curate->held_out_fraction(), 0.15));
  curate->set_duplicate_threshold(Or(curate->duplicate_threshold(), 0.7));
}

void FillDistill(v1::Distill* distill) {
  if (!distill->has_kl_weight()) distill->set_kl_weight(1.0);
  distill->set_temperature(Or(distill->temperature(), 1.0));
  distill->set_top_k(Or(distill->top_k(), 64));
  distill->set_steps(Or(distill->steps(), 30));
  distill->set_tokens_per_step(Or(distill->tokens_per_step(), 512));
  distill->set_checkpoint_every(Or(distill->checkpoint_every(), 10));
  v1::Lora* lora = distill->mutable_lora();
  lora->set_rank(Or(lora->rank(), 16));
  lora->set_lora_alpha(Or(lora->lora_alpha(), 2.0 * lora->rank()));
  v1::Optimizer* optimizer = distill->mutable_optimizer();
  if (optimizer->has_adamw()) {
    v1::AdamW* adamw = optimizer->mutable_adamw();
    adamw->set_learning_rate(Or(adamw->learning_rate(), 1e-3));
    if (!adamw->has_beta1()) adamw->set_beta1(0.9);
    if (!adamw->has_beta2()) adamw->set_beta2(0.999);
  } else {
    v1::Muon* muon = optimizer->mutable_muon();
    muon->set_learning_rate(Or(muon->learning_rate(), 2e-3));
    if (!muon->has_momentum()) muon->set_momentum(0.95);
  }
}

void FillSearch(v1::Search* search) {
  search->set_replicates(Or(search->replicates(), 1));
  search->set_parallel(Or(search->parallel(), 1));
  const uint32_t half = std::max<uint32_t>(2, search->trials() / 2);
  search->set_initial_trials(Or(search->initial_trials(), std::min(search->trials(), half)));
}

void FillRest(v1::Recipe* recipe) {
  v1::Gptq* gptq = recipe->mutable_quantize()->mutable_gptq();
  const bool budget = gptq->bits_budget() != 0 || gptq->bytes_budget() != 0;
  if (!budget) gptq->set_bits(Or(gptq->bits(), 4));
  gptq->set_group_size(Or(gptq->group_size(), 64));
  gptq->set_damp_fraction(Or(gptq->damp_fraction(), 0.01));
  gptq->set_calibration_tokens(Or(gptq->calibration_tokens(), 16384));
  gptq->set_sequence_length(Or(gptq->sequence_length(), 256));
  gptq->set_grid(Or(gptq->grid(), "full_range"));
  gptq->set_order(Or(gptq->order(), "groups"));
  gptq->set_held_out_tokens(Or(gptq->held_out_tokens(), 2048));
  v1::CalibrationMix* mix = gptq->mutable_calibration();
  if (!mix->general().empty()) mix->set_general_share(Or(mix->general_share(), 0.5));
  mix->set_duplicate_threshold(Or(mix->duplicate_threshold(), 0.8));
  v1::Recover* recover = recipe->mutable_quantize()->mutable_recover();
  if (!recover->has_enabled()) recover->set_enabled(true);
  recover->set_steps(Or(recover->steps(), 120));
  recover->set_tokens_per_step(Or(recover->tokens_per_step(), 512));
  // Under a budget the task takes the rate of the widths that came out.
  if (!budget) recover->set_learning_rate(Or(recover->learning_rate(), gptq->bits() < 4 ? 0.004 : 0.0025));
  recover->set_sequence_length(Or(recover->sequence_length(), 512));
  if (!recover->has_patience()) recover->set_patience(1);
  if (!recover->has_layer_weight()) recover->set_layer_weight(40);
  recover->set_evaluate_every(Or(recover->evaluate_every(), 60));
  recover->set_checkpoint_every(Or(recover->checkpoint_every(), 25));
  v1::Evaluate* evaluate = recipe->mutable_evaluate();
  evaluate->set_latency_tokens(Or(evaluate->latency_tokens(), 32));
  evaluate->set_shards(Or(evaluate->shards(), 1));
  v1::Export* written = recipe->mutable_export_();
  if (written->formats().empty()) written->add_formats("gptq");
  if (budget && gptq->widths().empty()) {
    // compressed-tensors and GGUF would store 2 and 3 bits as 4 and exceed the budget.
    const bool all = std::none_of(written->formats().begin(), written->formats().end(),
                                  [](const std::string& format) { return format == "compressed_tensors" || format == "gguf"; });
    for (const uint32_t bits : all ? std::vector<uint32_t>{2, 3, 4, 8} : std::vector<uint32_t>{4, 8}) gptq->add_widths(bits);
    // GGUF has no block of 8 bits with zero points: 16-bit weights would stand there.
    const bool gguf = std::find(written->formats().begin(), written->formats().end(), "gguf") != written->formats().end();
    if (gguf && gptq->grid() == "asymmetric") gptq->mutable_widths()->RemoveLast();
  }
  for (v1::Benchmark& benchmark : *evaluate->mutable_benchmarks()) {
    auto known = KnownBenchmarks().find(benchmark.name());
    if (known != KnownBenchmarks().end() && benchmark.split().empty()) benchmark.set_split(known->second);
  }
}

std::string ResolvePath(const std::string& text, const fs::path& folder) {
  if (text.empty() || text.find("://") != std::string::npos) return text;
  fs::path path = text;
  if (text == "~" || text.rfind("~/", 0) == 0) {
    const char* home = std::getenv("HOME");
    if (home != nullptr) path = fs::path(home) / text.substr(std::min<size_t>(2, text.size()));
  }
  return (fs::absolute(folder.empty() ? fs::path(".") : fs::path(folder)) / path).lexically_normal().string();
}

void ResolvePaths(const fs::path& folder, v1::Recipe* recipe) {
  auto resolve = [&](const std::string& text) { return ResolvePath(text, folder); };
  if (recipe->has_student()) recipe->mutable_student()->set_model(resolve(recipe->student().model()));
  if (recipe->has_teacher()) recipe->mutable_teacher()->set_model(resolve(recipe->teacher().model()));
  if (recipe->data().has_seeds())
    recipe->mutable_data()->mutable_seeds()->set_file(resolve(recipe->data().seeds().file()));
  if (recipe->quantize().gptq().has_calibration()) {
    v1::CalibrationMix* mix = recipe->mutable_quantize()->mutable_gptq()->mutable_calibration();
    mix->set_general(resolve(mix->general()));
  }
  if (!recipe->has_evaluate()) return;
  for (v1::Benchmark& benchmark : *recipe->mutable_evaluate()->mutable_benchmarks())
    benchmark.set_file(resolve(benchmark.file()));
}

// Whether the scalar field at `path` ("a.b[2].c") of `message` is set to something else than zero.
bool IsSet(const google::protobuf::Message& message, const std::string& path) {
  const size_t dot = path.find('.');
  std::string step = path.substr(0, dot);
  int index = -1;
  if (const size_t bracket = step.find('['); bracket != std::string::npos) {
    index = std::atoi(step.c_str() + bracket + 1);
    step.resize(bracket);
  }
  const auto* field = message.GetDescriptor()->FindFieldByName(step);
  const auto* reflection = message.GetReflection();
  if (field == nullptr || field->is_map()) return false;
  if (dot == std::string::npos) return !field->is_repeated() && reflection->HasField(message, field);
  return IsSet(
      index < 0 ? reflection->GetMessage(message, field) : reflection->GetRepeatedMessage(message, field, index),
      path.substr(dot + 1));
}

std::string FileStem(const std::string& name) { return fs::path(name).stem().string(); }

StatusOr<fs::path> BenchmarkFile(const std::string& benchmark, const std::string& split, const fs::path& data_folder) {
  fs::path path = data_folder / benchmark / Join(split, ".jsonl");
  std::error_code error;
  if (fs::is_regular_file(path, error)) return path;
  return NotFound("no file ", path.string(), "; bring it with: refinery data pull ", benchmark);
}

StatusOr<fs::path> GivenFile(const std::string& field, const std::string& file) {
  std::error_code error;
  if (fs::is_regular_file(file, error)) return fs::path(file);
  return NotFound(field, ": no file ", file);
}

}  // namespace

void FillDefaults(v1::Recipe* recipe) {
  v1::Teacher* teacher = recipe->mutable_teacher();
  if (teacher->model().empty()) teacher->set_model(recipe->student().model());
  FillData(recipe->mutable_data());
  FillDistill(recipe->mutable_distill());
  FillSearch(recipe->mutable_search());
  FillRest(recipe);
}

StatusOr<v1::Recipe> ParseRecipe(const std::string& yaml, const std::string& name, const fs::path& folder) {
  if (yaml.size() > limits::kMaxRecipeBytes)
    return InvalidArgument(name, ":1: has ", yaml.size(), " bytes; a recipe has at most ", limits::kMaxRecipeBytes);
  v1::Recipe recipe;
  YamlPlaces places;
  RF_RETURN_IF_ERROR(YamlToMessage(yaml, name, &recipe, &places));
  // The checks speak of fields; here is known where those were written.
  auto at_line = [&](const std::string& path) { return Join(name, ":", std::max(places.LineOf(path), 1), ": "); };
  if (recipe.name().empty()) recipe.set_name(FileStem(name));
  ResolvePaths(folder, &recipe);
  FillDefaults(&recipe);
  for (const std::string& path : places.written_zeros) {
    if (path == "name" || !IsSet(recipe, path)) continue;
    return InvalidArgument(at_line(path), path,
                           " must not be zero or empty (that means the default); leave the line out or "
                           "give another value");
  }
  Status checked = CheckRecipe(recipe);
  if (checked.ok()) return recipe;
  const std::string message = Message(checked);
  return Status(checked.code(), View(at_line(message.substr(0, message.find(' '))) + message));
}

StatusOr<v1::Recipe> LoadRecipe(const fs::path& path) {
  StatusOr<std::string> text = ReadFile(path, limits::kMaxRecipeBytes);
  if (absl::IsResourceExhausted(text.status()))
    return InvalidArgument(path.string(), ":1: is too long; a recipe has at most ", limits::kMaxRecipeBytes, " bytes");
  RF_RETURN_IF_ERROR(Annotate(text.status(), "recipe"));
  return ParseRecipe(*text, path.string(), path.parent_path());
}

StatusOr<std::map<std::string, fs::path>> RecipeFiles(const v1::Recipe& recipe, const fs::path& data_folder) {
  std::map<std::string, fs::path> files;
  const v1::Examples& seeds = recipe.data().seeds();
  if (!seeds.file().empty()) {
    RF_ASSIGN_OR_RETURN(files["seeds"], GivenFile("data.seeds.file", seeds.file()));
  } else {
    RF_ASSIGN_OR_RETURN(files["seeds"], BenchmarkFile(seeds.benchmark(), seeds.split(), data_folder));
  }
  if (const std::string& general = recipe.quantize().gptq().calibration().general(); !general.empty()) {
    RF_ASSIGN_OR_RETURN(files["general"], GivenFile("quantize.gptq.calibration.general", general));
  }
  for (const v1::Benchmark& benchmark : recipe.evaluate().benchmarks()) {
    const std::string role = Join("benchmark/", benchmark.name());
    if (!benchmark.file().empty()) {
      RF_ASSIGN_OR_RETURN(files[role], GivenFile("evaluate.benchmarks.file", benchmark.file()));
    } else {
      RF_ASSIGN_OR_RETURN(files[role], BenchmarkFile(benchmark.name(), benchmark.split(), data_folder));
    }
  }
  return files;
}

const std::map<std::string, std::string>& KnownBenchmarks() {
  // The split that the field reports numbers on (lm-evaluation-harness 0.4.13).
  static const auto* const known = new std::map<std::string, std::string>{
      {"arc_easy", "test"},          {"commonsense_qa", "validation"},
      {"hellaswag", "validation"},   {"mmlu", "test"},
      {"openbookqa", "test"},        {"piqa", "validation"},
      {"social_i_qa", "validation"}, {"winogrande", "validation"},
  };
  return *known;
}

const std::vector<std::string>& KnownParameters() {
  static const auto* const known =
      new std::vector<std::string>{"optimizer", "learning_rate", "temperature", "kl_weight", "lora_rank"};
  return *known;
}

const std::vector<std::string>& KnownOptimizers() {
  static const auto* const known = new std::vector<std::string>{"muon", "adamw"};
  return *known;
}

}  // namespace refinery
