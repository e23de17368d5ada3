// Constrained decoding against what schemas, regular expressions and grammars mean by definition.
#include "worker/task/runtime/torch.h"
//
#include "worker/task/tokenizer/constraint.h"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "worker/task/checkpoint/gguf_tokenizer.h"

namespace refinery::tokenizer {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

const fs::path kVectors = fs::path(REFINERY_SOURCE_DIR) / "tests/vectors/tokenizer";
constexpr int64_t kPaddedVocabulary = 450;  // the tokenizer has 421 tokens

// The small byte-level vocabulary of tests/vectors/tokenizer/smollm.gguf: 256 bytes, 162 merges, two special tokens,
// the user's token "<tool>".
class ConstraintTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              Join("refinery_constraint_test.", static_cast<int64_t>(::getpid()), ".",
                   ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    auto file = checkpoint::GgufFile::Open(kVectors / "smollm.gguf");
    ASSERT_THAT(file, IsOk());
    auto files = checkpoint::TokenizerFromGguf(**file);
    ASSERT_THAT(files, IsOk());
    std::ofstream(folder_ / "tokenizer.json") << files->tokenizer_json;
    std::ofstream(folder_ / "tokenizer_config.json") << files->tokenizer_config_json;
    auto tokenizer = Tokenizer::Load(folder_);
    ASSERT_THAT(tokenizer, IsOk());
    tokenizer_ = *tokenizer;
    auto factory = ConstraintFactory::Make(*tokenizer_, kPaddedVocabulary);
    ASSERT_THAT(factory, IsOk());
    factory_ = *factory;
  }
  void TearDown() override { fs::remove_all(folder_); }

  static bool Allowed(const std::vector<uint32_t>& bits, int32_t token) {
    return (bits[static_cast<size_t>(token) / 32] >> (token % 32) & 1) != 0;
  }

  // The text's tokens go through masks one by one, then the text may stop.
  bool Takes(TokenConstraint& constraint, const std::string& text) {
    std::vector<int32_t> ids = *tokenizer_->Encode(text, false);
    std::vector<uint32_t> bits;
    for (int32_t id : ids) {
      EXPECT_THAT(constraint.Mask(bits), IsOk());
      Status accepted = constraint.Accept(id);
      EXPECT_EQ(Allowed(bits, id), accepted.ok()) << text << ": mask and Accept differ at token " << id;
      if (!accepted.ok()) return false;
    }
    EXPECT_THAT(constraint.Mask(bits), IsOk());
    EXPECT_EQ(constraint.can_stop(), Allowed(bits, tokenizer_->end_ids()[0])) << text;
    return constraint.can_stop();
  }

  void ExpectSchema(const std::string& schema, const std::vector<std::string>& good,
                    const std::vector<std::string>& bad) {
    SCOPED_TRACE(schema);
    for (const std::string& text : good) {
      auto constraint = factory_->FromJsonSchema(schema);
      ASSERT_THAT(constraint, IsOk());
      EXPECT_TRUE(Takes(**constraint, text)) << text;
    }
    for (const std::string& text : bad) {
      auto constraint = factory_->FromJsonSchema(schema);
      ASSERT_THAT(constraint, IsOk());
      EXPECT_FALSE(Takes(**constraint, text)) << text;
    }
  }

  fs::path folder_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<const ConstraintFactory> factory_;
};

TEST_F(ConstraintTest, SchemasTakeTheirOwnValuesAndNoOthers) {
  ExpectSchema(R"({"type":"object","properties":{"question":{"type":"string","minLength":1},"answer":{"type":"string"}},
                   "required":["question","answer"],"additionalProperties":false})",
               {R"({"question":"Why?","answer":""})", R"({ "question": "Über\n\"x\" 東京 😀", "answer" : "é\u001f" })",
                "{\n  \"question\": \"a\",\n  \"answer\": \"b\"\n}"},
               {R"({"question":"","answer":"x"})", R"({"question":"x"})", R"({"question":"x","answer":1})",
                R"({"question":"x","answer":"y","more":1})", R"({"question":"x","answer":"y")", "[]", "text",
                "{\"question\":\"line\nbreak\",\"answer\":\"\"}"});
  ExpectSchema(R"({"enum":["A","B",3,null]})", {R"("A")", "3", "null"}, {R"("C")", "4", "A", "true"});
  ExpectSchema(R"({"type":"integer","minimum":5,"maximum":120})", {"5", "99", "120"}, {"4", "121", "5.5", "-7", "005"});
  ExpectSchema(R"({"type":"array","items":{"type":"boolean"},"minItems":1,"maxItems":2})",
               {"[true]", "[true, false]"}, {"[]", "[true,false,true]", "[1]"});
  ExpectSchema(R"({"anyOf":[{"type":"string","pattern":"^[A-Z]{2}[0-9]+$"},{"type":"null"}]})",
               {R"("AB12")", "null"}, {R"("ab12")", R"("AB")", "1"});
  ExpectSchema(R"({"$defs":{"node":{"type":"object","properties":{"v":{"type":"number"},"next":{"anyOf":[
                   {"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["v","next"],"additionalProperties":false}},
                   "$ref":"#/$defs/node"})",
               {R"({"v":1,"next":{"v":-2.5e3,"next":null}})"}, {R"({"v":1})", R"({"v":1,"next":{"v":2}})"});
  ExpectSchema("true", {"{}", "[1, {\"a\": null}]", "\"x\""}, {"{", "nul"});
}

// The bits as one hexadecimal number, bit t for token t.
std::string Hex(const std::vector<uint32_t>& bits) {
  std::string text;
  for (size_t digit = bits.size() * 8; digit-- > 0;) {
    const uint32_t value = bits[digit / 8] >> (digit % 8 * 4) & 15;
    if (value != 0 || !text.empty() || digit == 0) text += "0123456789abcdef"[value];
  }
  return text;
}

// Goal: every mask is the peer's.  Method: tests/vectors/tokenizer/make_constraint_vectors.py (llguidance for Python).
TEST_F(ConstraintTest, MasksAreThoseOfThePythonPackage) {
  const nlohmann::json vectors = nlohmann::json::parse(*ReadFile(kVectors / "constraints.json"));
  for (const nlohmann::json& example : vectors["cases"]) {
    const std::string kind = example["kind"], source = example["source"];
    SCOPED_TRACE(source);
    auto constraint = kind == "json"    ? factory_->FromJsonSchema(source)
                      : kind == "regex" ? factory_->FromRegex(source)
                                        : factory_->FromLark(source);
    ASSERT_THAT(constraint, IsOk());
    const std::vector<int32_t> ids = *tokenizer_->Encode(example["text"].get<std::string>(), false);
    ASSERT_EQ(ids.size() + 1, example["masks"].size());
    std::vector<uint32_t> bits;
    for (size_t i = 0; i <= ids.size(); ++i) {
      ASSERT_THAT((*constraint)->Mask(bits), IsOk());
      EXPECT_EQ(Hex(bits), example["masks"][i].get<std::string>()) << "before token " << i;
      if (i < ids.size()) {
        ASSERT_THAT((*constraint)->Accept(ids[i]), IsOk());
      }
    }
  }
}

TEST_F(ConstraintTest, RegularExpressionsMatchWholeTexts) {
  auto takes = [&](const std::string& regex, const std::string& text) {
    auto constraint = factory_->FromRegex(regex);
    EXPECT_THAT(constraint, IsOk());
    return constraint.ok() && Takes(**constraint, text);
  };
  EXPECT_TRUE(takes("(yes|no)[.!]?", "yes!"));
  EXPECT_TRUE(takes("(yes|no)[.!]?", "no"));
  EXPECT_FALSE(takes("(yes|no)[.!]?", "yes?"));
  EXPECT_FALSE(takes("(yes|no)[.!]?", "y"));
  EXPECT_TRUE(takes("[А-Яа-яё]+ дом", "Вот дом"));
  EXPECT_FALSE(takes("[0-9]{4}-[0-9]{2}", "2024-1"));
  EXPECT_TRUE(takes("[0-9]{4}-[0-9]{2}", "2024-11"));
}

TEST_F(ConstraintTest, LarkGrammarsMayNameSpecialTokens) {
  const std::string grammar = "start: \"call \" <|start|> /[a-z]+/ (\",\" /[a-z]+/)*\n";
  auto takes = [&](const std::string& text) {
    auto constraint = factory_->FromLark(grammar);
    EXPECT_THAT(constraint, IsOk());
    return constraint.ok() && Takes(**constraint, text);
  };
  EXPECT_TRUE(takes("call <|start|>ab,c"));
  EXPECT_FALSE(takes("call <|start|>ab,"));
  EXPECT_FALSE(takes("call ab"));
  // A special token is never a way to write its own letters.
  auto constraint = factory_->FromRegex("<.start.>");
  ASSERT_THAT(constraint, IsOk());
  std::vector<uint32_t> bits;
  ASSERT_THAT((*constraint)->Mask(bits), IsOk());
  EXPECT_FALSE(Allowed(bits, *tokenizer_->IdOf("<|start|>")));
}

TEST_F(ConstraintTest, EndTokensFollowCompleteTextsAlone) {
  int32_t end = tokenizer_->end_ids()[0];
  auto constraint = factory_->FromRegex("ab?");
  ASSERT_THAT(constraint, IsOk());
  std::vector<uint32_t> bits;
  ASSERT_THAT((*constraint)->Mask(bits), IsOk());
  EXPECT_EQ(bits.size(), static_cast<size_t>((kPaddedVocabulary + 31) / 32));
  EXPECT_FALSE(Allowed(bits, end));
  EXPECT_THAT((*constraint)->Accept(end), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not allowed here")));
  EXPECT_THAT((*constraint)->Accept(*tokenizer_->IdOf("a")), IsOk());  // the refusal changed nothing
  EXPECT_TRUE((*constraint)->can_stop());
  EXPECT_FALSE((*constraint)->finished());
  EXPECT_THAT((*constraint)->Accept(*tokenizer_->IdOf("b")), IsOk());
  EXPECT_TRUE((*constraint)->finished());
  EXPECT_TRUE((*constraint)->can_stop());
  ASSERT_THAT((*constraint)->Mask(bits), IsOk());
  for (int32_t token = 0; token < kPaddedVocabulary; ++token) EXPECT_EQ(Allowed(bits, token), token == end) << token;
  EXPECT_THAT((*constraint)->Accept(*tokenizer_->IdOf("b")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("complete")));
  EXPECT_THAT((*constraint)->Accept(end), IsOk());
  EXPECT_THAT((*constraint)->Accept(kPaddedVocabulary), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("450")));
  EXPECT_THAT((*constraint)->Accept(-1), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("negative")));
}

// Goal: bits beyond the tokenizer's own ids and unused ids stay clear even where everything is allowed.
TEST_F(ConstraintTest, PaddingRowsAreNeverAllowed) {
  auto constraint = factory_->FromRegex("(?s:.*)");
  ASSERT_THAT(constraint, IsOk());
  std::vector<uint32_t> bits;
  ASSERT_THAT((*constraint)->Mask(bits), IsOk());
  for (int32_t token = 421; token < static_cast<int32_t>(bits.size() * 32); ++token)
    EXPECT_FALSE(Allowed(bits, token)) << token;
  EXPECT_TRUE(Allowed(bits, *tokenizer_->IdOf("a")));
  EXPECT_TRUE(Allowed(bits, *tokenizer_->IdOf("<tool>")));
}

TEST_F(ConstraintTest, ErrorsNameTheSchemasPlace) {
  using absl::StatusCode;
  auto expect = [&](const std::string& schema, const std::string& part) {
    EXPECT_THAT(factory_->FromJsonSchema(schema).status(),
                StatusIs(StatusCode::kInvalidArgument, AllOf(HasSubstr("JSON schema"), HasSubstr(part))))
        << schema;
  };
  expect("{\"type\": ", "line 1");
  expect("", "not JSON");
  expect("[1]", "an object or a boolean");
  expect(R"({"type":"object","properties":{"a":{"type":"object","properties":{"b":{"type":"strng"}}}}})",
         "/properties/a/properties/b");
  expect(R"({"type":"array","items":{"type":"string","pattern":"(["}})", "/items");
  expect(R"({"properties":{"a":{"$ref":"#/$defs/none"}}})", "/properties/a");
  expect(R"({"properties":{"a":{"$ref":"https://somewhere/else"}}})", "/properties/a");
  expect(R"({"type":"integer","minimum":5,"maximum":4})", "its top");
  EXPECT_THAT(factory_->FromRegex("a(b").status(), StatusIs(StatusCode::kInvalidArgument, HasSubstr("regular")));
  EXPECT_THAT(factory_->FromRegex("(?=a)b").status(), StatusIs(StatusCode::kInvalidArgument, HasSubstr("regular")));
  EXPECT_THAT(factory_->FromLark("start: nothing\n").status(),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("nothing")));
  EXPECT_THAT(factory_->FromLark("").status(), StatusIs(StatusCode::kInvalidArgument, HasSubstr("Lark")));
}

// Goal: hostile sources end with an error soon.  Method: sources that are deep, long or explode when expanded.
TEST_F(ConstraintTest, HostileSourcesAreRefusedSoon) {
  auto start = std::chrono::steady_clock::now();
  auto repeat = [](const std::string& part, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += part;
    return text;
  };
  std::string deep_schema = repeat(R"({"items":)", 5000) + "true" + repeat("}", 5000);
  EXPECT_FALSE(factory_->FromJsonSchema(deep_schema).ok());
  EXPECT_FALSE(factory_->FromJsonSchema(std::string(2 << 20, ' ') + "true").ok());
  EXPECT_FALSE(factory_->FromRegex(repeat("(", 100000) + "a" + repeat(")", 100000)).ok());
  EXPECT_FALSE(factory_->FromLark("start: " + repeat("(", 100000) + "\"a\"" + repeat(")", 100000)).ok());
  std::string doubling = "start: r0\n";
  for (int i = 0; i < 60; ++i) doubling += Join("r", i, ": r", i + 1, " r", i + 1, "\n");
  // Very long texts are no fault as long as each step is quick.
  for (auto& constraint :
       {factory_->FromLark(doubling + "r60: \"a\"\n"), factory_->FromRegex("((a{1000}){1000}){1000}")}) {
    if (!constraint.ok()) continue;
    std::vector<uint32_t> bits;
    EXPECT_THAT((*constraint)->Mask(bits), IsOk());
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

// Goal: one factory serves many threads.  Method: each thread runs its own constraint to the end.
TEST_F(ConstraintTest, ThreadsShareAFactory) {
  std::vector<std::thread> threads;
  std::vector<int> taken(4, 0);
  for (size_t i = 0; i < taken.size(); ++i)
    threads.emplace_back([&, i] {
      auto constraint = factory_->FromJsonSchema(R"({"type":"object","properties":{"n":{"type":"integer"}}})");
      taken[i] = constraint.ok() && Takes(**constraint, Join("{\"n\": ", static_cast<int64_t>(i), "}")) ? 1 : 0;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(taken, std::vector<int>(4, 1));
}

TEST_F(ConstraintTest, ATokenizerWithoutAnEndIsRefused) {
  std::ofstream(folder_ / "tokenizer_config.json") << "{}";
  auto tokenizer = Tokenizer::Load(folder_);
  ASSERT_THAT(tokenizer, IsOk());
  EXPECT_THAT(ConstraintFactory::Make(**tokenizer).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no token ends a text")));
  EXPECT_THAT(ConstraintFactory::Make(**tokenizer, 0, {100000}).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("100000")));
}

}  // namespace
}  // namespace refinery::tokenizer
