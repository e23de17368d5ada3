#include "worker/task/train/curve.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "common/files.h"

namespace refinery::train {
namespace {

using nlohmann::json;

// Sets *value from a number field; false where there is none.
template <typename T>
bool Read(const json& object, const char* key, T* value) {
  const auto field = object.find(key);
  if (field == object.end() || !field->is_number()) return false;
  *value = field->get<T>();
  return true;
}

}  // namespace

Status WriteCurve(const std::vector<CurvePoint>& curve, const std::filesystem::path& path) {
  std::string text;
  for (const CurvePoint& point : curve) {
    nlohmann::ordered_json line = {{"step", point.step},
                                   {"loss", point.loss},
                                   {"kl", point.kl},
                                   {"cross_entropy", point.cross_entropy},
                                   {"learning_rate", point.learning_rate},
                                   {"tokens", point.tokens},
                                   {"seconds", point.seconds}};
    if (point.validation_loss.has_value()) line["validation_loss"] = *point.validation_loss;
    text += line.dump() + "\n";
  }
  return WriteFileAtomically(path, text);
}

StatusOr<std::vector<CurvePoint>> ReadCurve(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<CurvePoint> curve;
  std::istringstream lines(text);
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
    CurvePoint point;
    const bool complete = object.is_object() && Read(object, "step", &point.step) &&
                          Read(object, "loss", &point.loss) && Read(object, "kl", &point.kl) &&
                          Read(object, "cross_entropy", &point.cross_entropy) &&
                          Read(object, "learning_rate", &point.learning_rate) &&
                          Read(object, "tokens", &point.tokens) && Read(object, "seconds", &point.seconds);
    if (!complete) return DataLoss(path.string(), ":", number, ": not a point of a training curve");
    double validation_loss = 0;
    if (Read(object, "validation_loss", &validation_loss)) point.validation_loss = validation_loss;
    curve.push_back(point);
  }
  return curve;
}

}  // namespace refinery::train
