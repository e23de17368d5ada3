// tests/bench/quantize_benchmark.cc
//
// GPTQ of a real model: seconds by part, peak memory, and perplexity of the model as it is, rounded to nearest, and quantized.
//
//   refinery_quantize_benchmark MODEL CALIBRATION_TEXT TEST_TEXT [--sequences 128] [--length 512] [--bits 4] [--group-size 64]
//                               [--damp 0.01] [--windows 24] [--threads 2] [--skip-rounding]
//                               [--streamed] [--journal DIR] [--bits-budget 3.5] [--alpha 0.25] [--sweeps 2]
//   refinery_quantize_benchmark MODEL - TEST_TEXT --measure [--windows 24]      the perplexity of a folder as it is, nothing else
//
// MODEL is a GGUF file or a Hugging Face folder. Perplexity: consecutive windows of 1,024 tokens, each on its own (23.35 for
// SmolLM2-135M-Instruct on WikiText-2 raw test, 24 windows). Calibration: the first `sequences` x `length` tokens of the text.
// --windows 0 measures no perplexity, so that the peak memory is that of quantizing alone; --streamed reads one layer at a time;
// --journal writes finished modules to that folder instead of keeping them, and goes on from what lies there.
// Fails when GPTQ is not better than rounding.

#include "worker/task/runtime/torch.h"

#include <malloc.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>

#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/mixed_bits.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/runtime/device.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery {
namespace {

constexpr int64_t kWindow = 1024;

class PrintingReporter : public runtime::Reporter {
 public:
  void Report(const runtime::Progress& progress) override {
    std::fprintf(stderr, "\r%s, %.0f tokens/s   ", progress.phase.c_str(), progress.tokens_per_second);
  }
  void Note(const std::string& code, const std::string& text) override {
    if (++notes_[code] <= 3) std::fprintf(stderr, "\n%s: %s\n", code.c_str(), text.c_str());
  }
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {}

 private:
  std::map<std::string, int> notes_;
};

double Perplexity(const model::CausalLm& model, const std::vector<int32_t>& ids, int64_t windows) {
  const at::NoGradGuard no_grad;
  double loss = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < windows && (i + 1) * kWindow <= static_cast<int64_t>(ids.size()); ++i) {
    const std::vector<int64_t> window(ids.begin() + i * kWindow, ids.begin() + (i + 1) * kWindow);
    const at::Tensor tokens = at::tensor(window, at::kLong);
    const at::Tensor hidden = model.Hidden({.token_ids = tokens, .lengths = {kWindow}}).slice(0, 0, kWindow - 1);
    const at::Tensor logits = model.Logits(hidden).to(at::kFloat);
    loss += at::cross_entropy_loss(logits, tokens.slice(0, 1), {}, at::Reduction::Sum).item<double>();
    count += kWindow - 1;
  }
  return std::exp(loss / static_cast<double>(count));
}

struct Arguments {
  std::string model, calibration, test;
  std::map<std::string, double> numbers = {{"--sequences", 128}, {"--length", 512}, {"--bits", 4}, {"--group-size", 64},
                                           {"--damp", 0.01}, {"--windows", 24}, {"--threads", 2},
                                           {"--bits-budget", 0}, {"--alpha", 0}, {"--sweeps", 2}};
  bool skip_rounding = false, streamed = false, measure = false;
  std::string journal;
};

bool Parse(int argc, char** argv, Arguments* arguments) {
  std::vector<std::string> places;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--skip-rounding") {
      arguments->skip_rounding = true;
    } else if (word == "--measure") {
      arguments->measure = true;
    } else if (word == "--streamed") {
      arguments->streamed = true;
    } else if (word == "--journal" && i + 1 < argc) {
      arguments->journal = argv[++i];
    } else if (arguments->numbers.contains(word) && i + 1 < argc) {
      arguments->numbers[word] = std::atof(argv[++i]);
    } else {
      places.push_back(word);
    }
  }
  if (places.size() != 3) return false;
  arguments->model = places[0];
  arguments->calibration = places[1];
  arguments->test = places[2];
  return true;
}

// A folder of any form that loads, GPTQ and compressed-tensors among them.
Status Measure(const Arguments& arguments) {
  runtime::SetThreads(static_cast<int>(arguments.numbers.at("--threads")));
  RF_ASSIGN_OR_RETURN(const auto folder, checkpoint::ModelFolder::Open(arguments.model));
  RF_ASSIGN_OR_RETURN(const auto tokenizer, tokenizer::Tokenizer::Load(arguments.model));
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.test));
  RF_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, tokenizer->Encode(text));
  RF_ASSIGN_OR_RETURN(const auto model, model::CausalLm::Load(*folder, {}));
  std::printf("perplexity as it is  %8.3f\n", Perplexity(*model, ids, static_cast<int64_t>(arguments.numbers.at("--windows"))));
  return absl::OkStatus();
}

Status Run(const Arguments& arguments) {
  const auto number = [&](const char* name) { return static_cast<int64_t>(arguments.numbers.at(name)); };
  runtime::SetThreads(static_cast<int>(number("--threads")));
  const char* home = std::getenv("HOME");
  const std::filesystem::path cache = std::filesystem::path(home == nullptr ? "." : home) / ".cache" / "refinery";
  RF_ASSIGN_OR_RETURN(const auto ref, checkpoint::ImportModel(arguments.model, cache));
  RF_ASSIGN_OR_RETURN(const auto path, checkpoint::ResolveModel(ref, cache));
  RF_ASSIGN_OR_RETURN(const auto folder, checkpoint::ModelFolder::Open(path));
  RF_ASSIGN_OR_RETURN(const auto tokenizer, tokenizer::Tokenizer::Load(path));
  RF_ASSIGN_OR_RETURN(const std::string calibration_text, ReadFile(arguments.calibration));
  RF_ASSIGN_OR_RETURN(const std::string test_text, ReadFile(arguments.test));
  RF_ASSIGN_OR_RETURN(const std::vector<int32_t> calibration_ids, tokenizer->Encode(calibration_text));
  RF_ASSIGN_OR_RETURN(const std::vector<int32_t> test_ids, tokenizer->Encode(test_text));
  std::vector<std::vector<int32_t>> calibration;
  const int64_t length = number("--length");
  for (int64_t i = 0; i < number("--sequences") && (i + 1) * length <= static_cast<int64_t>(calibration_ids.size()); ++i) {
    calibration.emplace_back(calibration_ids.begin() + i * length, calibration_ids.begin() + (i + 1) * length);
  }
  const quantize::GptqSettings settings{.bits = number("--bits"), .group_size = number("--group-size"),
                                        .damp_fraction = arguments.numbers.at("--damp"),
                                        .alpha = arguments.numbers.at("--alpha"),
                                        .refine_sweeps = number("--sweeps")};
  double rounded = INFINITY;
  RF_ASSIGN_OR_RETURN(auto model, model::CausalLm::Load(*folder, {.layers = !arguments.streamed}));
  RF_RETURN_IF_ERROR(quantize::CheckGroupSize(model->config(), settings.bits, settings.group_size));
  if (!arguments.streamed) std::printf("perplexity bf16      %8.3f\n", Perplexity(*model, test_ids, number("--windows")));
  if (!arguments.skip_rounding) {
    quantize::RoundModelToNearest(*model, settings);
    rounded = Perplexity(*model, test_ids, number("--windows"));
    std::printf("perplexity rounded   %8.3f\n", rounded);
    RF_ASSIGN_OR_RETURN(model, model::CausalLm::Load(*folder, {}));
  }
  PrintingReporter reporter;
  // What tokenizing and the model as it is took does not count.
  ::malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << "5";
  std::printf("resident before quantizing %.2f GiB\n", static_cast<double>(runtime::PeakMemoryBytes()) / (1 << 30));
  quantize::QuantizeOptions options;
  if (arguments.streamed) {
    options.layers = [&](int64_t index) {
      return model::CausalLm::LoadLayer(model->config(), index, [&](const std::string& name) { return folder->Get(name); }, {});
    };
  }
  std::optional<quantize::Journal> journal;
  if (!arguments.journal.empty()) {
    const nlohmann::json fingerprint = {{"model", arguments.model}, {"bits", settings.bits}, {"group_size", settings.group_size},
                                        {"sequences", number("--sequences")}};
    RF_ASSIGN_OR_RETURN(journal, quantize::Journal::Open(arguments.journal, fingerprint, reporter));
    options.journal = &*journal;
  }
  quantize::TokenSequences held_out;  // a streamed model is measured along the way
  for (int64_t i = 0; arguments.streamed && i < number("--windows") && (i + 1) * kWindow <= static_cast<int64_t>(test_ids.size()); ++i) {
    held_out.ids.emplace_back(test_ids.begin() + i * kWindow, test_ids.begin() + (i + 1) * kWindow);
  }
  if (!held_out.ids.empty()) options.held_out = &held_out;
  if (arguments.numbers.at("--bits-budget") > 0) {
    quantize::TokenSequences probe{.ids = calibration, .weights = {}};
    probe.ids.resize(std::min<size_t>(probe.ids.size(), 16));
    RF_ASSIGN_OR_RETURN(const auto groups, quantize::MeasureBits(*model, options.layers, probe, settings, {2, 3, 4, 8}, reporter));
    const int64_t budget = quantize::BudgetBytes(groups, {.bits_per_weight = arguments.numbers.at("--bits-budget")});
    RF_ASSIGN_OR_RETURN(const auto chosen, quantize::AllotBits(groups, budget));
    options.bits = quantize::BitsByModule(groups, chosen);
    for (size_t g = 0; g < groups.size(); ++g) {
      std::printf("%s%s %lld", g % 4 == 0 ? "\n" : "  ", groups[g].name.c_str(), static_cast<long long>(groups[g].options[chosen[g]].bits));
    }
    std::printf("\n");
  }
  RF_ASSIGN_OR_RETURN(const quantize::QuantizedModel quantized,
                      quantize::QuantizeModel(*model, {.ids = calibration, .weights = {}}, settings, options, reporter));
  std::fprintf(stderr, "\n");
  const double peak = static_cast<double>(runtime::PeakMemoryBytes()) / (1 << 30);
  if (quantized.held_out) {
    const quantize::HeldOutFigures& f = *quantized.held_out;
    std::printf("held-out perplexity: source %.3f, quantized %.3f, rounded %.3f; KL quantized %.4f, rounded %.4f\n", f.source_perplexity,
                f.quantized_perplexity, f.rounded_perplexity, f.quantized_kl, f.rounded_kl);
  }
  const double perplexity = arguments.streamed ? NAN : Perplexity(*model, test_ids, number("--windows"));
  std::printf("perplexity quantized %8.3f\n", perplexity);
  double error = 0, nearest = 0;
  for (const auto& [name, report] : quantized.reports) {
    error += report.relative_error / static_cast<double>(quantized.reports.size());
    nearest += report.rtn_relative_error / static_cast<double>(quantized.reports.size());
  }
  const quantize::QuantizeTimes& t = quantized.times;
  std::printf("%lld tokens, %lld bits, group size %lld: %.1f s (forward %.1f, Hessians %.1f, solving %.1f, journal %.1f); mean layer error "
              "%.5f, rounded %.5f; %.1f MB; peak memory %.2f GiB\n",
              static_cast<long long>(quantized.calibration_tokens), static_cast<long long>(settings.bits),
              static_cast<long long>(settings.group_size), t.total_seconds, t.forward_seconds, t.hessian_seconds,
              t.solve_seconds, t.journal_seconds, error, nearest, static_cast<double>(quantize::QuantizedBytes(quantized)) / 1e6, peak);
  if (perplexity > rounded) return Internal("GPTQ gave a higher perplexity than rounding");
  return absl::OkStatus();
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) {
  refinery::runtime::KeepFreedPages();
  refinery::Arguments arguments;
  if (!refinery::Parse(argc, argv, &arguments)) {
    std::fprintf(stderr, "usage: refinery_quantize_benchmark MODEL CALIBRATION_TEXT TEST_TEXT [options]\n");
    return 2;
  }
  const refinery::Status status = arguments.measure ? refinery::Measure(arguments) : refinery::Run(arguments);
  if (!status.ok()) std::fprintf(stderr, "%s\n", refinery::Message(status).c_str());
  return status.ok() ? 0 : 1;
}
