#include "worker/task/context.h"

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/limits.h"

namespace refinery::task {
namespace {

std::atomic<bool> stop_requested{false};

void WriteLine(const nlohmann::json& event) {
  std::string line = event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
}

// JSON has no NaN; proto3 JSON writes it as a string.
nlohmann::json Number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return value;
}

}  // namespace

void InstallStopHandler() {
  std::signal(SIGTERM, [](int) { stop_requested = true; });
}

void EventWriter::Report(const runtime::Progress& p) {
  WriteLine({{"progress",
              {{"phase", p.phase},
               {"done", Number(p.done)},
               {"total", Number(p.total)},
               {"loss", Number(p.loss)},
               {"tokens_per_second", Number(p.tokens_per_second)},
               {"tokens_trained", p.tokens_trained},
               {"tokens_generated", p.tokens_generated}}}});
}

void EventWriter::Note(const std::string& code, const std::string& text) {
  WriteLine({{"note", {{"code", code}, {"text", text}}}});
}

void EventWriter::CheckpointReady(const std::string& name, uint64_t step) {
  WriteLine({{"checkpoint", {{"name", name}, {"step", step}}}});
}

void EventWriter::Check() {
  if (stop_requested) throw runtime::CancelledException();
}

void EventWriter::Measure(const Measurement& m) {
  WriteLine({{"measurement",
              {{"name", m.name},
               {"value", Number(m.value)},
               {"standard_error", Number(m.standard_error)},
               {"count", m.count},
               {"unit", m.unit}}}});
}

void EventWriter::Error(const std::string& failure_class, const Status& status) {
  std::string message = Message(status);
  if (message.size() > limits::kMaxErrorBytes) message.resize(limits::kMaxErrorBytes);
  WriteLine({{"error",
              {{"failure_class", failure_class}, {"code", static_cast<int>(status.code())}, {"message", message}}}});
}

bool TaskContext::HasInput(const std::string& name) const { return std::filesystem::is_directory(inputs / name); }

StatusOr<std::filesystem::path> TaskContext::Input(const std::string& name) const {
  if (!HasInput(name)) return NotFound("task ", path, " has no input '", name, "' in ", inputs.string());
  return inputs / name;
}

StatusOr<std::filesystem::path> TaskContext::InputJsonl(const std::string& name) const {
  RF_ASSIGN_OR_RETURN(std::filesystem::path folder, Input(name));
  std::filesystem::path found;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".jsonl" && entry.path().extension() != ".csv") continue;
    if (!found.empty()) return FailedPrecondition("input '", name, "' holds more than one file of rows");
    found = entry.path();
  }
  if (found.empty()) return NotFound("input '", name, "' holds no .jsonl or .csv file");
  return found;
}

}  // namespace refinery::task
