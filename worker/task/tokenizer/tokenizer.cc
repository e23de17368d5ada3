#include "worker/task/tokenizer/tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/files.h"
#include "worker/task/tokenizer/bridge_text.h"
#include "worker/task/tokenizer/chat_messages.h"

namespace refinery::tokenizer {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxTokenizerBytes = uint64_t{256} << 20;
constexpr uint64_t kMaxConfigBytes = uint64_t{16} << 20;

// The object in `path`; an empty object when the file does not exist.
StatusOr<json> ReadOptionalObject(const std::filesystem::path& path) {
  StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) return json::object();
  RF_RETURN_IF_ERROR(text.status());
  json value = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object()) return DataLoss(path.string(), " is not a JSON object");
  return value;
}

// A special token stands as a string or as {"content": string, ...}; "" when absent.
std::string SpecialToken(const json& config, const char* key) {
  auto found = config.find(key);
  if (found == config.end()) return "";
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_object()) return "";
  auto content = found->find("content");
  return content != found->end() && content->is_string() ? content->get<std::string>() : "";
}

void AddIds(const json& config, const char* key, std::vector<int32_t>* ids) {
  auto found = config.find(key);
  if (found == config.end()) return;
  json list = found->is_array() ? *found : json::array({*found});
  for (const json& entry : list) {
    if (!entry.is_number_integer()) continue;
    int64_t id = entry.get<int64_t>();
    if (id < 0 || id > INT32_MAX) continue;
    if (std::find(ids->begin(), ids->end(), id) == ids->end()) ids->push_back(static_cast<int32_t>(id));
  }
}

// The template's text: chat_template.jinja before tokenizer_config's field, of named templates the one named "default".
StatusOr<std::string> ChatTemplateOf(const std::filesystem::path& folder, const json& config) {
  StatusOr<std::string> file = ReadFile(folder / "chat_template.jinja", kMaxConfigBytes);
  if (file.ok() || !absl::IsNotFound(file.status())) return file;
  auto field = config.find("chat_template");
  if (field == config.end() || field->is_null()) return std::string();
  if (field->is_string()) return field->get<std::string>();
  if (field->is_array())
    for (const json& entry : *field)
      if (entry.is_object() && entry.value("name", json()) == "default" && entry.value("template", json()).is_string())
        return entry["template"].get<std::string>();
  return DataLoss((folder / "tokenizer_config.json").string(),
                  ": chat_template is neither text nor a list with a template named \"default\"");
}

}  // namespace

struct Tokenizer::Impl {
  std::string folder;
  RbTokenizer* tokenizer = nullptr;
  RbTemplate* chat_template = nullptr;
  json special_tokens = json::object();  // bos_token, eos_token, ... as the chat template sees them
  std::optional<int32_t> bos_id;
  std::vector<int32_t> end_ids;

  ~Impl() {
    RbTokenizerFree(tokenizer);
    RbTemplateFree(chat_template);
  }

  std::optional<int32_t> IdOf(std::string_view token) const {
    if (token.empty()) return std::nullopt;
    int64_t id = RbTokenizerTokenToId(tokenizer, TextOf(token));
    if (id < 0 || id > INT32_MAX) return std::nullopt;
    return static_cast<int32_t>(id);
  }

  Status ReadTokenizer(const std::filesystem::path& path, const json& config) {
    RF_ASSIGN_OR_RETURN(std::string text, ReadFile(path, kMaxTokenizerBytes));
    OwnedString error;
    if (RbTokenizerNew(TextOf(text), &tokenizer, &error) != 0) return DataLoss(path.string(), ": ", error.Take());
    // tokenizer_config.json decides about BOS and EOS where it says anything; otherwise tokenizer.json's own
    // post-processor stands (the rule of transformers 5).
    auto add_bos = config.find("add_bos_token"), add_eos = config.find("add_eos_token");
    bool explicit_bos = add_bos != config.end() && add_bos->is_boolean();
    bool explicit_eos = add_eos != config.end() && add_eos->is_boolean();
    if (!explicit_bos && !explicit_eos) return absl::OkStatus();
    std::string bos = explicit_bos && add_bos->get<bool>() ? SpecialToken(config, "bos_token") : "";
    std::string eos = explicit_eos && add_eos->get<bool>() ? SpecialToken(config, "eos_token") : "";
    OwnedString problem;
    if (RbTokenizerSetBosEos(tokenizer, TextOf(bos), TextOf(eos), &problem) != 0)
      return DataLoss(path.string(), ": ", problem.Take());
    return absl::OkStatus();
  }

  Status ReadSpecialTokens(const std::filesystem::path& path, const json& config) {
    for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"})
      if (std::string token = SpecialToken(config, key); !token.empty()) special_tokens[key] = token;
    bos_id = IdOf(SpecialToken(config, "bos_token"));
    if (std::optional<int32_t> eos = IdOf(SpecialToken(config, "eos_token"))) end_ids.push_back(*eos);
    RF_ASSIGN_OR_RETURN(json generation, ReadOptionalObject(path / "generation_config.json"));
    RF_ASSIGN_OR_RETURN(json model, ReadOptionalObject(path / "config.json"));
    // generate() of transformers takes generation_config.json and looks at config.json only when that says nothing.
    AddIds(generation.contains("eos_token_id") ? generation : model, "eos_token_id", &end_ids);
    return absl::OkStatus();
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::filesystem::path& model_folder) {
  auto impl = std::make_unique<Impl>();
  impl->folder = model_folder.string();
  RF_ASSIGN_OR_RETURN(json config, ReadOptionalObject(model_folder / "tokenizer_config.json"));
  RF_RETURN_IF_ERROR(impl->ReadTokenizer(model_folder / "tokenizer.json", config));
  RF_RETURN_IF_ERROR(impl->ReadSpecialTokens(model_folder, config));
  RF_ASSIGN_OR_RETURN(std::string source, ChatTemplateOf(model_folder, config));
  if (!source.empty()) {
    OwnedString error;
    if (RbTemplateNew(TextOf(source), &impl->chat_template, &error) != 0)
      return DataLoss(impl->folder, ": the chat template does not compile: ", error.Take());
  }
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::move(impl)));
}

StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, bool add_special_tokens) const {
  OwnedIds ids;
  OwnedString error;
  if (RbTokenizerEncode(impl_->tokenizer, TextOf(text), add_special_tokens, &ids, &error) != 0)
    return InvalidArgument("cannot tokenize with ", impl_->folder, ": ", error.Take());
  return std::vector<int32_t>(ids.data, ids.data + ids.size);
}

StatusOr<std::string> Tokenizer::Decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const {
  std::vector<uint32_t> unsigned_ids;
  unsigned_ids.reserve(ids.size());
  for (int32_t id : ids) {
    if (id < 0) return InvalidArgument("cannot decode the token id ", id);
    unsigned_ids.push_back(static_cast<uint32_t>(id));
  }
  OwnedString text, error;
  if (RbTokenizerDecode(impl_->tokenizer, unsigned_ids.data(), unsigned_ids.size(), skip_special_tokens, &text,
                        &error) != 0)
    return InvalidArgument("cannot decode with ", impl_->folder, ": ", error.Take());
  return text.Take();
}

StatusOr<std::string> Tokenizer::ApplyChatTemplate(const std::vector<ChatMessage>& messages,
                                                   bool add_generation_prompt) const {
  return ApplyChatTemplate(messages, add_generation_prompt, ChatOptions{});
}

StatusOr<std::string> Tokenizer::ApplyChatTemplate(const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                                                   const ChatOptions& options) const {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  // Ordered: a template that prints a whole message shows role before content, as users write it.
  for (const ChatMessage& message : messages) list.push_back({{"role", message.role}, {"content", message.content}});
  return RenderChat(list, add_generation_prompt, options);
}

StatusOr<std::string> Tokenizer::RenderChat(const nlohmann::ordered_json& messages, bool add_generation_prompt,
                                            const ChatOptions& options) const {
  if (impl_->chat_template == nullptr)
    return FailedPrecondition(impl_->folder, " has no chat template; use plain prompts with this model");
  if (options.continue_final_message && add_generation_prompt)
    return InvalidArgument("a final message that is continued has no generation prompt after it");
  nlohmann::ordered_json context = impl_->special_tokens;
  RF_ASSIGN_OR_RETURN(context["messages"], TemplateMessages(messages, options.continue_final_message));
  context["tools"] = options.tools;
  context["documents"] = options.documents;
  context["add_generation_prompt"] = add_generation_prompt;
  for (const auto& [name, value] : options.variables) context[name] = value;
  std::string text;
  try {
    text = context.dump();
  } catch (const json::exception&) {
    return InvalidArgument("a chat message is not valid UTF-8");
  }
  OwnedString rendered, error;
  if (RbTemplateRender(impl_->chat_template, TextOf(text), options.now_seconds, &rendered, &error) != 0)
    return InvalidArgument("the chat template of ", impl_->folder, " refuses these messages: ", error.Take());
  if (!options.continue_final_message) return rendered.Take();
  return CutAtFinalMessage(rendered.Take(), messages);
}

const std::string& Tokenizer::folder() const { return impl_->folder; }
const RbTokenizer* Tokenizer::bridge() const { return impl_->tokenizer; }
int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(RbTokenizerVocabSize(impl_->tokenizer)); }
std::optional<int32_t> Tokenizer::bos_id() const { return impl_->bos_id; }
const std::vector<int32_t>& Tokenizer::end_ids() const { return impl_->end_ids; }
std::optional<int32_t> Tokenizer::IdOf(std::string_view token) const { return impl_->IdOf(token); }

}  // namespace refinery::tokenizer
