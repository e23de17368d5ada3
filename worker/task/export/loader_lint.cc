#include "worker/task/export/loader_lint.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace refinery::exporting {
namespace {

struct Layer {
  const char* name;
  int64_t out, in;
};

std::vector<Layer> LayersOf(const model::ModelConfig& c, bool head) {
  const int64_t q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim, h = c.hidden_size, i = c.intermediate_size;
  std::vector<Layer> layers = {{"self_attn.q_proj", q, h}, {"self_attn.k_proj", kv, h}, {"self_attn.v_proj", kv, h},
                               {"self_attn.o_proj", h, q}, {"mlp.gate_proj", i, h},     {"mlp.up_proj", i, h},
                               {"mlp.down_proj", h, i}};
  if (head) layers.push_back({"lm_head", c.vocab_size, h});
  return layers;
}

// What is wrong with the settings; empty if nothing is.
using Rule = std::function<std::string(const model::ModelConfig&, const QuantSettings&)>;

std::vector<int64_t> Widths(const QuantSettings& s) {
  std::vector<int64_t> widths = s.mixed;
  widths.push_back(s.bits);
  std::sort(widths.begin(), widths.end());
  widths.erase(std::unique(widths.begin(), widths.end()), widths.end());
  return widths;
}

bool IsMixed(const QuantSettings& s) { return Widths(s).size() > 1; }

std::string FirstOf(std::initializer_list<std::string> problems) {
  for (const std::string& problem : problems)
    if (!problem.empty()) return problem;
  return "";
}

// compressed-tensors holds single layers of 2 and 3 bits as 4; a whole model of them it does not.
QuantSettings Widened(QuantSettings s) {
  if (!IsMixed(s)) return s;
  for (int64_t& bits : s.mixed) bits = std::max<int64_t>(bits, 4);
  s.bits = std::max<int64_t>(s.bits, 4);
  return s;
}

std::string BitsProblem(const QuantSettings& s, std::initializer_list<int64_t> known, const char* words) {
  for (const int64_t bits : Widths(s))
    if (std::find(known.begin(), known.end(), bits) == known.end()) return Join(bits, " bits: ", words);
  return "";
}

// Inputs and outputs must be multiples.
std::string SizeProblem(const model::ModelConfig& c, const QuantSettings& s, int64_t in_unit, int64_t out_unit) {
  for (const Layer& layer : LayersOf(c, s.head)) {
    if (layer.in % in_unit != 0) return Join(layer.name, " has ", layer.in, " inputs, not a multiple of ", in_unit);
    if (layer.out % out_unit != 0) return Join(layer.name, " has ", layer.out, " outputs, not a multiple of ", out_unit);
  }
  return "";
}

std::string RaggedProblem(const model::ModelConfig& c, const QuantSettings& s) {
  if (s.group_size == -1) return "";
  for (const Layer& layer : LayersOf(c, s.head))
    if (layer.in % s.group_size != 0)
      return Join(layer.name, " has ", layer.in, " inputs, which groups of ", s.group_size, " do not divide");
  return "";
}

std::string HeadProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return s.head && c.tie_word_embeddings ? "the head is tied to the embeddings and cannot be quantized alone" : "";
}

std::string GptqProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({BitsProblem(s, {2, 3, 4, 8}, "the format has 2, 3, 4 and 8"), HeadProblem(c, s), SizeProblem(c, s, 32, 32)});
}

std::string TransformersGptqProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({GptqProblem(c, s),
                  IsMixed(s) ? "layers of several widths: optimum reads no 'dynamic'; load it with GPTQModel itself" : "",
                  s.head ? "optimum leaves lm_head as it is; load it with GPTQModel itself" : "", RaggedProblem(c, s)});
}

std::string MarlinGroupProblem(const QuantSettings& s) {
  for (const int64_t size : {-1, 32, 64, 128})
    if (s.group_size == size) return "";
  return Join("groups of ", s.group_size, ": the kernel has 32, 64, 128 and one group a row");
}

std::string MarlinProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({BitsProblem(s, {4, 8}, "the kernel has 4 and 8"), s.symmetric ? "" : "zero points: the kernel has none",
                  MarlinGroupProblem(s), RaggedProblem(c, s), GptqProblem(c, s)});
}

std::string ExllamaProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({GptqProblem(c, s), s.group_size == -1 ? "one group a row: the kernel wants a group size" : "",
                  RaggedProblem(c, s), IsMixed(s) ? "layers of several widths" : ""});
}

std::string CompressedTensorsProblem(const model::ModelConfig& c, const QuantSettings& settings) {
  const QuantSettings s = Widened(settings);
  return FirstOf({BitsProblem(s, {4, 8}, "how 2 and 3 bits are packed differs between versions of compressed-tensors"),
                  s.act_order ? "a permuted g_idx: the format is giving it up" : "", HeadProblem(c, s), RaggedProblem(c, s),
                  SizeProblem(c, s, 32, 32)});
}

std::string CompressedMarlinProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({CompressedTensorsProblem(c, s), MarlinGroupProblem(s)});
}

std::string GgufRemark(const model::ModelConfig&, const QuantSettings& s) {
  if (const std::string problem = GgufBlockProblem(s); !problem.empty())
    return Join(problem, ": no block type holds them; weights of 16 bits (F16) instead");
  if (!s.symmetric) return "Q4_1 holds -zero * scale, which is rounded to float16";
  const std::vector<int64_t> widths = Widths(s);
  return *std::min_element(widths.begin(), widths.end()) < 4 ? "2 and 3 bits stand as 4, the same weights" : "";
}

std::string GgufProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({BitsProblem(s, {2, 3, 4, 8}, "the codes have 2, 3, 4 and 8"), HeadProblem(c, s), SizeProblem(c, s, 32, 1)});
}

// Why a model cannot stand in GGUF whatever its settings.
std::string GgufModelProblem(const model::ModelConfig& c) {
  const model::RopeScaling& rope = c.rope_scaling;
  if (rope.type == "dynamic") return "rotary scaling 'dynamic' has no place in GGUF";
  if (rope.type == "yarn" && (rope.attention_factor || rope.mscale != 0 || !rope.truncate || rope.beta_fast != 32 || rope.beta_slow != 1))
    return "YaRN with factors of its own has no place in GGUF";
  if (c.architecture == "Qwen3ForCausalLM" && c.attention_bias) return "llama.cpp's qwen3 has no biases";
  return "";
}

std::string GgufWholeProblem(const model::ModelConfig& c, const QuantSettings& s) {
  return FirstOf({GgufModelProblem(c), GgufProblem(c, s)});
}

std::string MarlinRemark(const model::ModelConfig& c, const QuantSettings& s) {
  if (!SizeProblem(c, s, 128, 64).empty()) return "older versions, and tensor parallelism, want inputs of a multiple of 128, outputs of 64";
  return "";
}

struct Loader {
  Format format;
  const char* name;
  Rule problem;
  Rule remark;
};

std::string NoRemark(const model::ModelConfig&, const QuantSettings&) { return ""; }

std::vector<Loader> LoadersOf(Format format) {
  const Rule fp16 = [](const auto&, const auto&) { return std::string("in float16 only"); };
  const Rule zeros = [](const auto&, const QuantSettings& s) {
    return std::string(s.symmetric ? "" : "zero points: only where the metadata names a quantizer that it trusts");
  };
  switch (format) {
    case Format::kGptq:
      return {{format, "transformers + gptqmodel", TransformersGptqProblem, zeros},
              {format, "GPTQModel", GptqProblem, zeros},
              {format, "vLLM (Marlin)", MarlinProblem, MarlinRemark},
              {format, "vLLM (Exllama)", ExllamaProblem, fp16}};
    case Format::kGptqV2:
      return {{format, "transformers + gptqmodel", TransformersGptqProblem, NoRemark},
              {format, "GPTQModel", GptqProblem, NoRemark},
              {format, "vLLM (Exllama)", ExllamaProblem, fp16}};
    case Format::kCompressedTensors:
      return {{format, "transformers + compressed-tensors", CompressedTensorsProblem, NoRemark},
              {format, "vLLM (Marlin)", CompressedMarlinProblem, MarlinRemark}};
    case Format::kGguf:
      return {{format, "llama.cpp", GgufWholeProblem, GgufRemark}};
  }
  return {};
}

std::string SettingsText(const QuantSettings& wanted, const QuantSettings& s) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (Widths(s) != Widths(wanted)) {
    std::string widths;
    for (const int64_t bits : Widths(s)) widths += Join(widths.empty() ? "" : ", ", bits);
    add(IsMixed(s) ? "widths " + widths : widths + (IsMixed(wanted) ? " bits in every layer" : " bits"));
  }
  if (s.symmetric != wanted.symmetric) add("symmetric");
  if (s.act_order != wanted.act_order) add("columns in their order");
  if (s.head != wanted.head) add("the head not quantized");
  if (s.group_size != wanted.group_size) add(s.group_size == -1 ? "one group a row" : Join("group size ", s.group_size));
  return text;
}

// The mean of the widths, on a logarithmic axis.
double MeanWidth(const QuantSettings& s) {
  const std::vector<int64_t> widths = Widths(s);
  double sum = 0;
  for (const int64_t bits : widths) sum += std::log2(static_cast<double>(bits));
  return sum / static_cast<double>(widths.size());
}

// How far two settings lie apart: widths first, then zero points and order, then the group size.
double Distance(const QuantSettings& a, const QuantSettings& b) {
  const auto size = [](int64_t group) { return group == -1 ? 12.0 : std::log2(static_cast<double>(group)); };
  return 100 * std::abs(MeanWidth(a) - MeanWidth(b)) + (IsMixed(a) != IsMixed(b) ? 80 : 0) + (a.symmetric != b.symmetric ? 30 : 0) + (a.act_order != b.act_order ? 20 : 0) +
         (a.head != b.head ? 20 : 0) + std::abs(size(a.group_size) - size(b.group_size));
}

std::string NearestTo(const model::ModelConfig& config, const QuantSettings& wanted, const Rule& problem) {
  const QuantSettings* best = nullptr;
  std::vector<QuantSettings> all;
  std::vector<std::vector<int64_t>> widths = {Widths(wanted)};
  if (IsMixed(wanted)) widths.push_back({4, 8});
  for (const int64_t bits : {4, 3, 8, 2}) widths.push_back({bits});
  for (const std::vector<int64_t>& bits : widths) {
    for (const int64_t group : {wanted.group_size, int64_t{-1}, int64_t{16}, int64_t{32}, int64_t{64}, int64_t{128}}) {
      for (const bool keep : {true, false}) {
        QuantSettings s = wanted;
        s.bits = bits.front();
        s.mixed.assign(bits.begin() + 1, bits.end());
        s.group_size = group;
        all.push_back(s);
        if (keep) continue;
        s.symmetric = true;
        s.act_order = s.head = false;
        all.push_back(s);
        s.symmetric = wanted.symmetric;
        all.push_back(s);
      }
    }
  }
  for (const QuantSettings& s : all)
    if (problem(config, s).empty() && (best == nullptr || Distance(wanted, s) < Distance(wanted, *best))) best = &s;
  return best == nullptr ? "" : SettingsText(wanted, *best);
}

}  // namespace

std::string GgufBlockProblem(const QuantSettings& s) {
  const auto wide = [](int64_t bits) { return bits == 8; };
  const std::vector<int64_t> widths = Widths(s);
  return FirstOf({s.act_order ? "a permuted g_idx" : "",
                  !s.symmetric && std::any_of(widths.begin(), widths.end(), wide) ? "zero points with 8 bits" : "",
                  s.group_size != -1 && s.group_size % 32 != 0 ? Join("groups of ", s.group_size) : ""});
}

std::string_view FormatName(Format format) {
  switch (format) {
    case Format::kGptq: return "gptq";
    case Format::kGptqV2: return "gptq_v2";
    case Format::kCompressedTensors: return "compressed_tensors";
    case Format::kGguf: return "gguf";
  }
  return "";
}

StatusOr<Format> FormatOf(std::string_view name) {
  for (const Format format : {Format::kGptq, Format::kGptqV2, Format::kCompressedTensors, Format::kGguf})
    if (FormatName(format) == name) return format;
  return InvalidArgument("the export format '", name, "' is not known; known: gptq, gptq_v2, compressed_tensors, gguf");
}

StatusOr<std::vector<Format>> FormatsOf(const std::vector<std::string>& names) {
  std::vector<Format> formats;
  for (const std::string& name : names) {
    RF_ASSIGN_OR_RETURN(const Format format, FormatOf(name));
    if (std::find(formats.begin(), formats.end(), format) == formats.end()) formats.push_back(format);
  }
  return formats;
}

std::vector<Verdict> LintLoaders(const model::ModelConfig& config, const QuantSettings& settings,
                                 const std::vector<Format>& formats) {
  std::vector<Verdict> verdicts;
  for (const Format format : formats) {
    for (const Loader& loader : LoadersOf(format)) {
      Verdict verdict{.format = format, .loader = loader.name, .why = loader.problem(config, settings)};
      verdict.accepts = verdict.why.empty();
      if (verdict.accepts) {
        verdict.why = loader.remark(config, settings);
      } else {
        verdict.nearest = NearestTo(config, settings, loader.problem);
      }
      verdicts.push_back(std::move(verdict));
    }
  }
  return verdicts;
}

Status CheckFormat(const model::ModelConfig& config, const QuantSettings& settings, Format format) {
  const Rule problem = format == Format::kGguf                ? Rule(GgufWholeProblem)
                       : format == Format::kCompressedTensors ? Rule(CompressedTensorsProblem)
                                                              : Rule(GptqProblem);
  const std::string why = problem(config, settings);
  if (why.empty()) return absl::OkStatus();
  const std::string nearest = NearestTo(config, settings, problem);
  return InvalidArgument("the format ", FormatName(format), " cannot hold these settings: ", why,
                         nearest.empty() ? "; leave it out of export.formats" : Join("; nearest: ", nearest));
}

std::string LintTable(const std::vector<Verdict>& verdicts) {
  std::vector<std::vector<std::string>> rows = {{"format", "loader", "loads", "why", "nearest"}};
  for (const Verdict& v : verdicts)
    rows.push_back({std::string(FormatName(v.format)), v.loader, v.accepts ? "yes" : "no", v.why, v.nearest});
  std::vector<size_t> widths(rows[0].size(), 0);
  for (const auto& row : rows)
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string text;
  for (auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      row[i].resize(widths[i], ' ');
      line += (i == 0 ? "" : "  ") + row[i];
    }
    line.resize(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

}  // namespace refinery::exporting
