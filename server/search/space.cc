#include "server/search/space.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "common/recipe.h"
#include "common/status.h"

namespace refinery::search {
namespace {

double RoundToFourDigits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return std::strtod(text, nullptr);
}

double Get(const v1::TrialSettings& settings, const std::string& name) {
  if (name == "learning_rate") return settings.learning_rate();
  if (name == "temperature") return settings.temperature();
  if (name == "kl_weight") return settings.kl_weight();
  return settings.lora_rank();
}

void Set(const std::string& name, double value, v1::TrialSettings* settings) {
  if (name == "learning_rate") {
    settings->set_learning_rate(value);
  } else if (name == "temperature") {
    settings->set_temperature(value);
  } else if (name == "kl_weight") {
    settings->set_kl_weight(value);
  } else {
    // The adapter's scale lora_alpha / rank stays as the recipe has it.
    settings->set_lora_alpha(settings->lora_alpha() / settings->lora_rank() * value);
    settings->set_lora_rank(static_cast<uint32_t>(value));
  }
}

}  // namespace

Space::Space(const v1::Recipe& recipe)
    : distill_(recipe.distill()), recipe_optimizer_(recipe.distill().optimizer().has_adamw() ? "adamw" : "muon") {
  for (const v1::Parameter& parameter : recipe.search().parameters()) {
    Axis axis{.name = parameter.name(), .min = parameter.min(), .max = parameter.max(), .log = parameter.log()};
    axis.choices.assign(parameter.choices().begin(), parameter.choices().end());
    if (!axis.choices.empty()) categorical_axis_ = Axes();
    axis.whole = axis.name == "lora_rank";
    // A whole number owns the half unit on both of its sides.
    axis.low = axis.min - (axis.whole ? 0.5 : 0.0);
    axis.high = axis.max + (axis.whole ? 0.5 : 0.0);
    if (axis.log) {
      axis.low = std::log(axis.low);
      axis.high = std::log(axis.high);
    }
    axes_.push_back(std::move(axis));
  }
}

int Space::Choices() const {
  return categorical_axis_ < 0 ? 1 : static_cast<int>(axes_[categorical_axis_].choices.size());
}

double Space::Size() const {
  double size = 1;
  for (const Axis& axis : axes_) {
    if (!axis.choices.empty()) {
      size *= static_cast<double>(axis.choices.size());
    } else {
      size *= axis.whole ? axis.max - axis.min + 1 : std::numeric_limits<double>::infinity();
    }
  }
  return size;
}

v1::TrialSettings Space::Settings(const std::string& optimizer) const {
  v1::Recipe defaults;
  if (optimizer == recipe_optimizer_) *defaults.mutable_distill()->mutable_optimizer() = distill_.optimizer();
  if (optimizer == "adamw") defaults.mutable_distill()->mutable_optimizer()->mutable_adamw();
  FillDefaults(&defaults);

  v1::TrialSettings settings;
  settings.set_optimizer(optimizer);
  settings.set_temperature(distill_.temperature());
  settings.set_kl_weight(distill_.kl_weight());
  settings.set_lora_rank(distill_.lora().rank());
  settings.set_lora_alpha(distill_.lora().lora_alpha());
  if (optimizer == "adamw") {
    const v1::AdamW& adamw = defaults.distill().optimizer().adamw();
    settings.set_learning_rate(adamw.learning_rate());
    settings.set_weight_decay(adamw.weight_decay());
    settings.set_beta1(adamw.beta1());
    settings.set_beta2(adamw.beta2());
  } else {
    const v1::Muon& muon = defaults.distill().optimizer().muon();
    settings.set_learning_rate(muon.learning_rate());
    settings.set_weight_decay(muon.weight_decay());
    settings.set_momentum(muon.momentum());
  }
  return settings;
}

v1::TrialSettings Space::Decode(const std::vector<double>& uniform) const {
  RF_CHECK(uniform.size() == axes_.size());
  std::string optimizer = recipe_optimizer_;
  if (categorical_axis_ >= 0) {
    const auto& choices = axes_[categorical_axis_].choices;
    const auto index = static_cast<size_t>(uniform[categorical_axis_] * static_cast<double>(choices.size()));
    optimizer = choices[std::min(index, choices.size() - 1)];
  }
  v1::TrialSettings settings = Settings(optimizer);
  for (int i = 0; i < Axes(); ++i) {
    const Axis& axis = axes_[i];
    if (IsCategorical(i)) continue;
    double value = axis.low + uniform[i] * (axis.high - axis.low);
    if (axis.log) value = std::exp(value);
    value = axis.whole ? std::round(value) : RoundToFourDigits(value);
    Set(axis.name, std::clamp(value, axis.min, axis.max), &settings);
  }
  return settings;
}

Eigen::VectorXd Space::Encode(const v1::TrialSettings& settings) const {
  Eigen::VectorXd point(Axes());
  for (int i = 0; i < Axes(); ++i) {
    const Axis& axis = axes_[i];
    if (IsCategorical(i)) {
      auto it = std::find(axis.choices.begin(), axis.choices.end(), settings.optimizer());
      point[i] = static_cast<double>(it - axis.choices.begin());
    } else {
      const double value = Get(settings, axis.name);
      point[i] = ((axis.log ? std::log(value) : value) - axis.low) / (axis.high - axis.low);
    }
  }
  return point;
}

bool SameSettings(const v1::TrialSettings& a, const v1::TrialSettings& b) {
  return a.optimizer() == b.optimizer() && a.learning_rate() == b.learning_rate() &&
         a.temperature() == b.temperature() && a.kl_weight() == b.kl_weight() && a.lora_rank() == b.lora_rank();
}

}  // namespace refinery::search
