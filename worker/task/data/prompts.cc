#include "worker/task/data/prompts.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <utility>

#include "common/digest.h"
#include "worker/task/data/random.h"
#include "worker/task/data/rouge.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

// Reasons: no_question, no_answer, truncated, too_short, too_long, bad_start, ends_with_colon, blacklist, refusal, repetitive,
// label_leak, bad_options, bad_json (structured.h), not_a_letter, repeats_question, known_topic.

// Words that point at something a text model cannot see (Self-Instruct's list, and ALPACA's additions).
constexpr std::array<std::string_view, 22> kBlacklist = {
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw",
    "plot",  "photo",  "photos", "video", "audio", "flowchart", "diagram", "diagrams", "chart", "shown", "http"};

constexpr std::array<std::string_view, 10> kRefusals = {
    "as an ai", "as a language model", "i m sorry", "i am sorry", "i cannot", "i can t", "i am not able to",
    "i m not able to", "i don t know", "i do not know"};

// Cuts at `stop`; what follows belongs to the next entry of the list. Also says whether the stop text was there.
std::pair<std::string, bool> CutAt(std::string_view text, std::string_view stop) {
  const size_t end = text.find(stop);
  return {std::string(text.substr(0, end)), end != std::string_view::npos};
}

// One line of plain text: white space folded, wrapping quotes and list numbers removed.
std::string CleanLine(std::string_view text) {
  std::string line;
  for (const std::string& part : Split(ReplaceAll(ReplaceAll(text, "\t", " "), "\r", ""), " ")) {
    if (part.empty()) continue;
    if (!line.empty()) line += ' ';
    line += part;
  }
  std::string_view view = Strip(line);
  if (view.size() >= 2 && view.front() == '"' && view.back() == '"') view = Strip(view.substr(1, view.size() - 2));
  const size_t digits = view.find_first_not_of("0123456789");
  if (digits != std::string_view::npos && digits > 0 && digits <= 3 && (view[digits] == '.' || view[digits] == ')') &&
      digits + 1 < view.size() && view[digits + 1] == ' ') {
    view = Strip(view.substr(digits + 1));
  }
  return std::string(view);
}

Parsed Reject(std::string text, std::string reason, std::string detail) {
  return {std::move(text), std::move(reason), std::move(detail)};
}

// Three words that come back three times: the mark of a model caught in a loop.
bool IsRepetitive(const std::vector<std::string>& words) {
  std::map<std::string, int> seen;
  for (size_t i = 0; i + 3 <= words.size(); ++i) {
    if (++seen[Join(words[i], " ", words[i + 1], " ", words[i + 2])] >= 3) return true;
  }
  return false;
}

// The checks that questions and answers share. Returns {reason, detail}, both empty when all hold.
std::pair<std::string, std::string> CheckText(const TaskFormat& format, const std::string& text) {
  const std::vector<std::string> words = Words(text);
  if (text.back() == ':') return {"ends_with_colon", ""};
  for (const std::string& word : words) {
    if (std::find(kBlacklist.begin(), kBlacklist.end(), word) != kBlacklist.end()) return {"blacklist", word};
  }
  const std::string normalized = Join(" ", Normalized(text), " ");
  for (const std::string_view refusal : kRefusals) {
    if (normalized.find(Join(" ", refusal, " ")) != std::string::npos) return {"refusal", std::string(refusal)};
  }
  for (const std::string& label : {format.question_label, format.answer_label, std::string("Topic:")}) {
    if (text.find(label) != std::string::npos) return {"label_leak", label};
  }
  if (IsRepetitive(words)) return {"repetitive", ""};
  return {};
}

// Questions with lettered options: a line of text, then "A. ..." to the last letter, all different.
Parsed CheckOptions(const TaskFormat& format, const std::string& text) {
  std::vector<std::string> lines;
  for (const std::string& raw : Split(text, "\n")) {
    std::string line = CleanLine(raw);
    if (!line.empty()) lines.push_back(std::move(line));
  }
  std::set<std::string> options;
  if (lines.size() != format.letters + 1) {
    return Reject(text, "bad_options", Join("found ", lines.size(), " lines, expected ", format.letters + 1));
  }
  std::string joined = lines[0];
  for (size_t i = 0; i < format.letters; ++i) {
    const std::string letter = Join(std::string(1, static_cast<char>('A' + i)), ". ");
    const std::string& line = lines[i + 1];
    if (!line.starts_with(letter) || !options.insert(Normalized(line.substr(letter.size()))).second) {
      return Reject(text, "bad_options", line);
    }
    joined += Join("\n", line);
  }
  return {joined, "", ""};
}

}  // namespace

std::string TopicsPrompt(const TaskFormat& format, uint64_t seed, size_t index) {
  SeededRandom random(DeriveSeed(seed, Join("topics/", index)));
  std::string prompt = Join("A list of topics for ", format.kind, ":\n");
  size_t number = 0;
  for (const size_t topic : random.Permutation(format.topics.size())) {
    prompt += Join(++number, ". ", format.topics[topic], "\n");
  }
  return Join(prompt, number + 1, ".");
}

std::vector<std::string> ParseTopics(std::string_view generated, const std::vector<std::string>& known,
                                     std::vector<Parsed>* dropped) {
  std::set<std::string> seen;
  for (const std::string& topic : known) seen.insert(Normalized(topic));
  std::vector<std::string> topics;
  const auto drop = [&](const std::string& text, const char* reason) {
    if (dropped != nullptr) dropped->push_back(Reject(text, reason, ""));
  };
  const std::vector<std::string> lines = Split(generated, "\n");
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string raw(Strip(lines[i]));
    if (raw.empty()) break;  // an empty line ends the list; what follows is the model's own idea
    std::string topic = CleanLine(raw);
    while (!topic.empty() && (topic.back() == '.' || topic.back() == ',')) topic.pop_back();
    const std::vector<std::string> words = Words(topic);
    const bool numbered = i == 0 || topic != raw;
    if (i + 1 == lines.size() && i > 0) drop(raw, "truncated");  // the last line may be cut short
    else if (!numbered || topic.find(':') != std::string::npos) drop(raw, "label_leak");
    else if (words.empty()) drop(raw, "too_short");
    else if (words.size() > 6) drop(raw, "too_long");
    else if (!seen.insert(Normalized(topic)).second) drop(raw, "known_topic");
    else topics.push_back(std::move(topic));
  }
  return topics;
}

std::vector<std::string> SeedTopics(const TaskFormat& format, const std::vector<Example>& seeds) {
  std::map<std::string, size_t> seeds_with;
  std::vector<std::vector<std::string>> words;
  for (const Example& seed : seeds) {
    const std::string question = CutAt(QuestionOf(format, seed.instruction), "\n").first;
    words.push_back(Words(question));
    const std::set<std::string> different(words.back().begin(), words.back().end());
    for (const std::string& word : different) ++seeds_with[word];
  }
  std::vector<std::string> topics;
  for (const std::vector<std::string>& candidates : words) {
    std::string best = "things";
    for (const std::string& word : candidates) {
      if (word.size() < 5) continue;
      const auto rank = [&](const std::string& w) { return std::pair(seeds_with[w], -static_cast<int64_t>(w.size())); };
      if (seeds_with.count(best) == 0 || rank(word) < rank(best)) best = word;
    }
    topics.push_back(best);
  }
  return topics;
}

QuestionPlan PlanQuestion(const TaskFormat& format, const std::vector<Example>& seeds,
                          const std::vector<std::string>& seed_topics, const std::vector<std::string>& topics, size_t index,
                          const PlanSettings& settings) {
  RF_CHECK(!seeds.empty() && !topics.empty() && seed_topics.size() == seeds.size());
  SeededRandom random(DeriveSeed(settings.seed, Join("request/", index)));
  QuestionPlan plan;
  plan.index = index;
  plan.topic = topics[index % topics.size()];
  plan.shots = random.Sample(seeds.size(), settings.few_shot);
  plan.question_seed = random.Next();
  plan.answer_seed = random.Next();
  if (!format.description.empty()) plan.prompt = Join(format.description, "\n\n");
  plan.prompt += Join("The following are ", format.kind, ". Each is about the topic above it.\n\n");
  for (const size_t shot : plan.shots) {
    plan.prompt += Join("Topic: ", seed_topics[shot], "\n", format.question_label, " ",
                        QuestionOf(format, seeds[shot].instruction), "\n");
    // Where questions have several lines, the answer's label shows where they end.
    plan.prompt += format.letters > 0 ? Join(format.answer_label, " ", seeds[shot].output, "\n\n") : "\n";
  }
  plan.prompt += Join("Topic: ", plan.topic, "\n", format.question_label);
  return plan;
}

std::string AnswerShots(const TaskFormat& format, const std::vector<Example>& seeds, const PlanSettings& settings) {
  SeededRandom random(DeriveSeed(settings.seed, "answer_shots"));
  std::string shots;
  for (const size_t shot : random.Sample(seeds.size(), settings.few_shot)) {
    shots += Join(ShotText(format, seeds[shot]), "\n\n");
  }
  return shots;
}

std::string AnswerPrompt(const TaskFormat& format, const std::string& shots, std::string_view question) {
  return Join(shots, format.question_prefix, question, format.answer_prefix);
}

std::string QuestionStop(const TaskFormat& format) {
  return format.letters > 0 ? Join("\n", format.answer_label) : std::string("\n");
}

Parsed ParseQuestion(const TaskFormat& format, std::string_view generated, std::string_view finish_reason) {
  const auto [raw, stopped] = CutAt(StripLeft(generated), QuestionStop(format));
  std::string text = format.letters > 0 ? std::string(Strip(raw)) : CleanLine(raw);
  if (text.empty()) return Reject(text, "no_question", "");
  if (!stopped && finish_reason == "length") return Reject(text, "truncated", "no end within the token limit");
  if (format.letters > 0) {
    Parsed options = CheckOptions(format, text);
    if (!options.ok()) return options;
    text = std::move(options.text);
  }
  const size_t words = Words(text).size();
  if (words < format.min_question_words) return Reject(text, "too_short", Join(words, " words"));
  if (words > format.max_question_words) return Reject(text, "too_long", Join(words, " words"));
  const uint8_t first = static_cast<uint8_t>(text.front());
  if (first >= 0x80 || (first != '"' && ispunct(first) != 0)) return Reject(text, "bad_start", text.substr(0, 1));
  auto [reason, detail] = CheckText(format, text);
  return {std::move(text), std::move(reason), std::move(detail)};
}

Parsed ParseAnswer(const TaskFormat& format, std::string_view question, std::string_view generated,
                   std::string_view finish_reason) {
  // A leading line break is no answer: the text after it is already something else.
  const auto [raw, stopped] = CutAt(generated, AnswerStop());
  std::string text = CleanLine(raw);
  if (Words(text).empty()) return Reject(text, "no_answer", "");
  if (!stopped && finish_reason == "length") return Reject(text, "truncated", "no end within the token limit");
  if (format.letters > 0) {
    const bool letter = text.size() <= 2 && text[0] >= 'A' && text[0] < static_cast<char>('A' + format.letters) &&
                        (text.size() == 1 || text[1] == '.');
    if (!letter) return Reject(text, "not_a_letter", text.substr(0, 20));
    return {text.substr(0, 1), "", ""};
  }
  const size_t words = Words(text).size();
  if (words > format.max_answer_words) return Reject(text, "too_long", Join(words, " words"));
  auto [reason, detail] = CheckText(format, text);
  if (reason.empty() && words > 2) {
    const double overlap = RougeL(Words(text), Words(question));
    if (overlap > 0.8) reason = "repeats_question", detail = Join("ROUGE-L ", overlap);
  }
  return {std::move(text), std::move(reason), std::move(detail)};
}

Example RawExample(const TaskFormat& format, const QuestionPlan& plan, const Parsed& question, const Parsed& answer) {
  Example example;
  example.instruction = InstructionFor(format, question.text, plan.topic);
  example.output = answer.text;
  example.origin = "teacher";
  example.extra = {{"request", plan.index}, {"topic", plan.topic}, {"question", question.text}, {"task", format.task}};
  if (format.letters > 0 && question.ok() && answer.ok()) {
    for (size_t i = 0; i < format.letters; ++i) example.choices.emplace_back(1, static_cast<char>('A' + i));
    example.answer_index = answer.text[0] - 'A';
  }
  const Parsed& failed = question.ok() ? answer : question;
  if (!failed.ok()) {
    example.extra["rejected"] = {
        {"reason", failed.reason}, {"detail", failed.detail}, {"stage", question.ok() ? "answer" : "question"}};
  }
  return example;
}

}  // namespace refinery::data
