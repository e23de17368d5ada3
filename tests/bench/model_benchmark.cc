// tests/bench/model_benchmark.cc
//
// Times of the generation engine on a real model, one case a run; prints one line of JSON.
//
//   refinery_model_benchmark MODEL decode  [--batch 1] [--prompt 32] [--new 128]      seconds per token after the prompt
//   refinery_model_benchmark MODEL prefill [--prompt 2048]                            seconds until the first token
//   refinery_model_benchmark MODEL prefix  [--requests 64] [--prompt 500] [--own 16]  with and without sharing the prefix
//   refinery_model_benchmark MODEL import                                             the imported folder
//   refinery_model_benchmark -     memory                                             bytes per second that the machine reads
//   refinery_model_benchmark -     int4                                               our 4-bit product and LibTorch's
//
// with [--threads 2] [--repeat 3] [--dtype bfloat16]; decode takes [--share 1] to set the bytes of weights read per second against the
// memory's read bandwidth, measured in the same run. MODEL is a GGUF file or a Hugging Face folder (16 bit or GPTQ). Prompts are fixed token
// ids below 1,000, so that a peer can run the same. "seconds" is the median of the repeats, "peak_bytes" the process's own.

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include "worker/task/checkpoint/import.h"
#include "worker/task/generate/engine.h"
#include "worker/task/generate/packed_product.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/model/weight_arena.h"
#include "worker/task/runtime/device.h"

namespace refinery {
namespace {

using Clock = std::chrono::steady_clock;

struct Arguments {
  std::string model, mode, dtype = "bfloat16";
  std::map<std::string, int64_t> numbers = {{"--batch", 1},    {"--prompt", 0}, {"--new", 128},   {"--requests", 64},
                                            {"--own", 16},     {"--threads", 2}, {"--repeat", 3}, {"--share", 0}};
  int64_t operator[](const std::string& name) const { return numbers.at(name); }
};

double Seconds(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Token `index` of prompt `which`: the same numbers in every language.
int32_t PromptToken(int64_t which, int64_t index) { return static_cast<int32_t>(10 + (which * 7919 + index * 104729) % 990); }

std::vector<int32_t> Prompt(int64_t which, int64_t length) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < length; ++i) ids.push_back(PromptToken(which, i));
  return ids;
}

generate::Request GreedyRequest(std::vector<int32_t> prompt, int64_t new_tokens) {
  return {.prompt = std::move(prompt), .max_new_tokens = new_tokens, .sampling = {.temperature = 0}};
}

double Generate(const std::shared_ptr<const model::CausalLm>& lm, int64_t max_batch, const std::vector<generate::Request>& requests) {
  runtime::NullReporter quiet;
  generate::Engine engine(lm, {.max_batch = max_batch});
  const Clock::time_point start = Clock::now();
  const auto done = engine.Generate(requests, quiet);
  TORCH_CHECK(done.ok(), std::string(done.status().message()));
  return Seconds(start);
}

// The difference of two lengths of text leaves the decoding alone.
double DecodeSeconds(const std::shared_ptr<const model::CausalLm>& lm, const Arguments& a) {
  std::vector<generate::Request> shorter, longer;
  for (int64_t i = 0; i < a["--batch"]; ++i) {
    shorter.push_back(GreedyRequest(Prompt(i, a["--prompt"]), 1));
    longer.push_back(GreedyRequest(Prompt(i, a["--prompt"]), 1 + a["--new"]));
  }
  const double all = Generate(lm, a["--batch"], longer);
  return (all - Generate(lm, a["--batch"], shorter)) / static_cast<double>(a["--new"]);
}

std::vector<generate::Request> PrefixRequests(const Arguments& a, bool shared) {
  std::vector<generate::Request> requests;
  for (int64_t i = 0; i < a["--requests"]; ++i) {
    std::vector<int32_t> prompt = Prompt(0, a["--prompt"]);
    // A different first token is the same work without a common prefix.
    if (!shared) prompt.front() = static_cast<int32_t>(1000 + i);
    for (int32_t token : Prompt(i + 1, a["--own"])) prompt.push_back(token);
    requests.push_back(GreedyRequest(std::move(prompt), 1));
  }
  return requests;
}

// Bytes per second that all threads together read of 256 MiB, the best of several times; in the pages that weights lie in.
double ReadBandwidth(int64_t threads) {
  constexpr size_t kWords = size_t{32} << 20;
  static model::WeightArena arena;
  static const at::Tensor buffer = arena.Empty({static_cast<int64_t>(kWords)}, at::kLong).fill_(1);
  const int64_t* memory = buffer.const_data_ptr<int64_t>();
  std::vector<int64_t> sums(static_cast<size_t>(threads) * 8);
  std::vector<double> times;
  for (int r = 0; r < 5; ++r) {
    const Clock::time_point start = Clock::now();
    std::vector<std::thread> readers;
    for (int64_t t = 0; t < threads; ++t) {
      readers.emplace_back([&, t] {
        int64_t a = 0, b = 0, c = 0, d = 0;
        const size_t end = kWords * static_cast<size_t>(t + 1) / static_cast<size_t>(threads) / 32 * 32;
        for (size_t i = kWords * static_cast<size_t>(t) / static_cast<size_t>(threads) / 32 * 32; i < end; i += 32) {
          for (size_t j = 0; j < 32; j += 4) {
            a += memory[i + j];
            b += memory[i + j + 1];
            c += memory[i + j + 2];
            d += memory[i + j + 3];
          }
        }
        sums[static_cast<size_t>(t) * 8] = a + b + c + d;
      });
    }
    for (std::thread& reader : readers) reader.join();
    times.push_back(Seconds(start));
  }
  TORCH_CHECK(sums[0] > 0);
  return static_cast<double>(kWords * sizeof(int64_t)) / *std::ranges::min_element(times);
}

// What a decoding step reads of the weights.
int64_t WeightBytes(const model::CausalLm& lm) {
  size_t bytes = lm.lm_head.nbytes();
  for (const model::DecoderLayer& layer : lm.layers) {
    for (const model::Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      bytes += linear->packed != nullptr ? static_cast<size_t>(linear->packed->bytes()) : linear->weight.nbytes();
    }
  }
  return static_cast<int64_t>(bytes);
}

// Seconds of y = x W^T for one row of x and 48 layers of [1536, 576] weights in groups of 64 (more than the caches hold), on one thread.
nlohmann::json CompareInt4() {
  constexpr int64_t kLayers = 48, kOutputs = 1536, kInputs = 576, kGroup = 64;
  at::set_num_threads(1);
  const at::Tensor x = at::randn({1, kInputs}).to(at::kBFloat16);
  model::WeightArena arena;
  std::vector<std::shared_ptr<const model::PackedWeight>> ours;
  std::vector<at::Tensor> theirs, scales_and_zeros;
  for (int64_t i = 0; i < kLayers; ++i) {
    auto packed = std::make_shared<model::PackedWeight>();
    packed->outputs = kOutputs;
    packed->inputs = kInputs;
    packed->group_size = kGroup;
    packed->bits = 4;
    packed->codes = arena.Empty({kOutputs, packed->chunks() * 32}, at::kByte).random_(0, 256);
    packed->scales = arena.Empty({kOutputs, packed->groups()}, at::kHalf).fill_(0.01);
    ours.push_back(std::move(packed));
    theirs.push_back(at::_convert_weight_to_int4pack_for_cpu(at::randint(16, {kOutputs, kInputs}, at::kInt), 1));
    scales_and_zeros.push_back(at::full({kInputs / kGroup, kOutputs, 2}, 0.01, at::kBFloat16));
  }
  const at::Tensor y = at::empty({1, kOutputs});
  std::vector<double> mine, libtorch;
  for (int r = 0; r < 15; ++r) {
    Clock::time_point start = Clock::now();
    for (const auto& w : ours) {
      kernels::PackedProduct({static_cast<const simd::Bf16*>(x.const_data_ptr()), 1,
                              {w->codes.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(w->scales.const_data_ptr()), nullptr,
                               kInputs, kGroup, 1, 4},
                              nullptr, y.data_ptr<float>(), kOutputs, false},
                             0, kOutputs);
    }
    mine.push_back(Seconds(start) / kLayers);
    start = Clock::now();
    for (size_t i = 0; i < theirs.size(); ++i) at::_weight_int4pack_mm_for_cpu(x, theirs[i], kGroup, scales_and_zeros[i]);
    libtorch.push_back(Seconds(start) / kLayers);
  }
  return {{"seconds", Median(mine)}, {"seconds_libtorch", Median(libtorch)}};
}

StatusOr<std::filesystem::path> Folder(const std::string& model) {
  const char* home = std::getenv("HOME");
  const std::filesystem::path cache = std::filesystem::path(home == nullptr ? "/tmp" : home) / ".cache" / "refinery";
  RF_ASSIGN_OR_RETURN(checkpoint::ModelRef ref, checkpoint::ImportModel(model, cache));
  return checkpoint::ResolveModel(ref, cache);
}

StatusOr<std::shared_ptr<const model::CausalLm>> Open(const Arguments& a) {
  RF_ASSIGN_OR_RETURN(const std::filesystem::path path, Folder(a.model));
  RF_ASSIGN_OR_RETURN(auto folder, checkpoint::ModelFolder::Open(path));
  return model::CausalLm::Load(*folder, {.dtype = a.dtype == "float32" ? at::kFloat : at::kBFloat16, .keep_packed = true});
}

StatusOr<nlohmann::json> Run(Arguments a) {
  runtime::SetThreads(static_cast<int>(a["--threads"]));
  if (a.mode == "memory") return nlohmann::json{{"bytes_per_second", ReadBandwidth(a["--threads"])}};
  if (a.mode == "int4") return CompareInt4();
  if (a.mode == "import") {
    RF_ASSIGN_OR_RETURN(const std::filesystem::path folder, Folder(a.model));
    return nlohmann::json{{"folder", folder.string()}};
  }
  RF_ASSIGN_OR_RETURN(const auto lm, Open(a));
  if (a["--prompt"] == 0) a.numbers["--prompt"] = a.mode == "decode" ? 32 : a.mode == "prefill" ? 2048 : 500;
  std::vector<double> times, others, shares;
  for (int64_t r = 0; r < a["--repeat"]; ++r) {
    if (a.mode == "decode") {
      // Neighbours on the machine change its bandwidth from second to second: it is measured before and after.
      const double before = a["--share"] != 0 ? ReadBandwidth(a["--threads"]) : 0;
      times.push_back(DecodeSeconds(lm, a));
      if (a["--share"] != 0) {
        const double bandwidth = (before + ReadBandwidth(a["--threads"])) / 2;
        shares.push_back(static_cast<double>(WeightBytes(*lm)) / times.back() / bandwidth);
      }
    } else if (a.mode == "prefill") {
      times.push_back(Generate(lm, 1, {GreedyRequest(Prompt(0, a["--prompt"]), 1)}));
    } else if (a.mode == "prefix") {
      times.push_back(Generate(lm, 16, PrefixRequests(a, true)));
      others.push_back(Generate(lm, 16, PrefixRequests(a, false)));
    } else {
      return InvalidArgument("no such case: ", a.mode);
    }
  }
  nlohmann::json result = {{"case", a.mode}, {"seconds", Median(times)}, {"peak_bytes", runtime::PeakMemoryBytes()}};
  if (!shares.empty()) result["share_of_read_bandwidth"] = Median(shares);
  if (!others.empty()) result["seconds_without_sharing"] = Median(others);
  return result;
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) {
  refinery::Arguments arguments;
  std::vector<std::string> places;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--dtype" && i + 1 < argc) {
      arguments.dtype = argv[++i];
    } else if (arguments.numbers.contains(word) && i + 1 < argc) {
      arguments.numbers[word] = std::atoll(argv[++i]);
    } else {
      places.push_back(word);
    }
  }
  if (places.size() != 2) {
    std::fprintf(stderr, "usage: refinery_model_benchmark MODEL decode|prefill|prefix|memory [--batch N] ... (see the source)\n");
    return 2;
  }
  arguments.model = places[0];
  arguments.mode = places[1];
  const auto result = refinery::Run(arguments);
  if (!result.ok()) {
    std::fprintf(stderr, "refinery_model_benchmark: %s\n", std::string(result.status().message()).c_str());
    return 1;
  }
  std::printf("%s\n", result->dump().c_str());
  return 0;
}
