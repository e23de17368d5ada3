#include "worker/task/export/gguf_vocabulary.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "common/files.h"
#include "worker/task/checkpoint/gguf_tokenizer.h"

namespace refinery::exporting {
namespace {

using nlohmann::json;

enum TokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

constexpr float kNoScore = -1e9f;  // of pieces that no merge makes: never joined

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::unordered_map<std::string, int32_t> ids;
};

StatusOr<json> ReadJson(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object()) return DataLoss(path.string(), " is not a JSON object");
  return value;
}

// An empty object when there is no such file.
StatusOr<json> ReadJsonIfThere(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return json::object();
  return ReadJson(path);
}

bool IsByteToken(const std::string& text) { return text.size() == 6 && text.starts_with("<0x") && text.back() == '>'; }

StatusOr<Vocabulary> ReadVocabulary(const std::string& file, const json& tokenizer, int64_t size, bool sentence_piece) {
  Vocabulary v;
  v.tokens.resize(static_cast<size_t>(size));
  v.types.assign(static_cast<size_t>(size), kUnused);
  const auto put = [&](const std::string& text, int64_t id, TokenType type) -> Status {
    if (id < 0 || id >= size) return DataLoss(file, ": the token '", text, "' has the id ", id, ", but there are ", size, " embeddings");
    v.tokens[static_cast<size_t>(id)] = text;
    v.types[static_cast<size_t>(id)] = type;
    v.ids[text] = static_cast<int32_t>(id);
    return absl::OkStatus();
  };
  const json& model = tokenizer.at("model");
  const std::string unknown = model.value("unk_token", json()).is_string() ? model.at("unk_token").get<std::string>() : "";
  for (const auto& [text, id] : model.at("vocab").items()) {
    const TokenType type = !sentence_piece ? kNormal : text == unknown ? kUnknown : IsByteToken(text) ? kByte : kNormal;
    RF_RETURN_IF_ERROR(put(text, id.get<int64_t>(), type));
  }
  for (const json& added : tokenizer.value("added_tokens", json::array())) {
    const std::string text = added.at("content");
    const TokenType type = sentence_piece && text == unknown ? kUnknown : added.value("special", false) ? kControl : kUserDefined;
    RF_RETURN_IF_ERROR(put(text, added.at("id").get<int64_t>(), type));
  }
  for (size_t id = 0; id < v.tokens.size(); ++id)
    if (v.types[id] == kUnused) v.tokens[id] = Join("[PAD", id, "]");
  return v;
}

// Merges as "left right", whichever of its two forms the file has.
StatusOr<std::vector<std::string>> Merges(const std::string& file, const json& model) {
  std::vector<std::string> merges;
  for (const json& merge : model.at("merges")) {
    if (merge.is_string()) {
      merges.push_back(merge);
      continue;
    }
    const std::string left = merge.at(0), right = merge.at(1);
    if (left.find(' ') != std::string::npos || right.find(' ') != std::string::npos)
      return InvalidArgument(file, ": the merge of '", left, "' and '", right, "' holds a blank, which GGUF cannot hold");
    merges.push_back(left + " " + right);
  }
  return merges;
}

// Higher for pieces that earlier merges make.
std::vector<float> Scores(const Vocabulary& v, const std::vector<std::string>& merges) {
  std::vector<float> scores(v.tokens.size(), kNoScore);
  for (size_t rank = merges.size(); rank-- > 0;) {
    const size_t blank = merges[rank].find(' ');
    const auto found = v.ids.find(merges[rank].substr(0, blank) + merges[rank].substr(blank + 1));
    if (found != v.ids.end()) scores[static_cast<size_t>(found->second)] = -static_cast<float>(rank + 1);
  }
  for (size_t id = 0; id < scores.size(); ++id)
    if (v.types[id] != kNormal) scores[id] = 0;
  return scores;
}

// Whether a text gets this special token before or behind it, by the post-processor.
bool Adds(const json& processor, const std::string& token, bool at_end) {
  if (!processor.is_object() || token.empty()) return false;
  if (processor.value("type", "") == "Sequence") {
    for (const json& part : processor.value("processors", json::array()))
      if (Adds(part, token, at_end)) return true;
    return false;
  }
  if (processor.value("type", "") != "TemplateProcessing") return false;
  const json pieces = processor.value("single", json::array());
  if (pieces.empty()) return false;
  const json& edge = at_end ? pieces.back() : pieces.front();
  return edge.contains("SpecialToken") && edge["SpecialToken"].value("id", "") == token;
}

bool IsSentencePiece(const json& tokenizer) { return tokenizer.at("model").value("byte_fallback", false); }

// Whether a blank is put before a text.
bool AddsSpacePrefix(const json& tokenizer) {
  const auto names = [](const json& step) {
    return step.is_object() && (step.value("type", "") == "Prepend" ||
                                (step.value("type", "") == "Metaspace" && step.value("prepend_scheme", "always") != "never"));
  };
  for (const char* part : {"normalizer", "pre_tokenizer"}) {
    const json value = tokenizer.value(part, json());
    if (names(value)) return true;
    if (!value.is_object()) continue;
    for (const char* list : {"normalizers", "pretokenizers"})
      for (const json& step : value.value(list, json::array()))
        if (names(step)) return true;
  }
  return false;
}

// The text of a special token of tokenizer_config.json: a string, or an object with "content".
std::string SpecialText(const json& config, const char* key) {
  const json value = config.value(key, json());
  if (value.is_string()) return value;
  return value.is_object() ? value.value("content", "") : "";
}

// Ids by tokenizer_config.json; where that is silent, by generation_config.json. A second end of text is the end of a turn.
void AddSpecialIds(const Vocabulary& v, const json& config, const json& generation, checkpoint::GgufNewMetadata* out) {
  const auto id_of = [&](const char* key) -> std::optional<uint32_t> {
    const auto found = v.ids.find(SpecialText(config, Join(key, "_token").c_str()));
    if (found != v.ids.end()) return static_cast<uint32_t>(found->second);
    json id = generation.value(Join(key, "_token_id"), json());
    if (id.is_array() && !id.empty()) id = id[0];
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= v.tokens.size()) return std::nullopt;
    return id.get<uint32_t>();
  };
  std::optional<uint32_t> end;
  for (const auto& [key, name] : {std::pair{"bos", "bos"}, std::pair{"eos", "eos"}, std::pair{"unk", "unknown"}, std::pair{"pad", "padding"}}) {
    const std::optional<uint32_t> id = id_of(key);
    if (std::string_view(key) == "eos") end = id;
    if (id) out->emplace_back(Join("tokenizer.ggml.", name, "_token_id"), *id);
  }
  const json ends = generation.value("eos_token_id", json());
  if (!ends.is_array()) return;
  for (const json& id : ends) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= v.tokens.size() || id.get<uint32_t>() == end) continue;
    out->emplace_back("tokenizer.ggml.eot_token_id", id.get<uint32_t>());
    return;
  }
}

// The chat template: a file of its own, or text or named texts in tokenizer_config.json.
StatusOr<std::string> ChatTemplate(const std::filesystem::path& folder, const json& config) {
  std::error_code error;
  if (std::filesystem::is_regular_file(folder / "chat_template.jinja", error)) return ReadFile(folder / "chat_template.jinja");
  const json value = config.value("chat_template", json());
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return std::string();
  for (const json& named : value)
    if (named.value("name", "") == "default") return named.value("template", "");
  return std::string();
}

StatusOr<checkpoint::GgufNewMetadata> Metadata(const std::filesystem::path& folder, const json& tokenizer, int64_t vocab_size) {
  const std::string file = (folder / "tokenizer.json").string();
  RF_ASSIGN_OR_RETURN(const json config, ReadJsonIfThere(folder / "tokenizer_config.json"));
  RF_ASSIGN_OR_RETURN(const json generation, ReadJsonIfThere(folder / "generation_config.json"));
  if (tokenizer.at("model").value("type", "BPE") != "BPE")
    return InvalidArgument(file, ": a ", tokenizer.at("model").value("type", ""), " tokenizer has no place in GGUF; BPE has");
  const bool pieces = IsSentencePiece(tokenizer);
  const std::optional<std::string_view> pre = checkpoint::GgufPreTokenizer(tokenizer);
  if (!pieces && !pre)
    return InvalidArgument(file, ": it splits texts in a way that has no name in GGUF (gpt-2, smollm, qwen2 and llama-bpe have); leave "
                           "gguf out of export.formats");
  RF_ASSIGN_OR_RETURN(Vocabulary v, ReadVocabulary(file, tokenizer, vocab_size, pieces));
  RF_ASSIGN_OR_RETURN(std::vector<std::string> merges, Merges(file, tokenizer.at("model")));
  checkpoint::GgufNewMetadata out;
  out.emplace_back("tokenizer.ggml.model", std::string(pieces ? "llama" : "gpt2"));
  out.emplace_back("tokenizer.ggml.pre", std::string(pieces ? "default" : *pre));
  AddSpecialIds(v, config, generation, &out);
  const json processor = tokenizer.value("post_processor", json());
  out.emplace_back("tokenizer.ggml.add_bos_token", Adds(processor, SpecialText(config, "bos_token"), /*at_end=*/false));
  out.emplace_back("tokenizer.ggml.add_eos_token", Adds(processor, SpecialText(config, "eos_token"), /*at_end=*/true));
  if (pieces) {
    out.emplace_back("tokenizer.ggml.add_space_prefix", AddsSpacePrefix(tokenizer));
    out.emplace_back("tokenizer.ggml.scores", Scores(v, merges));
  } else {
    out.emplace_back("tokenizer.ggml.add_space_prefix", false);
    out.emplace_back("tokenizer.ggml.merges", std::move(merges));
  }
  out.emplace_back("tokenizer.ggml.tokens", std::move(v.tokens));
  out.emplace_back("tokenizer.ggml.token_type", std::move(v.types));
  RF_ASSIGN_OR_RETURN(const std::string text, ChatTemplate(folder, config));
  if (!text.empty()) out.emplace_back("tokenizer.chat_template", text);
  return out;
}

}  // namespace

StatusOr<checkpoint::GgufNewMetadata> GgufVocabulary(const std::filesystem::path& folder, int64_t vocab_size) try {
  RF_ASSIGN_OR_RETURN(const json tokenizer, ReadJson(folder / "tokenizer.json"));
  return Metadata(folder, tokenizer, vocab_size);
} catch (const json::exception& e) {
  return DataLoss((folder / "tokenizer.json").string(), ": ", e.what());
}

}  // namespace refinery::exporting
