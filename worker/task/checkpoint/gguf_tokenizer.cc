#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/gguf_tokenizer.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace refinery::checkpoint {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr size_t kMaxPieceBytes = 1024;  // longer pieces are found as added tokens or never

enum TokenType : int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

// The regular expressions of the models' own tokenizer.json files.
constexpr char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class Family { kGpt2, kSmolLm, kQwen2, kLlama3, kSentencePiece };

constexpr char kBlank[] = "\u2581";  // SentencePiece writes a blank as U+2581

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
    case Family::kSentencePiece: return nullptr;  // the normalizer has done it all
  }
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

// Reads the vocabulary of one GGUF file.
class Vocabulary {
 public:
  static StatusOr<Vocabulary> Read(const GgufFile& file) {
    Vocabulary result(file);
    std::string name = file.path().string();
    RF_ASSIGN_OR_RETURN(result.family, FamilyIn(file));
    result.tokens = file.Strings("tokenizer.ggml.tokens");
    result.merges = file.Strings("tokenizer.ggml.merges");
    result.types = file.Ints("tokenizer.ggml.token_type");
    auto scores = file.metadata().find("tokenizer.ggml.scores");
    if (scores != file.metadata().end()) result.scores = std::get_if<std::vector<double>>(&scores->second);
    if (result.tokens == nullptr || result.tokens->empty()) return DataLoss(name, ": tokenizer.ggml.tokens is missing");
    if (result.IsSentencePiece() ? result.scores == nullptr : result.merges == nullptr)
      return DataLoss(name, ": tokenizer.ggml.", result.IsSentencePiece() ? "scores" : "merges", " is missing");
    if (result.IsSentencePiece() && result.scores->size() != result.tokens->size())
      return DataLoss(name, ": tokenizer.ggml.scores holds ", result.scores->size(), " scores for ",
                      result.tokens->size(), " tokens");
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

  bool IsSentencePiece() const { return family == Family::kSentencePiece; }
  // Without a word about it: Llama 3 and SentencePiece models begin with BOS, the others do not.
  bool AddsBos() const {
    return file->Bool("tokenizer.ggml.add_bos_token").value_or(family == Family::kLlama3 || IsSentencePiece());
  }
  bool AddsSpacePrefix() const { return file->Bool("tokenizer.ggml.add_space_prefix").value_or(true); }
  bool AddsEos() const { return file->Bool("tokenizer.ggml.add_eos_token").value_or(false); }

  const GgufFile* file;
  Family family = Family::kGpt2;
  const std::vector<std::string_view>* tokens = nullptr;
  const std::vector<std::string_view>* merges = nullptr;
  const std::vector<int64_t>* types = nullptr;
  const std::vector<double>* scores = nullptr;

 private:
  static StatusOr<Family> FamilyIn(const GgufFile& file) {
    std::string name = file.path().string();
    std::string_view model = file.String("tokenizer.ggml.model").value_or("");
    if (model == "llama") return Family::kSentencePiece;
    if (model != "gpt2")
      return InvalidArgument(name, ": tokenizer.ggml.model \"", model,
                             "\" is not supported (byte-level BPE, \"gpt2\", and SentencePiece BPE, \"llama\", are); "
                             "use the model's Hugging Face folder instead");
    std::string_view pre = file.String("tokenizer.ggml.pre").value_or("default");
    std::optional<Family> family = FamilyOf(pre);
    if (family) return *family;
    return InvalidArgument(name, ": the pre-tokenizer \"", pre,
                           "\" of tokenizer.ggml.pre is not supported (gpt-2, default, smollm, qwen2, llama-bpe are); "
                           "use the model's Hugging Face folder instead");
  }
  explicit Vocabulary(const GgufFile& f) : file(&f) {}
};

StatusOr<json> Ids(const Vocabulary& vocabulary) {
  json ids = json::object();
  for (size_t id = 0; id < vocabulary.tokens->size(); ++id) {
    if (vocabulary.TypeOf(id) == kUnused) continue;
    if (!ids.emplace(std::string((*vocabulary.tokens)[id]), id).second)
      return DataLoss(vocabulary.file->path().string(), ": the token with id ", id,
                      " of tokenizer.ggml.tokens stands twice in the vocabulary");
  }
  return ids;
}

StatusOr<json> BpeModel(const Vocabulary& vocabulary) {
  std::string name = vocabulary.file->path().string();
  RF_ASSIGN_OR_RETURN(json ids, Ids(vocabulary));
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

// The places at which a UTF-8 text may be cut in two.
std::vector<size_t> Cuts(std::string_view text) {
  std::vector<size_t> cuts;
  for (size_t i = 1; i < text.size(); ++i)
    if ((static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) cuts.push_back(i);
  return cuts;
}

// SentencePiece joins the neighbours whose joint piece has the highest score. As a list of merges: every cut of every
// piece into two pieces, by falling score; equal scores in the order of Hugging Face's conversion (longer left piece,
// longer right piece, then the ids of piece, left and right).
StatusOr<json> SentencePieceModel(const Vocabulary& vocabulary, const std::string& unknown) {
  RF_ASSIGN_OR_RETURN(json ids, Ids(vocabulary));
  struct Merge {
    double score;
    size_t left_size, right_size, id, left, right;  // sizes in code points
  };
  auto is_piece = [&](size_t id) { return vocabulary.TypeOf(id) == kNormal || vocabulary.TypeOf(id) == kUserDefined; };
  std::unordered_map<std::string_view, size_t> pieces;
  for (size_t id = 0; id < vocabulary.tokens->size(); ++id)
    if (is_piece(id)) pieces.emplace((*vocabulary.tokens)[id], id);
  std::vector<Merge> merges;
  bool bytes = false;
  for (size_t id = 0; id < vocabulary.tokens->size(); ++id) {
    bytes = bytes || vocabulary.TypeOf(id) == kByte;
    if (!is_piece(id)) continue;
    std::string_view piece = (*vocabulary.tokens)[id];
    double score = (*vocabulary.scores)[id];
    if (std::isnan(score))
      return DataLoss(vocabulary.file->path().string(), ": tokenizer.ggml.scores[", id, "] is not a number");
    if (piece.size() > kMaxPieceBytes) continue;
    std::vector<size_t> cuts = Cuts(piece);
    for (size_t i = 0; i < cuts.size(); ++i) {
      auto left = pieces.find(piece.substr(0, cuts[i])), right = pieces.find(piece.substr(cuts[i]));
      if (left != pieces.end() && right != pieces.end())
        merges.push_back({score, i + 1, cuts.size() - i, id, left->second, right->second});
    }
  }
  std::sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tuple(-a.score, -static_cast<int64_t>(a.left_size), -static_cast<int64_t>(a.right_size), a.id, a.left,
                      a.right) < std::tuple(-b.score, -static_cast<int64_t>(b.left_size),
                                            -static_cast<int64_t>(b.right_size), b.id, b.left, b.right);
  });
  json pairs = json::array();
  for (const Merge& merge : merges)
    pairs.push_back(json::array(
        {std::string((*vocabulary.tokens)[merge.left]), std::string((*vocabulary.tokens)[merge.right])}));
  return json{{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", unknown.empty() ? json(nullptr) : json(unknown)},
              {"continuing_subword_prefix", nullptr}, {"end_of_word_suffix", nullptr}, {"fuse_unk", true},
              {"byte_fallback", bytes}, {"ignore_merges", false}, {"vocab", ids}, {"merges", pairs}};
}

json Normalizer(const Vocabulary& vocabulary) {
  if (vocabulary.family == Family::kQwen2) return {{"type", "NFC"}};
  if (!vocabulary.IsSentencePiece()) return nullptr;
  json steps = json::array();
  if (vocabulary.AddsSpacePrefix()) steps.push_back({{"type", "Prepend"}, {"prepend", kBlank}});
  steps.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kBlank}});
  return {{"type", "Sequence"}, {"normalizers", steps}};
}

json Decoder(const Vocabulary& vocabulary) {
  if (!vocabulary.IsSentencePiece()) return ByteLevel(true);
  json steps = json::array({{{"type", "Replace"}, {"pattern", {{"String", kBlank}}}, {"content", " "}},
                            {{"type", "ByteFallback"}},
                            {{"type", "Fuse"}}});
  if (vocabulary.AddsSpacePrefix())
    steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  return {{"type", "Sequence"}, {"decoders", steps}};
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
  ordered_json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
  RF_ASSIGN_OR_RETURN(std::string bos, vocabulary.SpecialToken("bos_token_id"));
  RF_ASSIGN_OR_RETURN(std::string eos, vocabulary.SpecialToken("eos_token_id"));
  RF_ASSIGN_OR_RETURN(std::string unknown, vocabulary.SpecialToken("unknown_token_id"));
  RF_ASSIGN_OR_RETURN(std::string padding, vocabulary.SpecialToken("padding_token_id"));
  json model;
  if (vocabulary.IsSentencePiece()) {
    RF_ASSIGN_OR_RETURN(model, SentencePieceModel(vocabulary, unknown));
  } else {
    RF_ASSIGN_OR_RETURN(model, BpeModel(vocabulary));
  }
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
  tokenizer["normalizer"] = Normalizer(vocabulary);
  tokenizer["pre_tokenizer"] = PreTokenizer(vocabulary.family);
  tokenizer["post_processor"] = PostProcessor(model.at("vocab"), add_bos ? bos : "", add_eos ? eos : "");
  tokenizer["decoder"] = Decoder(vocabulary);
  tokenizer["model"] = std::move(model);
  return TokenizerFiles{tokenizer.dump(), config.dump(2) + "\n"};
}

std::optional<std::string_view> GgufPreTokenizer(const json& tokenizer) {
  // What splits: the steps without trim_offsets, which moves offsets only; a single step is a list of one.
  const auto steps = [](json pre) {
    if (pre.value("type", "") == "Sequence") pre = pre.value("pretokenizers", json::array());
    if (!pre.is_array()) pre = json::array({pre});
    for (json& step : pre)
      if (step.is_object()) step.erase("trim_offsets");
    return pre;
  };
  if (!tokenizer.contains("pre_tokenizer") || !tokenizer["pre_tokenizer"].is_object()) return std::nullopt;
  const json wanted = steps(tokenizer["pre_tokenizer"]);
  for (const auto& [family, name] : {std::pair{Family::kGpt2, "gpt-2"}, std::pair{Family::kSmolLm, "smollm"},
                                     std::pair{Family::kQwen2, "qwen2"}, std::pair{Family::kLlama3, "llama-bpe"}})
    if (steps(PreTokenizer(family)) == wanted) return name;
  return std::nullopt;
}

}  // namespace refinery::checkpoint
