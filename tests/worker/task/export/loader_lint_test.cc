#include "worker/task/export/loader_lint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace refinery::exporting {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

const std::vector<Format> kAll = {Format::kGptq, Format::kGptqV2, Format::kCompressedTensors, Format::kGguf};

// SmolLM2-135M: sizes that 128 does not divide, embeddings tied.
model::ModelConfig SmolLm() {
  return {.architecture = "LlamaForCausalLM", .hidden_size = 576, .intermediate_size = 1536, .num_layers = 30, .num_heads = 9,
          .num_kv_heads = 3, .head_dim = 64, .vocab_size = 49152, .max_position = 8192, .tie_word_embeddings = true};
}

Verdict Find(const std::vector<Verdict>& verdicts, Format format, const std::string& loader) {
  for (const Verdict& verdict : verdicts)
    if (verdict.format == format && verdict.loader == loader) return verdict;
  ADD_FAILURE() << "no verdict of " << loader;
  return {};
}

// Goal: the verdicts are those of the loaders.  Method: the checks that each of them makes, one by one.
TEST(LoaderLintTest, FourBitsInGroupsOf64LoadEverywhere) {
  const auto verdicts = LintLoaders(SmolLm(), {}, kAll);
  EXPECT_EQ(verdicts.size(), 10u);
  for (const Verdict& verdict : verdicts) EXPECT_TRUE(verdict.accepts) << verdict.loader << ": " << verdict.why;
}

TEST(LoaderLintTest, GroupsThatDoNotDivide) {
  const auto verdicts = LintLoaders(SmolLm(), {.group_size = 128}, kAll);
  EXPECT_TRUE(Find(verdicts, Format::kGptq, "GPTQModel").accepts);
  const Verdict marlin = Find(verdicts, Format::kGptq, "vLLM (Marlin)");
  EXPECT_FALSE(marlin.accepts);
  EXPECT_THAT(marlin.why, HasSubstr("q_proj has 576 inputs, which groups of 128 do not divide"));
  EXPECT_EQ(marlin.nearest, "group size 64");
  EXPECT_FALSE(Find(verdicts, Format::kCompressedTensors, "transformers + compressed-tensors").accepts);
  EXPECT_TRUE(Find(verdicts, Format::kGguf, "llama.cpp").accepts);  // blocks of 32 divide 576
}

TEST(LoaderLintTest, WidthsThatAFormatLacks) {
  const auto verdicts = LintLoaders(SmolLm(), {.bits = 3, .group_size = 16}, kAll);
  EXPECT_TRUE(Find(verdicts, Format::kGptq, "transformers + gptqmodel").accepts);
  EXPECT_EQ(Find(verdicts, Format::kGptq, "vLLM (Marlin)").nearest, "4 bits, group size 32");
  EXPECT_THAT(Find(verdicts, Format::kGguf, "llama.cpp").why, AllOf(HasSubstr("groups of 16"), HasSubstr("F16")));
  EXPECT_TRUE(Find(verdicts, Format::kGguf, "llama.cpp").accepts);
  EXPECT_THAT(Find(LintLoaders(SmolLm(), {.bits = 3}, kAll), Format::kGguf, "llama.cpp").why, HasSubstr("stand as 4"));
  EXPECT_EQ(Find(verdicts, Format::kCompressedTensors, "transformers + compressed-tensors").nearest, "4 bits");
  EXPECT_THAT(CheckFormat(SmolLm(), {.bits = 3}, Format::kCompressedTensors), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nearest: 4 bits")));
  EXPECT_THAT(CheckFormat(SmolLm(), {.bits = 3}, Format::kGguf), IsOk());
  EXPECT_THAT(CheckFormat(SmolLm(), {.bits = 3}, Format::kGptq), IsOk());
}

TEST(LoaderLintTest, LayersOfSeveralWidths) {
  const QuantSettings mixed{.bits = 4, .mixed = {3, 8}};
  const auto verdicts = LintLoaders(SmolLm(), mixed, kAll);
  EXPECT_TRUE(Find(verdicts, Format::kGptq, "GPTQModel").accepts);
  EXPECT_THAT(Find(verdicts, Format::kGptq, "transformers + gptqmodel").why, HasSubstr("dynamic"));
  EXPECT_EQ(Find(verdicts, Format::kGptq, "transformers + gptqmodel").nearest, "4 bits in every layer");
  EXPECT_EQ(Find(verdicts, Format::kGptq, "vLLM (Marlin)").nearest, "widths 4, 8");
  EXPECT_TRUE(Find(verdicts, Format::kCompressedTensors, "vLLM (Marlin)").accepts);  // 3 bits stand as 4
  // Whatever the widths, Marlin's nearest is still a mix.
  for (const std::vector<int64_t>& widths : {std::vector<int64_t>{2, 3, 4, 8}, {2, 4, 8}, {2, 3, 4}, {2, 3}, {3, 4}})
    EXPECT_EQ(Find(LintLoaders(SmolLm(), {.bits = widths.front(), .mixed = widths}, kAll), Format::kGptq, "vLLM (Marlin)").nearest, "widths 4, 8");
  // The same width twice is no mix.
  EXPECT_FALSE(CheckFormat(SmolLm(), {.bits = 3, .mixed = {3}}, Format::kCompressedTensors).ok());
  EXPECT_TRUE(Find(verdicts, Format::kGguf, "llama.cpp").accepts);
}

TEST(LoaderLintTest, ZeroPointsOrderAndHead) {
  const auto zeros = LintLoaders(SmolLm(), {.bits = 8, .symmetric = false}, kAll);
  EXPECT_THAT(Find(zeros, Format::kGguf, "llama.cpp").why, AllOf(HasSubstr("zero points with 8 bits"), HasSubstr("F16")));
  EXPECT_EQ(Find(zeros, Format::kGptq, "vLLM (Marlin)").nearest, "symmetric");
  EXPECT_TRUE(Find(zeros, Format::kCompressedTensors, "vLLM (Marlin)").accepts);
  const auto order = LintLoaders(SmolLm(), {.act_order = true}, kAll);
  EXPECT_THAT(Find(order, Format::kGguf, "llama.cpp").why, AllOf(HasSubstr("permuted g_idx"), HasSubstr("F16")));
  EXPECT_THAT(CheckFormat(SmolLm(), {.head = true}, Format::kGptq), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tied")));
}

TEST(LoaderLintTest, ModelsThatGgufHasNoPlaceFor) {
  model::ModelConfig config = SmolLm();
  config.rope_scaling.type = "dynamic";
  EXPECT_THAT(CheckFormat(config, {}, Format::kGguf), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("leave it out")));
  EXPECT_THAT(CheckFormat(config, {}, Format::kGptq), IsOk());
}

TEST(LoaderLintTest, FormatsByName) {
  EXPECT_EQ(FormatsOf({"gguf", "gptq", "gguf"}).value(), (std::vector<Format>{Format::kGguf, Format::kGptq}));
  EXPECT_THAT(FormatsOf({"awq"}).status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("compressed_tensors")));
}

TEST(LoaderLintTest, TableIsAligned) {
  EXPECT_EQ(LintTable({{.format = Format::kGguf, .loader = "llama.cpp", .accepts = false, .why = "groups of 16", .nearest = "group size 32"}}),
            "format  loader     loads  why           nearest\n"
            "gguf    llama.cpp  no     groups of 16  group size 32\n");
}

}  // namespace
}  // namespace refinery::exporting
