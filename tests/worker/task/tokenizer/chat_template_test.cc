// Chat templates against transformers: whole conversations (tests/vectors/tokenizer/make_chat_vectors.py) and templates
// that try to take all memory or time.
#include "worker/task/runtime/torch.h"
//
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>

#include "common/digest.h"
#include "common/files.h"
#include "tests/support/random_texts.h"
#include "tests/support/status_matchers.h"
#include "worker/task/checkpoint/gguf.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::tokenizer {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::IsOkAndHolds;
using ::refinery::testing::ReleasedTokenizers;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

const fs::path kVectors = fs::path(REFINERY_SOURCE_DIR) / "tests/vectors/tokenizer";

class ChatTemplateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / Join("refinery_chat_template_test.", static_cast<int64_t>(::getpid()));
    fs::create_directories(folder_);
    std::ofstream(folder_ / "tokenizer.json")
        << R"({"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,
              "model":{"type":"BPE","vocab":{"a":0},"merges":[]}})";
  }
  void TearDown() override { fs::remove_all(folder_); }

  StatusOr<std::shared_ptr<const Tokenizer>> WithTemplate(const std::string& source, const std::string& bos = "<|start|>",
                                                          const std::string& eos = "<|end|>") {
    std::ofstream(folder_ / "tokenizer_config.json")
        << ordered_json{{"bos_token", bos}, {"eos_token", eos}, {"chat_template", source}}.dump();
    return Tokenizer::Load(folder_);
  }

  static StatusOr<std::string> Render(const Tokenizer& tokenizer, const ordered_json& request) {
    ChatOptions options;
    options.tools = request.value("tools", ordered_json());
    options.documents = request.value("documents", ordered_json());
    options.continue_final_message = request.value("continue_final_message", false);
    const ordered_json variables = request.value("variables", ordered_json::object());
    for (const auto& [name, value] : variables.items()) options.variables[name] = value;
    return tokenizer.RenderChat(request["messages"], request.value("add_generation_prompt", false), options);
  }

  // Renders every request; what the peer refused must be refused too.
  static void Compare(const std::string& name, const Tokenizer& tokenizer) {
    const ordered_json requests = ordered_json::parse(*ReadFile(kVectors / "chat_requests.json"));
    const ordered_json expected = ordered_json::parse(*ReadFile(kVectors / "chats.json"))[name];
    ASSERT_EQ(requests.size(), expected.size());
    for (size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE(Join(name, ": ", requests[i]["name"].get<std::string>()));
      StatusOr<std::string> text = Render(tokenizer, requests[i]);
      const ordered_json& wanted = expected[i];
      if (wanted.is_string()) {
        EXPECT_THAT(text, IsOkAndHolds(wanted.get<std::string>()));
      } else if (wanted.is_object() && wanted.contains("sha256")) {
        ASSERT_THAT(text, IsOk());
        EXPECT_EQ(DigestOf(*text), "sha256:" + wanted["sha256"].get<std::string>()) << *text;
      } else {
        EXPECT_THAT(text, StatusIs(absl::StatusCode::kInvalidArgument,
                                   HasSubstr(wanted.is_null() ? "" : wanted["error"].get<std::string>())));
      }
    }
  }

  fs::path folder_;
};

TEST_F(ChatTemplateTest, ConversationsRenderAsInTransformers) {
  for (const std::string name : {"agent", "blocks", "python"}) {
    auto tokenizer = WithTemplate(*ReadFile(kVectors / "templates" / (name + ".jinja")));
    ASSERT_THAT(tokenizer, IsOk());
    Compare(name, **tokenizer);
  }
}

TEST_F(ChatTemplateTest, SmolLm2RendersAsInTransformers) {
  const char* home = std::getenv("HOME");
  const fs::path model =
      fs::path(home == nullptr ? "/" : home) / ".cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!fs::exists(model)) GTEST_SKIP() << "needs " << model << " (deploy/install_dependencies.sh model)";
  auto file = checkpoint::GgufFile::Open(model);
  ASSERT_THAT(file, IsOk());
  auto tokenizer =
      WithTemplate(std::string((*file)->String("tokenizer.chat_template").value_or("")), "<|im_start|>", "<|im_end|>");
  ASSERT_THAT(tokenizer, IsOk());
  Compare("smollm2", **tokenizer);
}

TEST_F(ChatTemplateTest, Llama31AndQwen3RenderAsInTransformers) {
  for (const std::string name : {"llama3_1", "qwen3"}) {
    if (!fs::exists(ReleasedTokenizers() / name))
      GTEST_SKIP() << "needs " << ReleasedTokenizers() << " (deploy/install_dependencies.sh model)";
    auto tokenizer = Tokenizer::Load(ReleasedTokenizers() / name);
    ASSERT_THAT(tokenizer, IsOk());
    Compare(name, **tokenizer);
  }
}

TEST_F(ChatTemplateTest, AContinuedMessageHasNoGenerationPrompt) {
  auto tokenizer = WithTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
  ASSERT_THAT(tokenizer, IsOk());
  ChatOptions options{.continue_final_message = true};
  const ordered_json messages = ordered_json::array({{{"role", "assistant"}, {"content", "so "}}});
  EXPECT_THAT((*tokenizer)->RenderChat(messages, false, options), IsOkAndHolds("assistant: so "));
  EXPECT_THAT((*tokenizer)->RenderChat(messages, true, options),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no generation prompt")));
  EXPECT_THAT((*tokenizer)->RenderChat(ordered_json::array(), false, options),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no final chat message")));
  EXPECT_THAT((*tokenizer)->RenderChat("x", false, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("list")));
  EXPECT_THAT((*tokenizer)->RenderChat(ordered_json::array({"x"}), false, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("message 0")));
}

// Goal: a template that would take all memory or run for ever ends with an error.  Method: each way to grow a text, a list or
// a depth that the language has.
TEST_F(ChatTemplateTest, GreedyTemplatesEndWithAnError) {
  const auto start = std::chrono::steady_clock::now();
  const std::string loop = "{% set ns = namespace(s='xy', l=[1]) %}{% for i in range(70) %}";
  for (const std::string& source : {
           loop + "{% set ns.s = ns.s + ns.s %}{% endfor %}", loop + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
           loop + "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
           loop + "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
           loop + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
           loop + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
           loop + "{% set ns.s = (ns.s + '\"') | tojson %}{% endfor %}{% for i in range(9) %}{{ ns.s * 1000000 }}{% endfor %}",
           loop + "{% set ns.l = ns.l + ns.l %}{% endfor %}", loop + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}",
           loop + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}",
           loop + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}", std::string("{{ 'a' * 100000000 }}"),
           std::string("{% set n = 1000000000 %}{{ 'a' * n }}"), std::string("{% set n = 1000000000 %}{{ [1] * n }}"),
           std::string("{{ '%1000000000d' % 1 }}"), std::string("{{ '{:>1000000000}'.format(1) }}"),
           std::string("{{ 'x' | center(1000000000) }}"), std::string("{{ range(9) | batch(1000000000, 0) | list }}"),
           std::string("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"),
           std::string("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"),
           "{% for i in range(99999) %}{% for j in range(99999) %}" + std::string(100000, 'x') + "{% endfor %}{% endfor %}",
           "{{ " + std::string(200000, '-') + "1 }}", "{{ " + std::string(200000, '(') + " }}",
           std::string(2 << 20, 'x')}) {
    auto tokenizer = WithTemplate(source);
    if (!tokenizer.ok()) {
      EXPECT_THAT(tokenizer, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("chat template"))) << source.substr(0, 100);
      continue;
    }
    EXPECT_THAT((*tokenizer)->ApplyChatTemplate({{"user", "x"}}, true),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("chat template")))
        << source.substr(0, 200);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  EXPECT_LT(usage.ru_maxrss, 2 << 20) << "KiB";
}

}  // namespace
}  // namespace refinery::tokenizer
