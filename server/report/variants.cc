#include "server/report/variants.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "common/recipe.h"
#include "server/report/numbers.h"

namespace refinery::report {
namespace {

constexpr char kNone[] = "–";

const std::vector<std::string>& VariantNames() {
  static const auto* const names =
      new std::vector<std::string>{"student", "student-gptq", "refined", "refined-gptq", "refined-recovered",
                                  "best-adamw", "best-muon"};
  return *names;
}

std::string ErrorCell(const Variant& variant, const std::string& name) {
  const v1::Measurement* measurement = variant.Find(name);
  return measurement == nullptr ? kNone : WithError(measurement->value(), measurement->standard_error());
}

// Training seeds behind a variant's numbers: one adapter, chosen by validation loss among the replicates.
std::string SeedsCell(const v1::Job& job, const Variant& variant) {
  if (!variant.trained) return kNone;
  const uint32_t replicates = std::max<uint32_t>(1, job.recipe().search().replicates());
  return replicates == 1 ? "1" : Join("1 of ", replicates);
}

// The field of the recipe that asked for a measurement.
std::string FieldOf(const v1::Recipe& recipe, const Variant& variant, const std::string& measurement) {
  for (int i = 0; i < recipe.evaluate().benchmarks_size(); ++i)
    if (measurement.rfind(recipe.evaluate().benchmarks(i).name() + "/", 0) == 0)
      return Join("evaluate.benchmarks[", i, "]");
  if (measurement.rfind("held_out", 0) == 0) return "data.curate.held_out_fraction";
  if (measurement == "ms_per_token") return "evaluate.latency_tokens";
  if (variant.name.ends_with("-recovered")) return "quantize.recover";
  return variant.name.ends_with("-gptq") ? "quantize.gptq" : "student.model";
}

std::string UnitText(const v1::Measurement& measurement) {
  return measurement.unit().empty() ? kNone : measurement.unit();
}

}  // namespace

const v1::Measurement* Variant::Find(const std::string& measurement) const {
  auto it = measurements.find(measurement);
  return it == measurements.end() ? nullptr : &it->second;
}

std::vector<Variant> VariantsOf(const v1::Job& job) {
  std::vector<Variant> variants;
  for (const std::string& name : VariantNames()) {
    for (const v1::Task& task : job.tasks()) {
      if (task.path() != Join("evaluate/", name)) continue;
      Variant variant{.name = name, .trained = name.rfind("student", 0) != 0};
      for (const v1::Measurement& measurement : task.measurements())
        variant.measurements[measurement.name()] = measurement;
      variants.push_back(std::move(variant));
    }
  }
  return variants;
}

const Variant* FindVariant(const std::vector<Variant>& variants, const std::string& name) {
  for (const Variant& variant : variants)
    if (variant.name == name) return &variant;
  return nullptr;
}

Table SummaryRows(const v1::Job& job) {
  Table table{.header = {"variant", "KL [nats]", "perplexity", "answers right"}, .right = {false, true, true, true}};
  for (const v1::Benchmark& benchmark : job.recipe().evaluate().benchmarks())
    table.header.push_back(benchmark.name() + " acc");
  for (const char* column : {"size", "ms/token", "seeds"}) table.header.push_back(column);
  table.right.resize(table.header.size(), true);
  for (const Variant& variant : VariantsOf(job)) {
    std::vector<std::string> row = {variant.name, ErrorCell(variant, "held_out_kl"),
                                    ErrorCell(variant, "held_out_perplexity"),
                                    ErrorCell(variant, "held_out_answer_accuracy")};
    for (const v1::Benchmark& benchmark : job.recipe().evaluate().benchmarks())
      row.push_back(ErrorCell(variant, benchmark.name() + "/acc"));
    const v1::Measurement* bytes = variant.Find("model_bytes");
    row.push_back(bytes == nullptr ? kNone : Megabytes(bytes->value()));
    const v1::Measurement* latency = variant.Find("ms_per_token");
    row.push_back(latency == nullptr ? kNone : Digits(latency->value(), 3));
    row.push_back(SeedsCell(job, variant));
    // The one that is delivered: recovered, where the recipe asks for it.
    if (variant.name == "refined-gptq" || variant.name == "refined-recovered") table.strong_row = static_cast<int>(table.rows.size());
    table.rows.push_back(std::move(row));
  }
  return table;
}

Table MeasurementRows(const v1::Job& job) {
  // The report prints the recipe with line numbers; here is which line asked for a number.
  v1::Recipe parsed;
  YamlPlaces places;
  (void)YamlToMessage(MessageToYaml(job.recipe()), "recipe", &parsed, &places);
  Table table{.header = {"variant", "measurement", "value", "standard error", "unit", "items", "training seeds",
                         "recipe", "line"},
              .right = {false, false, true, true, false, true, true, false, true}};
  for (const Variant& variant : VariantsOf(job)) {
    for (const auto& [name, measurement] : variant.measurements) {
      const std::string field = FieldOf(job.recipe(), variant, name);
      const int line = places.LineOf(field);
      table.rows.push_back({variant.name, name, Digits(measurement.value(), 6),
                            measurement.standard_error() > 0 ? Digits(measurement.standard_error(), 3) : kNone,
                            UnitText(measurement), Join(measurement.count()), SeedsCell(job, variant), field,
                            line > 0 ? Join(line) : kNone});
    }
  }
  return table;
}

Claim ClaimOf(const v1::Job& job) {
  const std::vector<Variant> variants = VariantsOf(job);
  const std::string what = "Refined + GPTQ has lower held-out KL to the teacher than GPTQ alone: ";
  auto kl = [&](const std::string& name) -> const v1::Measurement* {
    const Variant* variant = FindVariant(variants, name);
    const v1::Measurement* found = variant == nullptr ? nullptr : variant->Find("held_out_kl");
    return found != nullptr && std::isfinite(found->value()) ? found : nullptr;
  };
  const v1::Measurement* refined = kl("refined-gptq");
  const v1::Measurement* plain = kl("student-gptq");
  if (refined == nullptr || plain == nullptr)
    return {.sentence = what + "cannot be said, " + (refined == nullptr ? "refined-gptq" : "student-gptq") +
                        " was not measured."};

  const double difference = plain->value() - refined->value();
  const double error = std::hypot(plain->standard_error(), refined->standard_error());
  const bool errors_known = plain->standard_error() > 0 && refined->standard_error() > 0;
  Claim claim;
  claim.holds = difference > 0 && (!errors_known || difference >= 2 * error);
  const std::string numbers =
      absl::StrFormat("%s against %s nats per token, %s %s", Digits(refined->value(), 4), Digits(plain->value(), 4),
                      difference > 0 ? "lower by" : "higher by", Digits(std::abs(difference), 3));
  std::string verdict = difference > 0 ? "yes. " : "no. ";
  if (errors_known && std::abs(difference) < 2 * error)
    verdict = difference > 0 ? "yes, but within the noise. " : "no, though within the noise. ";
  claim.sentence = what + verdict + numbers;
  if (errors_known) {
    claim.sentence +=
        absl::StrFormat(" = %.1f standard errors of the difference (%s; %s, the two taken as independent).",
                        std::abs(difference) / error, Digits(error, 2), Count(refined->count(), "held-out example"));
  } else {
    claim.sentence += "; standard errors are not known.";
  }
  return claim;
}

std::optional<uint32_t> BestTrial(const v1::Job& job) {
  const v1::Trial* best = nullptr;
  for (const v1::Trial& trial : job.trials()) {
    if (trial.state() != v1::Trial::SUCCEEDED) continue;
    if (best == nullptr || trial.mean() < best->mean() ||
        (trial.mean() == best->mean() && trial.index() < best->index()))
      best = &trial;
  }
  if (best == nullptr) return std::nullopt;
  return best->index();
}

}  // namespace refinery::report
