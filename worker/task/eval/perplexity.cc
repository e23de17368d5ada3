#include "worker/task/eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "worker/task/data/text.h"

namespace refinery::eval {
namespace {

// Spaces just inside a pair of marks go: "( a )" -> "(a)". Pairs are matched from the left, as a regular expression would.
std::string TrimInside(std::string_view text, char open, char close) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text[at] == open ? text.find(close, at + 1) : std::string_view::npos;
    if (end == std::string_view::npos) {
      out += text[at++];
      continue;
    }
    out += Join(std::string(1, open), data::Strip(text.substr(at + 1, end - at - 1)), std::string(1, close));
    at = end + 1;
  }
  return out;
}

StatusOr<int32_t> PrefixToken(const tokenizer::Tokenizer& tokenizer) {
  if (tokenizer.bos_id()) return *tokenizer.bos_id();
  if (!tokenizer.end_ids().empty()) return tokenizer.end_ids().front();
  return FailedPrecondition("text perplexity needs a BOS or EOS token, and the tokenizer names neither");
}

}  // namespace

StatusOr<AnswerResult> EvaluateAnswers(const std::vector<data::EncodedExample>& examples, Scorer& scorer) {
  if (examples.empty()) return InvalidArgument("no examples to evaluate");
  std::vector<data::EncodedPair> pairs;
  for (const data::EncodedExample& example : examples) {
    const auto answer = example.tokens.begin() + example.answer_begin;
    pairs.push_back({{example.tokens.begin(), answer}, {answer, example.tokens.end()}});
  }
  AnswerResult result{.examples = static_cast<int64_t>(examples.size())};
  RF_ASSIGN_OR_RETURN(result.per_example, scorer.ScoreIds(pairs));
  double sum = 0, greedy = 0;
  for (const TokenScore& score : result.per_example) {
    sum -= score.log_likelihood;
    greedy += static_cast<double>(score.greedy_tokens);
    result.tokens += score.tokens;
    result.exact_answers += score.greedy_tokens == score.tokens ? 1 : 0;
  }
  const double n = static_cast<double>(result.examples), tokens = static_cast<double>(result.tokens);
  result.loss = sum / tokens;
  result.perplexity = std::exp(result.loss);
  result.token_accuracy = greedy / tokens;
  result.exact_answers /= n;
  if (result.examples > 1) {
    double squares = 0;
    for (const TokenScore& score : result.per_example) {
      const double residual = -score.log_likelihood - result.loss * static_cast<double>(score.tokens);
      squares += residual * residual;
    }
    result.loss_standard_error = std::sqrt(n / (n - 1) * squares) / tokens;
    result.exact_standard_error = std::sqrt(result.exact_answers * (1 - result.exact_answers) / (n - 1));
  }
  return result;
}

std::vector<data::EncodedPair> RollingWindows(const std::vector<int32_t>& tokens, int32_t prefix, int64_t window) {
  std::vector<data::EncodedPair> windows;
  const int64_t size = static_cast<int64_t>(tokens.size());
  const auto slice = [&](int64_t begin, int64_t end) {
    return std::vector<int32_t>(tokens.begin() + begin, tokens.begin() + end);
  };
  if (size == 0) return windows;
  int64_t predicted = std::min(window, size);
  windows.push_back({{prefix}, slice(0, predicted)});
  while (predicted < size) {
    const int64_t count = std::min(window, size - predicted);
    const int64_t end = predicted + count;
    windows.push_back({slice(end - window - 1, predicted), slice(predicted, end)});
    predicted = end;
  }
  return windows;
}

std::string DetokenizeWikiText(std::string_view page) {
  using data::ReplaceAll;
  std::string text(page);
  const auto replace = [&](std::string_view from, std::string_view to) { text = ReplaceAll(text, from, to); };
  replace("s '", "s'");
  replace(" @-@ ", "-");
  replace(" @,@ ", ",");
  replace(" @.@ ", ".");
  for (const char* mark : {":", ";", ".", "!", "?", ","}) replace(Join(" ", mark, " "), Join(mark, " "));
  text = TrimInside(text, '(', ')');
  text = TrimInside(text, '[', ']');
  text = TrimInside(text, '{', '}');
  text = TrimInside(text, '"', '"');
  text = TrimInside(text, '\'', '\'');
  replace("= = = =", "====");
  replace("= = =", "===");
  replace("= =", "==");
  replace(" \u00b0 ", "\u00b0");
  replace(" \n", "\n");
  replace("\n ", "\n");
  replace(" N ", " 1 ");
  replace(" 's", "'s");
  return text;
}

int64_t CountWords(std::string_view page) {
  int64_t words = 1;
  std::string_view rest = page;
  while (!rest.empty()) {
    const std::string_view stripped = data::StripLeft(rest);
    if (stripped.size() != rest.size()) {
      ++words;
      rest = stripped;
    } else {
      rest.remove_prefix(1);
    }
  }
  return words;
}

StatusOr<TextResult> EvaluateText(const std::vector<std::string>& pages, const tokenizer::Tokenizer& tokenizer,
                                  const TextOptions& options, int64_t model_max_length, Scorer& scorer) {
  RF_ASSIGN_OR_RETURN(const int32_t prefix, PrefixToken(tokenizer));
  const int64_t window = std::min(options.window, model_max_length);
  if (window < 1) return InvalidArgument("the window must hold at least one token, is ", window);
  TextResult result;
  std::vector<data::EncodedPair> pairs;
  std::vector<size_t> page_of;
  for (size_t page = 0; page < pages.size(); ++page) {
    const std::string text = options.detokenize_wikitext ? DetokenizeWikiText(pages[page]) : pages[page];
    RF_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, data::EncodeText(text, tokenizer, options.special_tokens));
    result.page_tokens.push_back(static_cast<int64_t>(tokens.size()));
    result.page_words.push_back(CountWords(pages[page]));
    result.page_bytes.push_back(static_cast<int64_t>(pages[page].size()));
    result.tokens += result.page_tokens.back();
    result.words += result.page_words.back();
    result.bytes += result.page_bytes.back();
    for (data::EncodedPair& pair : RollingWindows(tokens, prefix, window)) {
      pairs.push_back(std::move(pair));
      page_of.push_back(page);
    }
  }
  if (result.tokens == 0) return InvalidArgument("no text to evaluate");
  RF_ASSIGN_OR_RETURN(const std::vector<TokenScore> scores, scorer.ScoreIds(pairs));
  result.per_page.resize(pages.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    result.per_page[page_of[i]] += scores[i].log_likelihood;
    result.log_likelihood += scores[i].log_likelihood;
  }
  const double bytes = static_cast<double>(result.bytes);
  result.word_perplexity = std::exp(-result.log_likelihood / static_cast<double>(result.words));
  result.byte_perplexity = std::exp(-result.log_likelihood / bytes);
  result.bits_per_byte = -result.log_likelihood / bytes / std::numbers::ln2;
  result.token_perplexity = std::exp(-result.log_likelihood / static_cast<double>(result.tokens));
  return result;
}

}  // namespace refinery::eval
