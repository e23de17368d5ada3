#include "server/report/charts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "common/status.h"
#include "server/report/chart.h"
#include "server/report/variants.h"

namespace refinery::report {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr size_t kMaxLines = 8;  // trials drawn in a loss chart; more cannot be told apart

double NumberOr(const nlohmann::json& object, const char* key, double otherwise) {
  auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : otherwise;
}

// The trials that the loss charts show: the best ones, at most kMaxLines, in index order.
std::vector<const v1::Trial*> ShownTrials(const v1::Job& job) {
  std::vector<const v1::Trial*> trials;
  for (const v1::Trial& trial : job.trials()) trials.push_back(&trial);
  auto rank = [](const v1::Trial* t) { return std::pair(t->state() != v1::Trial::SUCCEEDED, t->mean()); };
  std::stable_sort(trials.begin(), trials.end(), [&](auto* a, auto* b) { return rank(a) < rank(b); });
  if (trials.size() > kMaxLines) trials.resize(kMaxLines);
  std::sort(trials.begin(), trials.end(), [](auto* a, auto* b) { return a->index() < b->index(); });
  return trials;
}

// One line per replicate, one colour per trial.
Chart CurveChart(const v1::Job& job, const std::map<std::string, std::string>& curves, double CurvePoint::*value) {
  Chart chart{.x_label = "optimizer step", .x_whole = true};
  size_t color = 0;
  for (const v1::Trial* trial : ShownTrials(job)) {
    bool first = true;
    for (const v1::Replicate& replicate : trial->replicates()) {
      auto it = curves.find(Join("trial/", trial->index(), "/replicate/", replicate.index()));
      if (it == curves.end()) continue;
      Series series{
          .color = SeriesColor(color), .line = true, .dashed = !first, .markers = false, .opacity = first ? 1 : 0.55};
      for (const CurvePoint& point : ParseCurve(it->second))
        if (std::isfinite(point.*value)) series.points.push_back({.x = point.step, .y = point.*value});
      if (series.points.empty()) continue;
      if (first) series.name = Join("trial ", trial->index(), ", ", trial->settings().optimizer());
      first = false;
      chart.series.push_back(std::move(series));
    }
    ++color;
  }
  return chart;
}

}  // namespace

std::vector<CurvePoint> ParseCurve(const std::string& jsonl) {
  std::vector<CurvePoint> points;
  std::istringstream lines(jsonl);
  for (std::string line; std::getline(lines, line);) {
    const nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) continue;
    CurvePoint point{.step = NumberOr(object, "step", kNan),
                     .loss = NumberOr(object, "loss", kNan),
                     .validation_loss = NumberOr(object, "validation_loss", kNan)};
    if (std::isfinite(point.step) && (std::isfinite(point.loss) || std::isfinite(point.validation_loss)))
      points.push_back(point);
  }
  return points;
}

std::string LossChart(const v1::Job& job, const std::map<std::string, std::string>& curves) {
  Chart chart = CurveChart(job, curves, &CurvePoint::loss);
  chart.title = "Training loss per trial (dashed: other seeds)";
  chart.y_label = "loss [nats per token]";
  return ToSvg(chart);
}

std::string ValidationChart(const v1::Job& job, const std::map<std::string, std::string>& curves) {
  Chart chart = CurveChart(job, curves, &CurvePoint::validation_loss);
  chart.title = "Validation loss per trial (dashed: other seeds)";
  chart.y_label = "validation loss [nats per token]";
  bool lines = false;
  for (Series& series : chart.series) {
    series.markers = true;
    lines = lines || series.points.size() > 1;
  }
  return lines ? ToSvg(chart) : "";  // a single value per trial stands in the search chart already
}

std::string SearchChart(const v1::Job& job) {
  Chart chart{.title = "Search progress (bars: one standard error over seeds)",
              .x_label = "trial",
              .y_label = "validation loss [nats per token]",
              .x_whole = true};
  std::vector<const v1::Trial*> trials;
  for (const v1::Trial& trial : job.trials()) trials.push_back(&trial);
  std::sort(trials.begin(), trials.end(), [](auto* a, auto* b) { return a->index() < b->index(); });
  Series best{.name = "best so far", .color = "#52606d", .line = true, .steps = true, .markers = false};
  std::map<std::string, Series> groups;  // optimizer and origin -> points
  Series diverged{.name = "diverged", .color = "#b3541e", .cross = true};
  double lowest = std::numeric_limits<double>::infinity();
  double highest = -lowest;
  for (const v1::Trial* trial : trials) {
    if (trial->state() != v1::Trial::SUCCEEDED) continue;
    lowest = std::min(lowest, trial->mean());
    highest = std::max(highest, trial->mean());
    best.points.push_back({.x = static_cast<double>(trial->index()), .y = lowest});
    const bool modelled = trial->origin() == "expected_improvement";
    Series& group = groups[Join(trial->settings().optimizer(), modelled ? ", model" : ", Sobol")];
    group.hollow = !modelled;
    group.points.push_back(
        {.x = static_cast<double>(trial->index()), .y = trial->mean(), .error = trial->standard_error()});
  }
  for (const v1::Trial* trial : trials)
    if (trial->state() == v1::Trial::INFEASIBLE && std::isfinite(highest))
      diverged.points.push_back({.x = static_cast<double>(trial->index()), .y = highest});
  chart.series.push_back(std::move(best));
  for (auto& [name, group] : groups) {
    group.name = name;
    group.color = SeriesColor(name.rfind("adamw", 0) == 0 ? 1 : 0);
    chart.series.push_back(std::move(group));
  }
  if (!diverged.points.empty()) chart.series.push_back(std::move(diverged));
  return ToSvg(chart);
}

std::string QualityChart(const v1::Job& job, const std::string& measurement, double scale, const std::string& title,
                         const std::string& x_label) {
  Chart chart{.title = title,
              .x_label = x_label,
              .y_label = "held-out KL to the teacher [nats per token]",
              .x_from_zero = true};
  Series plain{.name = "not quantized", .color = SeriesColor(0), .hollow = true};
  Series quantized{.name = "GPTQ", .color = SeriesColor(1)};
  std::set<std::pair<double, double>> seen;
  for (const Variant& variant : VariantsOf(job)) {
    const v1::Measurement* x = variant.Find(measurement);
    const v1::Measurement* kl = variant.Find("held_out_kl");
    if (x == nullptr || kl == nullptr) continue;
    // The best trial of one optimizer is the refined model itself: one point is enough.
    if (!seen.insert({kl->value(), kl->standard_error()}).second && variant.name.rfind("best-", 0) == 0) continue;
    (variant.name.ends_with("-gptq") || variant.name.ends_with("-recovered") ? quantized : plain)
        .points.push_back(
            {.x = x->value() * scale, .y = kl->value(), .error = kl->standard_error(), .label = variant.name});
  }
  for (Series* series : {&plain, &quantized})
    if (!series->points.empty()) chart.series.push_back(std::move(*series));
  return ToSvg(chart);
}

}  // namespace refinery::report
