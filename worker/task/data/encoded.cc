#include "worker/task/data/encoded.h"

#include <utility>

#include "common/digest.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

template <typename T>
void AppendLittleEndian(T value, std::string* bytes) {
  for (size_t i = 0; i < sizeof(T); ++i) bytes->push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i)));
}

StatusOr<int32_t> PrefixToken(const tokenizer::Tokenizer& tokenizer) {
  if (tokenizer.bos_id()) return *tokenizer.bos_id();
  if (!tokenizer.end_ids().empty()) return tokenizer.end_ids().front();
  return FailedPrecondition("the prompt is empty and the tokenizer names neither a BOS nor an EOS token to stand for it");
}

// Whether the text already begins with the BOS token's own spelling; then the tokenizer must not add another one.
StatusOr<bool> StartsWithBos(const tokenizer::Tokenizer& tokenizer, std::string_view text) {
  if (!tokenizer.bos_id()) return false;
  RF_ASSIGN_OR_RETURN(const std::string bos, tokenizer.Decode({*tokenizer.bos_id()}, /*skip_special_tokens=*/false));
  return !bos.empty() && text.starts_with(bos);
}

}  // namespace

std::string TokenKey(const std::vector<int32_t>& tokens, int64_t answer_begin) {
  std::string bytes;
  bytes.reserve(8 + 4 * tokens.size());
  AppendLittleEndian(answer_begin, &bytes);
  for (const int32_t token : tokens) AppendLittleEndian(token, &bytes);
  return DigestOf(bytes);
}

StatusOr<std::vector<int32_t>> EncodeText(std::string_view text, const tokenizer::Tokenizer& tokenizer,
                                          bool special_tokens) {
  if (!special_tokens) return tokenizer.Encode(text, /*add_special_tokens=*/false);
  RF_ASSIGN_OR_RETURN(const bool has_bos, StartsWithBos(tokenizer, text));
  return tokenizer.Encode(text, !has_bos);
}

StatusOr<EncodedPair> EncodePair(std::string_view context, std::string_view continuation,
                                 const tokenizer::Tokenizer& tokenizer, bool special_tokens) {
  const std::string_view stripped = StripRight(context);
  const std::string moved = Join(context.substr(stripped.size()), continuation);
  EncodedPair pair;
  if (stripped.empty()) {
    RF_ASSIGN_OR_RETURN(pair.continuation, tokenizer.Encode(moved, /*add_special_tokens=*/false));
    RF_ASSIGN_OR_RETURN(const int32_t prefix, PrefixToken(tokenizer));
    pair.context = {prefix};
    if (!pair.continuation.empty() && pair.continuation.front() == prefix) {
      pair.continuation.erase(pair.continuation.begin());
    }
    return pair;
  }
  RF_ASSIGN_OR_RETURN(const std::vector<int32_t> whole, EncodeText(Join(stripped, moved), tokenizer, special_tokens));
  RF_ASSIGN_OR_RETURN(pair.context, EncodeText(stripped, tokenizer, special_tokens));
  if (whole.size() > pair.context.size()) {
    pair.continuation.assign(whole.begin() + static_cast<std::ptrdiff_t>(pair.context.size()), whole.end());
  }
  return pair;
}

std::string PromptOf(const Example& example) {
  return example.input.empty() ? example.instruction : Join(example.instruction, "\n", example.input);
}

StatusOr<EncodedExample> Encode(const Example& example, const tokenizer::Tokenizer& tokenizer, bool append_end) {
  RF_ASSIGN_OR_RETURN(EncodedPair pair, EncodePair(PromptOf(example), Join(" ", example.output), tokenizer));
  if (append_end) {
    if (tokenizer.end_ids().empty()) return FailedPrecondition("the tokenizer names no token that ends a text");
    pair.continuation.push_back(tokenizer.end_ids().front());
  }
  if (pair.continuation.empty()) {
    return InvalidArgument("the answer has no tokens: \"", example.output, "\" after \"", example.instruction, "\"");
  }
  EncodedExample encoded;
  encoded.answer_begin = static_cast<int64_t>(pair.context.size());
  encoded.tokens = std::move(pair.context);
  encoded.tokens.insert(encoded.tokens.end(), pair.continuation.begin(), pair.continuation.end());
  encoded.key = TokenKey(encoded.tokens, encoded.answer_begin);
  return encoded;
}

EncodedExample WithContext(const EncodedExample& example, const std::vector<int32_t>& context) {
  EncodedExample longer;
  longer.tokens = context;
  longer.tokens.insert(longer.tokens.end(), example.tokens.begin(), example.tokens.end());
  longer.answer_begin = example.answer_begin + static_cast<int64_t>(context.size());
  longer.key = example.key;  // still the student's: the cache row is looked up by what the student sees
  return longer;
}

}  // namespace refinery::data
