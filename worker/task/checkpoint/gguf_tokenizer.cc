#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/gguf_tokenizer.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

namespace refinery::checkpoint {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

enum TokenType : int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

// The regular expressions of the models' own tokenizer.json files.
constexpr char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class Family { kGpt2, kSmolLm, kQwen2, kLlama3 };

std::optional<Family> FamilyOf(std::string_view pre) {
  if (pre == "gpt-2" || pre == "default") return Family::kGpt2;
  if (pre == "smollm") return Family::kSmolLm;
  if (pre == "qwen2" || pre == "deepseek-r1-qwen") return Family::kQwen2;
  if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") return Family::kLlama3;
  return std::nullopt;
}

json ByteLevel(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

json PreTokenizer(Family family) {
  auto split = [](const char* pattern) -> json {
    return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
  };
  json steps = json::array();
  switch (family) {
    case Family::kGpt2: return ByteLevel(true);
    case Family::kSmolLm:
      steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
      steps.push_back(ByteLevel(true));
      break;
    case Family::kQwen2:
      steps.push_back(split(kQwen2Pattern));
      steps.push_back(ByteLevel(false));
      break;
    case Family::kLlama3:
      steps.push_back(split(kLlama3Pattern));
      steps.push_back(ByteLevel(false));
      break;
  }
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

// Reads the vocabulary of one GGUF file.
class Vocabulary {
 public:
  static StatusOr<Vocabulary> Read(const GgufFile& file) {
    Vocabulary result(file);
    std::string name = file.path().string();
    std::string_view model = file.String("tokenizer.ggml.model").value_or("");
    if (model != "gpt2")
      return InvalidArgument(name, ": the tokenizer kind \"", model,
                             "\" is not supported in GGUF files (byte-level BPE, \"gpt2\", is); use the model's "
                             "Hugging Face folder instead");
    std::string_view pre = file.String("tokenizer.ggml.pre").value_or("default");
    std::optional<Family> family = FamilyOf(pre);
    if (!family)
      return InvalidArgument(name, ": the pre-tokenizer \"", pre,
                             "\" is not supported (gpt-2, smollm, qwen2, llama-bpe are); use the model's Hugging Face "
                             "folder instead");
    result.family = *family;
    result.tokens = file.Strings("tokenizer.ggml.tokens");
    result.merges = file.Strings("tokenizer.ggml.merges");
    result.types = file.Ints("tokenizer.ggml.token_type");
    if (result.tokens == nullptr || result.tokens->empty() || result.merges == nullptr)
      return DataLoss(name, ": tokenizer.ggml.tokens or tokenizer.ggml.merges is missing");
    if (result.types != nullptr && result.types->size() != result.tokens->size())
      return DataLoss(name, ": ", result.types->size(), " token types for ", result.tokens->size(), " tokens");
    return result;
  }

  int64_t TypeOf(size_t id) const { return types == nullptr ? int64_t{kNormal} : (*types)[id]; }

  // The text of the token that the metadata field `key` points to; "" when there is none.
  StatusOr<std::string> SpecialToken(const char* key) const {
    std::optional<int64_t> id = file->Int(Join("tokenizer.ggml.", key));
    if (!id) return std::string();
    if (*id < 0 || static_cast<uint64_t>(*id) >= tokens->size())
      return DataLoss(file->path().string(), ": tokenizer.ggml.", key, " is ", *id, " of ", tokens->size(), " tokens");
    if (TypeOf(static_cast<size_t>(*id)) == kUnused) return std::string();
    return std::string((*tokens)[static_cast<size_t>(*id)]);
  }

  bool AddsBos() const { return file->Bool("tokenizer.ggml.add_bos_token").value_or(family == Family::kLlama3); }
  bool AddsEos() const { return file->Bool("tokenizer.ggml.add_eos_token").value_or(false); }

  const GgufFile* file;
  Family family = Family::kGpt2;
  const std::vector<std::string_view>* tokens = nullptr;
  const std::vector<std::string_view>* merges = nullptr;
  const std::vector<int64_t>* types = nullptr;

 private:
  explicit Vocabulary(const GgufFile& f) : file(&f) {}
};

StatusOr<json> BpeModel(const Vocabulary& vocabulary) {
  std::string name = vocabulary.file->path().string();
  json ids = json::object();
  for (size_t id = 0; id < vocabulary.tokens->size(); ++id) {
    if (vocabulary.TypeOf(id) == kUnused) continue;
    if (!ids.emplace(std::string((*vocabulary.tokens)[id]), id).second)
      return DataLoss(name, ": the token with id ", id, " stands twice in the vocabulary");
  }
  json merges = json::array();
  for (size_t i = 0; i < vocabulary.merges->size(); ++i) {
    std::string_view merge = (*vocabulary.merges)[i];
    size_t blank = merge.find(' ', 1);
    if (blank == std::string_view::npos || merge.find(' ', blank + 1) != std::string_view::npos)
      return DataLoss(name, ": merge ", i, " is not two tokens with a blank between");
    std::string left(merge.substr(0, blank)), right(merge.substr(blank + 1));
    if (!ids.contains(left) || !ids.contains(right) || !ids.contains(left + right))
      return DataLoss(name, ": merge ", i, " names a token that is not in the vocabulary");
    merges.push_back(std::string(merge));
  }
  return json{{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr}, {"fuse_unk", false}, {"byte_fallback", false},
              // Llama 3 takes a word that is in the vocabulary as it stands, also where no merges reach it.
              {"ignore_merges", vocabulary.family == Family::kLlama3}, {"vocab", ids}, {"merges", merges}};
}

json AddedTokens(const Vocabulary& vocabulary) {
  json added = json::array();
  for (size_t id = 0; id < vocabulary.tokens->size(); ++id) {
    int64_t type = vocabulary.TypeOf(id);
    if (type != kControl && type != kUserDefined && type != kUnknown) continue;
    if ((*vocabulary.tokens)[id].empty()) continue;
    added.push_back({{"id", id}, {"content", std::string((*vocabulary.tokens)[id])}, {"single_word", false},
                     {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", type != kUserDefined}});
  }
  return added;
}

// The post-processor that puts BOS and EOS around a text; null when there is nothing to put.
json PostProcessor(const json& ids, const std::string& bos, const std::string& eos) {
  if (bos.empty() && eos.empty()) return nullptr;
  auto special = [](const std::string& token, int type) -> json {
    return {{"SpecialToken", {{"id", token}, {"type_id", type}}}};
  };
  auto around = [&](const char* which, int type) {
    json pieces = json::array();
    if (!bos.empty()) pieces.push_back(special(bos, type));
    pieces.push_back({{"Sequence", {{"id", which}, {"type_id", type}}}});
    if (!eos.empty()) pieces.push_back(special(eos, type));
    return pieces;
  };
  json pair = around("A", 0);
  for (const json& piece : around("B", 1)) pair.push_back(piece);
  json known = json::object();
  for (const std::string& token : {bos, eos})
    if (!token.empty())
      known[token] = {{"id", token}, {"ids", json::array({ids.at(token)})}, {"tokens", json::array({token})}};
  return {{"type", "TemplateProcessing"}, {"single", around("A", 0)}, {"pair", pair}, {"special_tokens", known}};
}

}  // namespace

StatusOr<TokenizerFiles> TokenizerFromGguf(const GgufFile& file) {
  RF_ASSIGN_OR_RETURN(Vocabulary vocabulary, Vocabulary::Read(file));
  RF_ASSIGN_OR_RETURN(json model, BpeModel(vocabulary));
  ordered_json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
  RF_ASSIGN_OR_RETURN(std::string bos, vocabulary.SpecialToken("bos_token_id"));
  RF_ASSIGN_OR_RETURN(std::string eos, vocabulary.SpecialToken("eos_token_id"));
  RF_ASSIGN_OR_RETURN(std::string unknown, vocabulary.SpecialToken("unknown_token_id"));
  RF_ASSIGN_OR_RETURN(std::string padding, vocabulary.SpecialToken("padding_token_id"));
  bool add_bos = vocabulary.AddsBos() && !bos.empty(), add_eos = vocabulary.AddsEos() && !eos.empty();
  config["add_bos_token"] = add_bos;
  config["add_eos_token"] = add_eos;
  if (!bos.empty()) config["bos_token"] = bos;
  if (!eos.empty()) config["eos_token"] = eos;
  if (!unknown.empty()) config["unk_token"] = unknown;
  if (!padding.empty()) config["pad_token"] = padding;
  std::optional<std::string_view> architecture = file.String("general.architecture");
  if (architecture)
    if (std::optional<int64_t> length = file.Int(Join(*architecture, ".context_length")))
      config["model_max_length"] = *length;
  if (std::optional<std::string_view> text = file.String("tokenizer.chat_template"))
    config["chat_template"] = std::string(*text);

  ordered_json tokenizer = {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}};
  tokenizer["added_tokens"] = AddedTokens(vocabulary);
  tokenizer["normalizer"] = vocabulary.family == Family::kQwen2 ? json{{"type", "NFC"}} : json(nullptr);
  tokenizer["pre_tokenizer"] = PreTokenizer(vocabulary.family);
  tokenizer["post_processor"] = PostProcessor(model.at("vocab"), add_bos ? bos : "", add_eos ? eos : "");
  tokenizer["decoder"] = ByteLevel(true);
  tokenizer["model"] = std::move(model);
  return TokenizerFiles{tokenizer.dump(), config.dump(2) + "\n"};
}

}  // namespace refinery::checkpoint
