// tests/bench/recover_benchmark.cc
//
// Recovery of a real model: perplexity and KL to the source of the model as it is, quantized, and recovered, on text like that
// which it was tuned on and on text of another domain; the share of the perplexity gap that was closed; seconds and memory.
//
//   refinery_recover_benchmark MODEL TRAIN_TEXT TEST_TEXT OTHER_TEXT [--sequences 64] [--length 512] [--bits 4]
//                              [--group-size 64] [--steps N] [--tokens N] [--tuned-length 512] [--rate R] [--norm-rate R]
//                              [--decay D] [--layer-weight W] [--patience N] [--windows 24] [--threads 2] [--artifact FOLDER]
//
// MODEL is a GGUF file or a Hugging Face folder. GPTQ sees the first `sequences` x `length` tokens of TRAIN_TEXT; with --artifact
// its result is stored in that folder, and read from there when it exists. Recovery sees all of TRAIN_TEXT but its end, which is
// held out. Perplexity: consecutive windows of 1,024 tokens, each on its own; KL over the same positions, logits in float32.
// Fails when less than 60 % of the gap is closed on TEST_TEXT, less than 40 % on OTHER_TEXT, or a KL did not fall.

#include "worker/task/runtime/torch.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/recover/recover.h"
#include "worker/task/runtime/device.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery {
namespace {

constexpr int64_t kWindow = 1024;
constexpr int64_t kHeldOut = 8;  // sequences

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class PrintingReporter : public runtime::Reporter {
 public:
  void Report(const runtime::Progress& p) override {
    std::fprintf(stderr, "\r%s %.0f/%.0f, KL %.4f, %.0f tokens/s   ", p.phase.c_str(), p.done, p.total, p.loss, p.tokens_per_second);
  }
  void Note(const std::string& code, const std::string& text) override {
    if (++notes_[code] <= 3) std::fprintf(stderr, "\n%s: %s\n", code.c_str(), text.c_str());
  }
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {}

 private:
  std::map<std::string, int> notes_;
};

struct Arguments {
  std::vector<std::string> places;  // model, train, test, other
  std::string artifact;
  std::map<std::string, double> numbers = {{"--sequences", 64}, {"--length", 512},   {"--bits", 4},    {"--group-size", 64},
                                           {"--windows", 24},   {"--threads", 2},    {"--steps", 0},   {"--tokens", 0},
                                           {"--rate", 0},       {"--norm-rate", -1}, {"--decay", -1},  {"--tuned-length", 512},
                                           {"--patience", -1},  {"--every", 0},      {"--layer-weight", -1}};
};

bool Parse(int argc, char** argv, Arguments* arguments) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--artifact" && i + 1 < argc) {
      arguments->artifact = argv[++i];
    } else if (arguments->numbers.contains(word) && i + 1 < argc) {
      arguments->numbers[word] = std::atof(argv[++i]);
    } else {
      arguments->places.push_back(word);
    }
  }
  return arguments->places.size() == 4;
}

struct Score {
  double perplexity = 0, kl = 0;
};

// The windows of one text and the source's hidden states for them.
class Text {
 public:
  Text(const model::CausalLm& source, const std::vector<int32_t>& ids, int64_t windows) {
    const at::NoGradGuard no_grad;
    for (int64_t i = 0; i < windows && (i + 1) * kWindow <= static_cast<int64_t>(ids.size()); ++i) {
      const std::vector<int64_t> window(ids.begin() + i * kWindow, ids.begin() + (i + 1) * kWindow);
      windows_.push_back(at::tensor(window, at::kLong));
      states_.push_back(source.Hidden({.token_ids = windows_.back(), .lengths = {kWindow}}));
    }
  }

  Score Measure(const model::CausalLm& model) const {
    const at::NoGradGuard no_grad;
    double loss = 0, kl = 0, count = 0;
    for (size_t i = 0; i < windows_.size(); ++i) {
      const at::Tensor hidden = model.Hidden({.token_ids = windows_[i], .lengths = {kWindow}});
      for (int64_t begin = 0; begin < kWindow - 1; begin += 256) {
        const int64_t rows = std::min<int64_t>(256, kWindow - 1 - begin);
        const at::Tensor head = model.lm_head.to(at::kFloat);
        const at::Tensor log_q = at::linear(hidden.narrow(0, begin, rows).to(at::kFloat), head).log_softmax(1);
        const at::Tensor log_p = at::linear(states_[i].narrow(0, begin, rows).to(at::kFloat), head).log_softmax(1);
        loss -= log_q.gather(1, windows_[i].narrow(0, begin + 1, rows).unsqueeze(1)).sum(at::kDouble).item<double>();
        kl += (log_p.exp() * (log_p - log_q)).sum(at::kDouble).item<double>();
        count += static_cast<double>(rows);
      }
    }
    return {std::exp(loss / count), kl / count};
  }

 private:
  std::vector<at::Tensor> windows_, states_;
};

std::vector<std::vector<int32_t>> Cut(const std::vector<int32_t>& ids, int64_t length, int64_t count) {
  std::vector<std::vector<int32_t>> sequences;
  for (int64_t i = 0; (count == 0 || i < count) && (i + 1) * length <= static_cast<int64_t>(ids.size()); ++i) {
    sequences.emplace_back(ids.begin() + i * length, ids.begin() + (i + 1) * length);
  }
  return sequences;
}

// The model's own folder; `model` gets the quantized weights.
StatusOr<quantize::QuantizedModel> Quantized(const Arguments& arguments, model::CausalLm& model,
                                             const std::vector<int32_t>& train) {
  if (!arguments.artifact.empty() && std::filesystem::exists(arguments.artifact)) {
    return quantize::LoadQuantized(arguments.artifact);
  }
  const auto number = [&](const char* name) { return static_cast<int64_t>(arguments.numbers.at(name)); };
  const quantize::GptqSettings settings{.bits = number("--bits"), .group_size = number("--group-size")};
  RF_RETURN_IF_ERROR(quantize::CheckGroupSize(model.config(), settings.bits, settings.group_size));
  PrintingReporter reporter;
  quantize::QuantizedModel quantized =
      quantize::QuantizeModel(model, Cut(train, number("--length"), number("--sequences")), settings, reporter);
  std::fprintf(stderr, "\n");
  if (!arguments.artifact.empty()) RF_RETURN_IF_ERROR(quantize::SaveQuantized(quantized, arguments.artifact));
  return quantized;
}

recover::RecoverSettings SettingsOf(const Arguments& arguments) {
  recover::RecoverSettings settings;
  const auto& n = arguments.numbers;
  if (n.at("--steps") > 0) settings.steps = static_cast<int64_t>(n.at("--steps"));
  if (n.at("--tokens") > 0) settings.tokens_per_step = static_cast<int64_t>(n.at("--tokens"));
  settings.learning_rate = settings.norm_learning_rate = n.at("--bits") < 4 ? 4e-3 : 2.5e-3;  // as recipes do
  if (n.at("--rate") > 0) settings.learning_rate = n.at("--rate");
  if (n.at("--norm-rate") >= 0) settings.norm_learning_rate = n.at("--norm-rate");
  if (n.at("--decay") >= 0) settings.weight_decay = n.at("--decay");
  if (n.at("--layer-weight") >= 0) settings.layer_weight = n.at("--layer-weight");
  if (n.at("--patience") >= 0) settings.patience = static_cast<int64_t>(n.at("--patience"));
  if (n.at("--every") > 0) settings.evaluate_every = static_cast<int64_t>(n.at("--every"));
  return settings;
}

Status Compare(const char* name, const Score& source, const Score& before, const Score& after, double bound) {
  const double closed = (before.perplexity - after.perplexity) / (before.perplexity - source.perplexity);
  std::printf("%-6s perplexity bf16 %.3f, quantized %.3f, recovered %.3f: %.1f %% of the gap closed (bound %.0f %%); "
              "KL quantized %.4f, recovered %.4f\n",
              name, source.perplexity, before.perplexity, after.perplexity, 100 * closed, 100 * bound, before.kl, after.kl);
  std::fflush(stdout);
  if (!(closed >= bound)) return Internal(name, ": recovery closed ", 100 * closed, " % of the gap");
  if (!(after.kl < before.kl)) return Internal(name, ": the KL to the source did not fall");
  return absl::OkStatus();
}

struct Inputs {
  std::shared_ptr<model::CausalLm> source;
  std::shared_ptr<checkpoint::ModelFolder> folder;
  std::vector<int32_t> train, test, other;
};

StatusOr<Inputs> Load(const Arguments& arguments) {
  const char* home = std::getenv("HOME");
  const std::filesystem::path cache = std::filesystem::path(home == nullptr ? "." : home) / ".cache" / "refinery";
  RF_ASSIGN_OR_RETURN(const auto ref, checkpoint::ImportModel(arguments.places[0], cache));
  RF_ASSIGN_OR_RETURN(const auto path, checkpoint::ResolveModel(ref, cache));
  Inputs inputs;
  RF_ASSIGN_OR_RETURN(inputs.folder, checkpoint::ModelFolder::Open(path));
  RF_ASSIGN_OR_RETURN(const auto tokenizer, tokenizer::Tokenizer::Load(path));
  for (const auto& [place, ids] : {std::pair(1, &inputs.train), std::pair(2, &inputs.test), std::pair(3, &inputs.other)}) {
    RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.places[static_cast<size_t>(place)]));
    RF_ASSIGN_OR_RETURN(*ids, tokenizer->Encode(text));
  }
  RF_ASSIGN_OR_RETURN(inputs.source, model::CausalLm::Load(*inputs.folder, {}));
  return inputs;
}

Status Run(const Arguments& arguments) {
  const auto number = [&](const char* name) { return static_cast<int64_t>(arguments.numbers.at(name)); };
  runtime::SetThreads(static_cast<int>(number("--threads")));
  RF_ASSIGN_OR_RETURN(const Inputs inputs, Load(arguments));
  RF_ASSIGN_OR_RETURN(auto model, model::CausalLm::Load(*inputs.folder, {}));
  RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, Quantized(arguments, *model, inputs.train));
  RF_RETURN_IF_ERROR(quantize::ApplyQuantized(*model, quantized));
  const Text test(*inputs.source, inputs.test, number("--windows")), other(*inputs.source, inputs.other, number("--windows"));
  const Score source_test = test.Measure(*inputs.source), source_other = other.Measure(*inputs.source);
  const Score before_test = test.Measure(*model), before_other = other.Measure(*model);
  std::printf("bf16 %.3f %.3f; quantized %.3f %.3f\n", source_test.perplexity, source_other.perplexity, before_test.perplexity,
              before_other.perplexity);
  std::fflush(stdout);
  recover::RecoverInputs tuning{.source = inputs.source.get(), .train = Cut(inputs.train, number("--tuned-length"), 0), .seed = 1};
  tuning.validation.assign(tuning.train.end() - kHeldOut, tuning.train.end());
  tuning.train.resize(tuning.train.size() - kHeldOut);
  PrintingReporter reporter;
  const double begin = Now();
  RF_ASSIGN_OR_RETURN(const recover::RecoverResult result,
                      recover::Recover(tuning, SettingsOf(arguments), {}, reporter, &quantized));
  const double seconds = Now() - begin;
  std::fprintf(stderr, "\n");
  for (const recover::RecoverPoint& point : result.curve) std::printf("step %lld KL %.4f; ", static_cast<long long>(point.step), point.kl);
  std::printf("\n%lld steps, %llu tokens in %.1f s, best at step %lld; peak memory %.2f GiB\n", static_cast<long long>(result.steps),
              static_cast<unsigned long long>(result.tokens), seconds, static_cast<long long>(result.best_step),
              static_cast<double>(runtime::PeakMemoryBytes()) / (1 << 30));
  RF_RETURN_IF_ERROR(quantize::ApplyQuantized(*model, quantized));
  const Status similar = Compare("test", source_test, before_test, test.Measure(*model), 0.6);
  const Status different = Compare("other", source_other, before_other, other.Measure(*model), 0.4);
  RF_RETURN_IF_ERROR(similar);
  return different;
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) {
  refinery::Arguments arguments;
  if (!refinery::Parse(argc, argv, &arguments)) {
    std::fprintf(stderr, "usage: refinery_recover_benchmark MODEL TRAIN_TEXT TEST_TEXT OTHER_TEXT [options]\n");
    return 2;
  }
  refinery::runtime::KeepFreedPages();
  const refinery::Status status = refinery::Run(arguments);
  if (!status.ok()) std::fprintf(stderr, "%s\n", refinery::Message(status).c_str());
  return status.ok() ? 0 : 1;
}
