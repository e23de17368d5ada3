// worker/task/spec.h
//
// What one run of refinery-task is asked to do, as plain structs: the task's own view of proto/refinery/v1/task.proto, so that
// nothing below the program's adapter (spec_from_json.cc) sees protobuf.

#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "common/status.h"

namespace refinery::task {

// What the delivered model may lose, and the text that says how much it lost.
struct GateSpec {
  double max_kl = 0;              // nats; 0 = no gate
  double max_ppl_ratio = 0;       // 0 = no gate
  int64_t held_out_tokens = 0;    // 0 = not measured
  int64_t sequence_length = 0;    // longer examples are cut
};

struct GptqSpec {
  int64_t bits = 0;               // under a budget the narrowest of `widths`
  int64_t group_size = 0;
  double damp_fraction = 0;
  int64_t calibration_tokens = 0;
  int64_t sequence_length = 0;
  std::string grid;               // words of recipe.proto; "" = the default
  std::string order;
  double alpha = 0;
  double bits_budget = 0;         // bits per weight; 0 = none
  int64_t bytes_budget = 0;
  std::vector<int64_t> widths;    // that layers may get under a budget, ascending
  bool HasBudget() const { return bits_budget > 0 || bytes_budget > 0; }
  GateSpec gate;
  int64_t memory_mib = 0;         // 0 = no bound
  double general_share = 0;
  double duplicate_threshold = 0;  // 0 = the default
  uint64_t calibration_seed = 0;
};

struct ImportModelSpec {
  std::string uri;
  GptqSpec gptq;  // bits 0 = none to check
  std::vector<std::string> formats;
};

struct SynthesizeSpec {
  std::string task;
  std::string description;
  int64_t examples = 0;  // over all shards
  int64_t topics = 0;
  int64_t few_shot = 0;
  double temperature = 0;
  double top_p = 0;
  int64_t max_new_tokens = 0;
  int64_t shard = 0;
  int64_t shards = 1;
  int64_t seed_limit = 0;
  bool structured = false;
};

struct CritiqueSpec {
  std::string task;
  double keep_fraction = 0;
  int64_t seed_limit = 0;
};

struct CurateSpec {
  std::string task;
  double validation_fraction = 0;
  double held_out_fraction = 0;
  double duplicate_threshold = 0;
  int64_t seed_examples = 0;
  int64_t seed_limit = 0;
};

struct TeacherLogitsSpec {
  std::string task;
  std::string system_prompt;
  int64_t few_shot = 0;
  int64_t top_k = 0;
  int64_t seed_limit = 0;
};

struct TrainSpec {
  std::string optimizer;
  double learning_rate = 0;
  double temperature = 0;
  double kl_weight = 0;
  int64_t lora_rank = 0;
  double lora_alpha = 0;
  double weight_decay = 0;
  double momentum = 0;
  double beta1 = 0;
  double beta2 = 0;
  int64_t steps = 0;
  int64_t tokens_per_step = 0;
  int64_t checkpoint_every = 0;
};

struct MergeSpec {
  bool keep_model = false;
};

struct QuantizeSpec {
  GptqSpec gptq;
  std::vector<std::string> formats;  // whose size a budget bounds; none = gptq
};

struct RecoverSpec {
  GateSpec gate;
  int64_t steps = 0;
  int64_t tokens_per_step = 0;
  double learning_rate = 0;       // 0 = by the widths of the quantized layers
  double layer_weight = 0;
  int64_t sequence_length = 0;
  int64_t patience = 0;
  int64_t evaluate_every = 0;
  int64_t checkpoint_every = 0;
};

struct BenchmarkSpec {
  std::string name;
  int64_t limit = 0;  // 0 = all
};

struct EvaluateSpec {
  std::string variant;
  std::vector<BenchmarkSpec> benchmarks;
  int64_t latency_tokens = 0;
  int64_t shard = 0;
  int64_t shards = 1;    // > 1: score only this shard's blocks of the benchmarks' items, or, with `merge`, read what the
  bool merge = false;    // shards found
};

struct ExportSpec {
  std::string name;
  bool merged_model = false;
  std::vector<std::string> formats;
  bool gguf_embeddings_q8_0 = false;
  bool gguf_head_q8_0 = false;
};

using Params = std::variant<ImportModelSpec, SynthesizeSpec, CritiqueSpec, CurateSpec, TeacherLogitsSpec, TrainSpec, MergeSpec,
                            QuantizeSpec, RecoverSpec, EvaluateSpec, ExportSpec>;

struct TaskSpec {
  std::string job;
  std::string path;
  uint64_t seed = 0;
  int threads = 0;  // 0 = the environment's choice
  Params params;
};

// Parses the JSON form of refinery.v1.TaskSpec. INVALID_ARGUMENT naming `name` (the file) and the field.
StatusOr<TaskSpec> TaskSpecFromJson(const std::string& json, const std::string& name);

}  // namespace refinery::task
