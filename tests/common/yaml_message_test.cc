#include "common/yaml_message.h"

#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include "refinery/v1/events.pb.h"
#include "refinery/v1/recipe.pb.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

using google::protobuf::util::MessageDifferencer;
using refinery::testing::IsOk;
using refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename T>
Status Read(const std::string& yaml, T* message) {
  YamlPlaces places;
  return YamlToMessage(yaml, "r.yaml", message, &places);
}

std::string Error(const std::string& yaml) {
  v1::Recipe recipe;
  return Message(Read(yaml, &recipe));
}

// The oracle is protobuf's own text format.
template <typename T>
void ExpectEqual(const T& message, const std::string& text_format) {
  T expected;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(text_format, &expected));
  EXPECT_TRUE(MessageDifferencer::Equals(message, expected)) << message.DebugString();
}

TEST(YamlMessageTest, ReadsEveryKindOfField) {
  v1::Recipe recipe;
  ASSERT_THAT(Read(R"(
name: a-1
seed: 18446744073709551615
student: {model: "x y"}
distill:
  kl_weight: 0          # optional: a zero that counts
  temperature: 2e-3
  optimizer: {adamw: {learning_rate: +.5, beta1: 0.5}}
search:
  parameters:
    - name: optimizer
      choices: [muon, 'adamw']
    - {name: learning_rate, min: 1.0e-4, log: true}
quantize: {gptq: {group_size: -1}}
data:
  critique:
)",
                   &recipe),
              IsOk());
  ExpectEqual(recipe, R"(
    name: "a-1" seed: 18446744073709551615 student { model: "x y" }
    distill { kl_weight: 0 temperature: 0.002 optimizer { adamw { learning_rate: 0.5 beta1: 0.5 } } }
    search { parameters { name: "optimizer" choices: "muon" choices: "adamw" }
             parameters { name: "learning_rate" min: 0.0001 log: true } }
    quantize { gptq { group_size: -1 } } data { critique {} })");
}

TEST(YamlMessageTest, ReadsMapsAndEnums) {
  v1::JobCreated created;
  ASSERT_THAT(Read("files: {seeds: a, benchmark/piqa: b}\nrecipe: {name: x}", &created), IsOk());
  ExpectEqual(created,
              R"(files { key: "seeds" value: "a" } files { key: "benchmark/piqa" value: "b" } recipe { name: "x" })");
  EXPECT_THAT(Read("files: {seeds: a, seeds: b}", &created),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("twice")));

  v1::JobFinished finished;
  ASSERT_THAT(Read("outcome: FAILED", &finished), IsOk());
  EXPECT_EQ(finished.outcome(), v1::JobFinished::FAILED);
  EXPECT_THAT(Read("outcome: failed", &finished),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("names of Outcome")));
}

TEST(YamlMessageTest, AnUnknownKeyNamesLineAndNearestKey) {
  EXPECT_EQ(Error("name: x\ndistill:\n  optimizer:\n    muon:\n      lern_rate: 1\n"),
            "r.yaml:5: unknown key 'lern_rate' in distill.optimizer.muon; did you mean 'learning_rate'?");
  EXPECT_EQ(Error("studnet: {model: x}"), "r.yaml:1: unknown key 'studnet'; did you mean 'student'?");
  EXPECT_EQ(Error("\nteacher: {banana: x}"), "r.yaml:2: unknown key 'banana' in teacher; known keys: model, context");
}

TEST(YamlMessageTest, AWrongTypeNamesLineFieldAndExpectation) {
  EXPECT_EQ(Error("distill:\n  steps: ten"), "r.yaml:2: distill.steps must be a whole number from 0, is 'ten'");
  EXPECT_EQ(Error("distill:\n  steps: -1"), "r.yaml:2: distill.steps must be a whole number from 0, is '-1'");
  EXPECT_EQ(Error("distill:\n  steps: 1.5"), "r.yaml:2: distill.steps must be a whole number from 0, is '1.5'");
  EXPECT_EQ(Error("distill: {steps: 4294967296}"),
            "r.yaml:1: distill.steps must be a whole number from 0, is '4294967296'");
  EXPECT_EQ(Error("distill: {steps: \"3\"}"), "r.yaml:1: distill.steps must be a whole number from 0, is '3'");
  EXPECT_EQ(Error("distill: {temperature: [1]}"), "r.yaml:1: distill.temperature must be a number, is a list");
  EXPECT_EQ(Error("distill: {temperature: }"), "r.yaml:1: distill.temperature must be a number, is nothing");
  EXPECT_EQ(Error("distill: {temperature: .nan}"), "r.yaml:1: distill.temperature must be a number, is '.nan'");
  EXPECT_EQ(Error("distill: {temperature: inf}"), "r.yaml:1: distill.temperature must be a finite number, is 'inf'");
  EXPECT_EQ(Error("export: {merged_model: yes}"), "r.yaml:1: export.merged_model must be true or false, is 'yes'");
  EXPECT_EQ(Error("name: {a: b}"), "r.yaml:1: name must be a text, is a mapping");
  EXPECT_EQ(Error("student: model.gguf"), "r.yaml:1: student must be a mapping with the keys model, is 'model.gguf'");
  EXPECT_EQ(Error("search:\n  parameters:\n    name: x"), "r.yaml:3: search.parameters must be a list, is a mapping");
  EXPECT_EQ(Error("search:\n  parameters:\n    - name: x\n    - y"),
            "r.yaml:4: search.parameters[1] must be a mapping with the keys name, min, max, log, choices, is 'y'");
}

TEST(YamlMessageTest, RefusesDuplicatesAndTwoMembersOfAOneof) {
  EXPECT_EQ(Error("seed: 1\nname: x\nseed: 2"), "r.yaml:3: seed is given twice; remove one of the two");
  EXPECT_EQ(Error("distill:\n  optimizer:\n    muon: {}\n    adamw: {}"),
            "r.yaml:4: distill.optimizer.adamw cannot stand beside 'muon'; keep one of the two");
}

TEST(YamlMessageTest, RefusesWhatIsNoMapping) {
  EXPECT_EQ(Error(""), "r.yaml:1: the file is empty");
  EXPECT_EQ(Error("# nothing\n"), "r.yaml:1: the file is empty");
  EXPECT_EQ(Error("- a\n- b"), "r.yaml:1: must be a mapping, is a list");
  EXPECT_THAT(Error("name: [x\n"), HasSubstr("not valid YAML"));
  EXPECT_THAT(Error("name: x\n---\nname: y\n"), HasSubstr("more than one YAML document"));
  EXPECT_EQ(Error("name: \xc3\x28"), "r.yaml:1: not UTF-8 text");
  EXPECT_EQ(Error("name: \xed\xa0\x80"), "r.yaml:1: not UTF-8 text") << "a surrogate";
  EXPECT_THAT(Error("? [a]\n: b\n"), HasSubstr("a key must be a name"));
}

TEST(YamlMessageTest, HostileTextEndsInAnError) {
  EXPECT_THAT(Error(std::string(100000, '[')), HasSubstr("r.yaml:"));
  EXPECT_THAT(Error("data: &a {curate: *a}"), HasSubstr("r.yaml:1:"));
  EXPECT_THAT(Error("a: &a [x]\n"), HasSubstr("unknown key 'a'"));
  EXPECT_LT(Error(std::string(100000, 'a') + ": 1").size(), 500u);
}

TEST(YamlMessageTest, RemembersPlacesAndWrittenZeros) {
  v1::Recipe recipe;
  YamlPlaces places;
  ASSERT_THAT(YamlToMessage(
                  "seed: 0\ndistill:\n  kl_weight: 0\n  steps: 0\nsearch:\n  parameters:\n  - name: a\n    min: 0.0\n",
                  "r", &recipe, &places),
              IsOk());
  EXPECT_THAT(places.written_zeros, ElementsAre("seed", "distill.steps", "search.parameters[0].min"));
  EXPECT_EQ(places.LineOf("distill.steps"), 4);
  EXPECT_EQ(places.LineOf("distill.temperature"), 2) << "the parent";
  EXPECT_EQ(places.LineOf("search.parameters[0].min"), 8);
  EXPECT_EQ(places.LineOf("search.parameters[0].max"), 7);
  EXPECT_EQ(places.LineOf("evaluate"), 0);
}

// Goal: what is written reads back equal.  Method: texts that YAML could take for something else.
TEST(YamlMessageTest, WritesWhatItReads) {
  v1::Recipe recipe;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(R"(
    name: "null" seed: 18446744073709551615
    student { model: "a: b # c" } teacher { model: "true" context { system_prompt: "two\nlines \"quoted\" \\ \t" } }
    data { task: "~" description: "" seeds { file: "- x" } }
    distill { kl_weight: 0 temperature: 0.1 optimizer { muon { learning_rate: 1e-300 momentum: 0.3333333333333333 } } }
    search { parameters { name: "optimizer" choices: "1" choices: "[" } parameters { max: 123456789.125 log: true } }
    quantize { gptq { group_size: -1 } } export {})",
                                                            &recipe));
  const std::string yaml = MessageToYaml(recipe);
  v1::Recipe again;
  ASSERT_THAT(Read(yaml, &again), IsOk()) << yaml;
  EXPECT_TRUE(MessageDifferencer::Equals(recipe, again)) << yaml;
}

TEST(NearestTest, FindsTheNearAndNothingFar) {
  const std::vector<std::string> known = {"learning_rate", "temperature", "kl_weight"};
  EXPECT_EQ(Nearest("lerning_rate", known), "learning_rate");
  EXPECT_EQ(Nearest("kl_wieght", known), "kl_weight");
  EXPECT_EQ(Nearest("temprature", known), "temperature");
  EXPECT_EQ(Nearest("banana", known), "");
  EXPECT_EQ(Nearest("", known), "");
  EXPECT_EQ(Nearest("x", {}), "");
  EXPECT_EQ(Nearest("ab", {"ba"}), "") << "half of it would have to change";
}

}  // namespace
}  // namespace refinery
