// Every range of a recipe. A message begins with the path of its field, so that ParseRecipe can put the line before it.

#include <cmath>
#include <set>

#include "common/limits.h"
#include "common/recipe.h"

namespace refinery {
namespace {

// A double that lies in a range; the words say which.
Status Require(bool good, const std::string& field, const std::string& words, double value) {
  if (good && std::isfinite(value)) return absl::OkStatus();
  return InvalidArgument(field, " must be ", words, ", is ", value);
}

Status Positive(const std::string& field, double value) { return Require(value > 0, field, "> 0", value); }

Status NotNegative(const std::string& field, double value) { return Require(value >= 0, field, ">= 0", value); }

Status Between(const std::string& field, double value, double low, double high) {
  return Require(value >= low && value <= high, field, Join("from ", low, " to ", high), value);
}

Status Inside(const std::string& field, double value) {
  return Require(value > 0 && value < 1, field, "between 0 and 1 (both excluded)", value);
}

std::string NamesOf(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Status OneOf(const std::string& field, const std::string& value, const std::vector<std::string>& known) {
  if (value.empty()) return InvalidArgument(field, " is missing; known: ", NamesOf(known));
  for (const std::string& name : known)
    if (name == value) return absl::OkStatus();
  const std::string near = Nearest(value, known);
  return InvalidArgument(field, " is '", value, "', which is not known; ",
                         near.empty() ? Join("known: ", NamesOf(known)) : Join("did you mean '", near, "'?"));
}

std::vector<std::string> BenchmarkNames() {
  std::vector<std::string> names;
  for (const auto& [name, split] : KnownBenchmarks()) names.push_back(name);
  return names;
}

Status CheckName(const std::string& name) {
  bool good = !name.empty() && name.size() <= 63 && name.front() != '-' && name.back() != '-';
  for (char c : name) good = good && ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-');
  if (good) return absl::OkStatus();
  return InvalidArgument("name must be 1 to 63 lower-case letters, digits and inner '-', is '", name.substr(0, 80),
                         "'");
}

Status CheckSeeds(const v1::Data& data) {
  const v1::Examples& seeds = data.seeds();
  if (seeds.benchmark().empty() == seeds.file().empty())
    return InvalidArgument("data.seeds must name either a benchmark or a file");
  if (!seeds.file().empty()) {
    if (!seeds.split().empty())
      return InvalidArgument("data.seeds.split goes only with data.seeds.benchmark; leave it out");
  } else {
    RF_RETURN_IF_ERROR(OneOf("data.seeds.benchmark", seeds.benchmark(), BenchmarkNames()));
    if (seeds.benchmark() != data.task())
      return InvalidArgument("data.seeds.benchmark is '", seeds.benchmark(), "' but data.task is '", data.task(),
                             "'; seeds must have the row format of the task");
    RF_RETURN_IF_ERROR(OneOf("data.seeds.split", seeds.split(), {"train", "validation", "test", "dev"}));
    if (seeds.split() != "train" && seeds.split() != "dev")
      return InvalidArgument("data.seeds.split must be train, is '", seeds.split(),
                             "'; the model must not learn from what it is measured on");
  }
  auto fits = [&](const std::string& field, uint32_t count) -> Status {
    if (seeds.limit() == 0 || count <= seeds.limit()) return absl::OkStatus();
    return InvalidArgument(field, " must be at most data.seeds.limit (", seeds.limit(), "), is ", count);
  };
  RF_RETURN_IF_ERROR(fits("data.synthesize.few_shot", data.synthesize().few_shot()));
  return fits("data.curate.seed_examples", data.curate().seed_examples());
}

Status CheckData(const v1::Data& data) {
  RF_RETURN_IF_ERROR(OneOf("data.task", data.task(), BenchmarkNames()));
  const v1::Synthesize& synthesize = data.synthesize();
  RF_RETURN_IF_ERROR(Between("data.synthesize.examples", synthesize.examples(), 1, 1e7));
  RF_RETURN_IF_ERROR(Between("data.synthesize.shards", synthesize.shards(), 1, 4096));
  if (synthesize.shards() > synthesize.examples())
    return InvalidArgument("data.synthesize.shards must be at most data.synthesize.examples (", synthesize.examples(),
                           "), is ", synthesize.shards());
  RF_RETURN_IF_ERROR(Between("data.synthesize.topics", synthesize.topics(), 1, 10000));
  RF_RETURN_IF_ERROR(Between("data.synthesize.few_shot", synthesize.few_shot(), 1, 64));
  RF_RETURN_IF_ERROR(Require(synthesize.temperature() > 0 && synthesize.temperature() <= 10,
                             "data.synthesize.temperature", "> 0 and at most 10", synthesize.temperature()));
  RF_RETURN_IF_ERROR(Require(synthesize.top_p() > 0 && synthesize.top_p() <= 1, "data.synthesize.top_p",
                             "> 0 and at most 1", synthesize.top_p()));
  RF_RETURN_IF_ERROR(Between("data.synthesize.max_new_tokens", synthesize.max_new_tokens(), 1, 32768));
  RF_RETURN_IF_ERROR(Require(data.critique().keep_fraction() > 0 && data.critique().keep_fraction() <= 1,
                             "data.critique.keep_fraction", "> 0 and at most 1", data.critique().keep_fraction()));
  const v1::Curate& curate = data.curate();
  RF_RETURN_IF_ERROR(Inside("data.curate.validation_fraction", curate.validation_fraction()));
  RF_RETURN_IF_ERROR(Inside("data.curate.held_out_fraction", curate.held_out_fraction()));
  const double kept_out = curate.validation_fraction() + curate.held_out_fraction();
  if (kept_out >= 1)
    return InvalidArgument("data.curate.validation_fraction plus data.curate.held_out_fraction must be below 1, is ",
                           kept_out);
  RF_RETURN_IF_ERROR(Require(curate.duplicate_threshold() > 0 && curate.duplicate_threshold() <= 1,
                             "data.curate.duplicate_threshold", "> 0 and at most 1", curate.duplicate_threshold()));
  return CheckSeeds(data);
}

Status CheckOptimizer(const v1::Optimizer& optimizer) {
  if (optimizer.has_muon()) {
    const v1::Muon& muon = optimizer.muon();
    RF_RETURN_IF_ERROR(Positive("distill.optimizer.muon.learning_rate", muon.learning_rate()));
    RF_RETURN_IF_ERROR(Require(muon.momentum() >= 0 && muon.momentum() < 1, "distill.optimizer.muon.momentum",
                               "at least 0 and below 1", muon.momentum()));
    return NotNegative("distill.optimizer.muon.weight_decay", muon.weight_decay());
  }
  const v1::AdamW& adamw = optimizer.adamw();
  RF_RETURN_IF_ERROR(Positive("distill.optimizer.adamw.learning_rate", adamw.learning_rate()));
  RF_RETURN_IF_ERROR(Require(adamw.beta1() >= 0 && adamw.beta1() < 1, "distill.optimizer.adamw.beta1",
                             "at least 0 and below 1", adamw.beta1()));
  RF_RETURN_IF_ERROR(Require(adamw.beta2() >= 0 && adamw.beta2() < 1, "distill.optimizer.adamw.beta2",
                             "at least 0 and below 1", adamw.beta2()));
  return NotNegative("distill.optimizer.adamw.weight_decay", adamw.weight_decay());
}

// The logit cache knows the teacher's exact partition at these temperatures and between them (docs/formats.md).
constexpr double kMinTemperature = 0.5;
constexpr double kMaxTemperature = 8;

Status CheckDistill(const v1::Distill& distill) {
  RF_RETURN_IF_ERROR(Between("distill.kl_weight", distill.kl_weight(), 0, 1));
  RF_RETURN_IF_ERROR(Between("distill.temperature", distill.temperature(), kMinTemperature, kMaxTemperature));
  RF_RETURN_IF_ERROR(Between("distill.top_k", distill.top_k(), 1, 65536));
  RF_RETURN_IF_ERROR(Between("distill.lora.rank", distill.lora().rank(), 1, 4096));
  RF_RETURN_IF_ERROR(Positive("distill.lora.lora_alpha", distill.lora().lora_alpha()));
  RF_RETURN_IF_ERROR(Between("distill.steps", distill.steps(), 1, 1e7));
  RF_RETURN_IF_ERROR(Between("distill.tokens_per_step", distill.tokens_per_step(), 16, 1e8));
  RF_RETURN_IF_ERROR(Between("distill.checkpoint_every", distill.checkpoint_every(), 1, 1e7));
  return CheckOptimizer(distill.optimizer());
}

Status CheckChoices(const std::string& field, const v1::Parameter& parameter) {
  if (parameter.min() != 0 || parameter.max() != 0 || parameter.log())
    return InvalidArgument(field, " has choices, not min, max or log");
  if (parameter.choices().empty())
    return InvalidArgument(field, ".choices is missing; known: ", NamesOf(KnownOptimizers()));
  std::set<std::string> seen;
  for (int i = 0; i < parameter.choices_size(); ++i) {
    const std::string choice = Join(field, ".choices[", i, "]");
    RF_RETURN_IF_ERROR(OneOf(choice, parameter.choices(i), KnownOptimizers()));
    if (!seen.insert(parameter.choices(i)).second)
      return InvalidArgument(choice, " is '", parameter.choices(i), "' again; name each once");
  }
  return absl::OkStatus();
}

Status CheckRange(const std::string& field, const v1::Parameter& parameter) {
  if (!parameter.choices().empty())
    return InvalidArgument(field, ".choices goes only with optimizer; give min and max");
  if (parameter.name() == "kl_weight") {
    RF_RETURN_IF_ERROR(Between(Join(field, ".min"), parameter.min(), 0, 1));
    RF_RETURN_IF_ERROR(Between(Join(field, ".max"), parameter.max(), 0, 1));
  } else if (parameter.name() == "temperature") {
    RF_RETURN_IF_ERROR(Between(Join(field, ".min"), parameter.min(), kMinTemperature, kMaxTemperature));
    RF_RETURN_IF_ERROR(Between(Join(field, ".max"), parameter.max(), kMinTemperature, kMaxTemperature));
  } else if (parameter.name() == "lora_rank") {
    for (const auto& [name, value] : {std::pair{".min", parameter.min()}, std::pair{".max", parameter.max()}}) {
      RF_RETURN_IF_ERROR(Between(field + name, value, 1, 4096));
      RF_RETURN_IF_ERROR(Require(value == std::floor(value), field + name, "a whole number", value));
    }
  } else {
    RF_RETURN_IF_ERROR(Positive(Join(field, ".min"), parameter.min()));
    RF_RETURN_IF_ERROR(Positive(Join(field, ".max"), parameter.max()));
  }
  if (parameter.min() >= parameter.max())
    return InvalidArgument(field, ".max must be above min (", parameter.min(), "), is ", parameter.max());
  if (parameter.log() && parameter.min() <= 0)
    return InvalidArgument(field, ".min must be > 0 on a logarithmic axis, is ", parameter.min());
  return absl::OkStatus();
}

Status CheckSearch(const v1::Search& search) {
  if (search.trials() == 0) {
    if (search.parameters().empty()) return Between("search.replicates", search.replicates(), 1, 100);
    return InvalidArgument("search.trials is 0, so search.parameters would not be used; give both or neither");
  }
  RF_RETURN_IF_ERROR(Between("search.trials", search.trials(), 1, 1000));
  RF_RETURN_IF_ERROR(Between("search.replicates", search.replicates(), 1, 100));
  RF_RETURN_IF_ERROR(Between("search.parallel", search.parallel(), 1, 1000));
  RF_RETURN_IF_ERROR(Between("search.initial_trials", search.initial_trials(), 1, 1000));
  if (search.initial_trials() > search.trials())
    return InvalidArgument("search.initial_trials must be at most search.trials (", search.trials(), "), is ",
                           search.initial_trials());
  if (search.parameters().empty()) return InvalidArgument("search.parameters is missing; a search varies at least one");
  std::set<std::string> seen;
  double settings = 1;  // how many different ones there are
  for (int i = 0; i < search.parameters_size(); ++i) {
    const v1::Parameter& parameter = search.parameters(i);
    const std::string field = Join("search.parameters[", i, "]");
    RF_RETURN_IF_ERROR(OneOf(Join(field, ".name"), parameter.name(), KnownParameters()));
    if (!seen.insert(parameter.name()).second)
      return InvalidArgument(field, ".name is '", parameter.name(), "' again; name each once");
    RF_RETURN_IF_ERROR(parameter.name() == "optimizer" ? CheckChoices(field, parameter) : CheckRange(field, parameter));
    settings *= parameter.name() == "optimizer"   ? parameter.choices_size()
                : parameter.name() == "lora_rank" ? parameter.max() - parameter.min() + 1
                                                  : INFINITY;
  }
  if (search.trials() > settings)
    return InvalidArgument("search.trials must be at most ", settings, " (there are no more different settings), is ",
                           search.trials());
  return absl::OkStatus();
}

Status CheckCalibration(const v1::CalibrationMix& mix) {
  RF_RETURN_IF_ERROR(Between("quantize.gptq.calibration.general_share", mix.general_share(), 0, 1));
  if (mix.general_share() > 0 && mix.general().empty())
    return InvalidArgument("quantize.gptq.calibration.general_share is ", mix.general_share(),
                           ", but quantize.gptq.calibration.general names no file");
  return Require(mix.duplicate_threshold() > 0 && mix.duplicate_threshold() <= 1,
                 "quantize.gptq.calibration.duplicate_threshold", "> 0 and at most 1", mix.duplicate_threshold());
}

bool HasBudget(const v1::Gptq& gptq) { return gptq.bits_budget() != 0 || gptq.bytes_budget() != 0; }

// What else quantization is held to: a size, a quality.
Status CheckBudgets(const v1::Gptq& gptq) {
  if (gptq.bits_budget() != 0) {
    RF_RETURN_IF_ERROR(Between("quantize.gptq.bits_budget", gptq.bits_budget(), 2, 9));
    if (gptq.bytes_budget() != 0)
      return InvalidArgument("quantize.gptq.bytes_budget cannot be given together with quantize.gptq.bits_budget; give one of them");
  }
  if (HasBudget(gptq) && gptq.bits() != 0)
    return InvalidArgument("quantize.gptq.bits cannot be given together with a budget, under which each layer gets one of quantize.gptq.widths; leave it out");
  if (!gptq.widths().empty() && !HasBudget(gptq))
    return InvalidArgument("quantize.gptq.widths are for a budget; give quantize.gptq.bits_budget or bytes_budget, or bits instead of widths");
  for (int i = 0; i < gptq.widths_size(); ++i) {
    const uint32_t bits = gptq.widths(i);
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
      return InvalidArgument("quantize.gptq.widths[", i, "] must be 2, 3, 4 or 8, is ", bits);
    if (i > 0 && bits <= gptq.widths(i - 1))
      return InvalidArgument("quantize.gptq.widths[", i, "] is ", bits, " after ", gptq.widths(i - 1), "; give each once, ascending");
  }
  RF_RETURN_IF_ERROR(NotNegative("quantize.gptq.max_kl", gptq.max_kl()));
  if (gptq.max_ppl_ratio() != 0)
    RF_RETURN_IF_ERROR(Require(gptq.max_ppl_ratio() > 1, "quantize.gptq.max_ppl_ratio", "> 1", gptq.max_ppl_ratio()));
  return Between("quantize.gptq.held_out_tokens", gptq.held_out_tokens(), 2, 1e7);
}

Status CheckGptq(const v1::Gptq& gptq) {
  RF_RETURN_IF_ERROR(OneOf("quantize.gptq.grid", gptq.grid(), {"full_range", "symmetric", "asymmetric"}));
  RF_RETURN_IF_ERROR(OneOf("quantize.gptq.order", gptq.order(), {"groups", "natural", "classic"}));
  RF_RETURN_IF_ERROR(Between("quantize.gptq.alpha", gptq.alpha(), 0, 1));
  RF_RETURN_IF_ERROR(CheckBudgets(gptq));
  RF_RETURN_IF_ERROR(CheckCalibration(gptq.calibration()));
  if (!HasBudget(gptq) && gptq.bits() != 2 && gptq.bits() != 3 && gptq.bits() != 4 && gptq.bits() != 8)
    return InvalidArgument("quantize.gptq.bits must be 2, 3, 4 or 8, is ", gptq.bits());
  if (gptq.group_size() != -1 && gptq.group_size() <= 0)
    return InvalidArgument("quantize.gptq.group_size must be > 0, or -1 for one group per row, is ", gptq.group_size());
  RF_RETURN_IF_ERROR(Inside("quantize.gptq.damp_fraction", gptq.damp_fraction()));
  RF_RETURN_IF_ERROR(Between("quantize.gptq.sequence_length", gptq.sequence_length(), 1, 1e6));
  return Require(gptq.calibration_tokens() >= gptq.sequence_length(), "quantize.gptq.calibration_tokens",
                 Join("at least sequence_length (", gptq.sequence_length(), ")"), gptq.calibration_tokens());
}

// Only what needs no model; the shapes are checked when it is imported.
Status CheckExport(const v1::Export& written, const v1::Gptq& gptq) {
  std::set<std::string> seen;
  for (int i = 0; i < written.formats_size(); ++i) {
    const std::string field = Join("export.formats[", i, "]"), &format = written.formats(i);
    RF_RETURN_IF_ERROR(OneOf(field, format, {"gptq", "gptq_v2", "compressed_tensors", "gguf"}));
    if (!seen.insert(format).second) return InvalidArgument(field, " is '", format, "' again; name each once");
    if (format != "gptq" && format != "gptq_v2" && !gptq.widths().empty() && gptq.widths(0) < 4)
      return InvalidArgument("quantize.gptq.widths[0] is ", gptq.widths(0), ", which the format '", format,
                             "' stores as 4: it would take no less; give 4 and 8, or leave the format out");
    if (format != "compressed_tensors") continue;
    // GGUF holds everything, some of it as 16-bit weights; of compressed-tensors single layers of 2 and 3 bits can stand as 4.
    if (!HasBudget(gptq) && gptq.bits() != 4 && gptq.bits() != 8)
      return InvalidArgument(field, " is '", format, "', which holds 4 and 8 bits; quantize.gptq.bits is ", gptq.bits());
    if (gptq.order() == "classic")
      return InvalidArgument(field, " is '", format, "', which holds no permuted columns; quantize.gptq.order is 'classic'");
  }
  for (const auto& [field, value] : {std::pair{"export.gguf.embeddings", written.gguf().embeddings()},
                                     std::pair{"export.gguf.head", written.gguf().head()}})
    if (!value.empty()) {
      RF_RETURN_IF_ERROR(OneOf(field, value, {"source", "q8_0"}));
      if (!seen.contains("gguf")) return InvalidArgument(field, " is for the format gguf, which export.formats does not name; add it, or leave the field out");
    }
  return absl::OkStatus();
}

Status CheckRecover(const v1::Recover& recover, const v1::Gptq& gptq) {
  RF_RETURN_IF_ERROR(Between("quantize.recover.steps", recover.steps(), 1, 1e6));
  if (!HasBudget(gptq) || recover.learning_rate() != 0)
    RF_RETURN_IF_ERROR(Between("quantize.recover.learning_rate", recover.learning_rate(), 1e-7, 0.1));
  RF_RETURN_IF_ERROR(Between("quantize.recover.layer_weight", recover.layer_weight(), 0, 1e6));
  RF_RETURN_IF_ERROR(Between("quantize.recover.sequence_length", recover.sequence_length(), 2, 1e6));
  return Require(recover.tokens_per_step() >= recover.sequence_length(), "quantize.recover.tokens_per_step",
                 Join("at least sequence_length (", recover.sequence_length(), ")"), recover.tokens_per_step());
}

Status CheckEvaluate(const v1::Evaluate& evaluate) {
  std::set<std::string> seen;
  for (int i = 0; i < evaluate.benchmarks_size(); ++i) {
    const v1::Benchmark& benchmark = evaluate.benchmarks(i);
    const std::string field = Join("evaluate.benchmarks[", i, "]");
    RF_RETURN_IF_ERROR(OneOf(Join(field, ".name"), benchmark.name(), BenchmarkNames()));
    RF_RETURN_IF_ERROR(OneOf(Join(field, ".split"), benchmark.split(), {"train", "validation", "test", "dev"}));
    if (!seen.insert(benchmark.name()).second)
      return InvalidArgument(field, ".name is '", benchmark.name(), "' again; name each once");
  }
  RF_RETURN_IF_ERROR(Between("evaluate.shards", evaluate.shards(), 1, 64));
  if (evaluate.shards() > 1 && evaluate.benchmarks().empty())
    return InvalidArgument("evaluate.shards is ", evaluate.shards(), ", but there are no evaluate.benchmarks to share");
  return Between("evaluate.latency_tokens", evaluate.latency_tokens(), 1, 100000);
}

}  // namespace

Status CheckRecipe(const v1::Recipe& recipe) {
  RF_RETURN_IF_ERROR(CheckName(recipe.name()));
  if (recipe.student().model().empty())
    return InvalidArgument("student.model is missing; give a Hugging Face folder or a .gguf file");
  if (recipe.teacher().model().empty()) return InvalidArgument("teacher.model is missing");
  RF_RETURN_IF_ERROR(CheckData(recipe.data()));
  const uint32_t shots = recipe.teacher().context().few_shot();
  RF_RETURN_IF_ERROR(Between("teacher.context.few_shot", shots, 0, 64));
  const uint32_t limit = recipe.data().seeds().limit();
  if (limit != 0 && shots > limit)
    return InvalidArgument("teacher.context.few_shot must be at most data.seeds.limit (", limit, "), is ", shots);
  RF_RETURN_IF_ERROR(CheckDistill(recipe.distill()));
  RF_RETURN_IF_ERROR(CheckSearch(recipe.search()));
  RF_RETURN_IF_ERROR(CheckGptq(recipe.quantize().gptq()));
  RF_RETURN_IF_ERROR(CheckExport(recipe.export_(), recipe.quantize().gptq()));
  RF_RETURN_IF_ERROR(CheckRecover(recipe.quantize().recover(), recipe.quantize().gptq()));
  RF_RETURN_IF_ERROR(CheckEvaluate(recipe.evaluate()));
  return Between("resources.threads", recipe.resources().threads(), 0, 4096);
}

}  // namespace refinery
