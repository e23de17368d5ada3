#include "common/recipe.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "common/files.h"
#include "common/limits.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr char kSmallest[] = R"(name: small
student: {model: m.gguf}
data: {task: piqa, seeds: {benchmark: piqa}}
)";

v1::Recipe Parsed(const std::string& yaml) {
  StatusOr<v1::Recipe> recipe = ParseRecipe(yaml, "r.yaml", "/recipes");
  EXPECT_THAT(recipe, IsOk());
  return recipe.ok() ? *recipe : v1::Recipe();
}

// The message of a recipe that consists of kSmallest and `more`.
std::string Error(const std::string& more) {
  StatusOr<v1::Recipe> recipe = ParseRecipe(kSmallest + more, "r.yaml", "/recipes");
  EXPECT_THAT(recipe, StatusCodeIs(absl::StatusCode::kInvalidArgument)) << more;
  return Message(recipe.status());
}

// A recipe whose data section is given whole.
std::string DataError(const std::string& data) {
  StatusOr<v1::Recipe> recipe = ParseRecipe("name: x\nstudent: {model: m}\n" + data, "r.yaml", "/recipes");
  EXPECT_THAT(recipe, StatusCodeIs(absl::StatusCode::kInvalidArgument)) << data;
  return Message(recipe.status());
}

// Goal: every default that recipe.proto documents.  Method: the numbers of its comments.
TEST(RecipeTest, FillsTheDocumentedDefaults) {
  const v1::Recipe r = Parsed(kSmallest);
  EXPECT_EQ(r.teacher().model(), r.student().model());
  EXPECT_EQ(r.data().seeds().split(), "train");
  EXPECT_EQ(r.data().synthesize().examples(), 128u);
  EXPECT_EQ(r.data().synthesize().shards(), 1u);
  EXPECT_EQ(r.data().synthesize().topics(), 12u);
  EXPECT_EQ(r.data().synthesize().few_shot(), 4u);
  EXPECT_EQ(r.data().synthesize().temperature(), 0.8);
  EXPECT_EQ(r.data().synthesize().top_p(), 0.95);
  EXPECT_EQ(r.data().synthesize().max_new_tokens(), 96u);
  EXPECT_EQ(r.data().critique().keep_fraction(), 0.7);
  EXPECT_EQ(r.data().curate().validation_fraction(), 0.15);
  EXPECT_EQ(r.data().curate().held_out_fraction(), 0.15);
  EXPECT_EQ(r.data().curate().duplicate_threshold(), 0.7);
  EXPECT_EQ(r.data().curate().seed_examples(), 0u);
  EXPECT_EQ(r.distill().kl_weight(), 1.0);
  EXPECT_EQ(r.distill().temperature(), 1.0);
  EXPECT_EQ(r.distill().top_k(), 64u);
  EXPECT_EQ(r.distill().lora().rank(), 16u);
  EXPECT_EQ(r.distill().lora().lora_alpha(), 32);
  EXPECT_EQ(r.distill().optimizer().muon().learning_rate(), 2e-3);
  EXPECT_EQ(r.distill().optimizer().muon().momentum(), 0.95);
  EXPECT_EQ(r.distill().steps(), 30u);
  EXPECT_EQ(r.distill().tokens_per_step(), 512u);
  EXPECT_EQ(r.distill().checkpoint_every(), 10u);
  EXPECT_EQ(r.search().trials(), 0u);
  EXPECT_EQ(r.search().replicates(), 1u);
  EXPECT_EQ(r.search().parallel(), 1u);
  EXPECT_EQ(r.quantize().gptq().bits(), 4u);
  EXPECT_EQ(r.quantize().gptq().group_size(), 64);
  EXPECT_EQ(r.quantize().gptq().damp_fraction(), 0.01);
  EXPECT_EQ(r.quantize().gptq().calibration_tokens(), 16384u);
  EXPECT_EQ(r.quantize().gptq().sequence_length(), 256u);
  EXPECT_EQ(r.quantize().gptq().grid(), "full_range");
  EXPECT_EQ(r.quantize().gptq().order(), "groups");
  EXPECT_EQ(r.quantize().gptq().held_out_tokens(), 2048u);
  EXPECT_EQ(r.quantize().gptq().calibration().general_share(), 0);
  EXPECT_EQ(r.quantize().gptq().calibration().duplicate_threshold(), 0.8);
  EXPECT_TRUE(r.quantize().recover().enabled());
  EXPECT_EQ(r.quantize().recover().steps(), 120u);
  EXPECT_EQ(r.quantize().recover().tokens_per_step(), 512u);
  EXPECT_EQ(r.quantize().recover().learning_rate(), 0.0025);
  EXPECT_EQ(r.quantize().recover().sequence_length(), 512u);
  EXPECT_EQ(r.quantize().recover().patience(), 1u);
  EXPECT_EQ(r.quantize().recover().layer_weight(), 40);
  EXPECT_EQ(r.quantize().recover().evaluate_every(), 60u);
  EXPECT_EQ(r.quantize().recover().checkpoint_every(), 25u);
  ASSERT_EQ(r.export_().formats_size(), 1);
  EXPECT_EQ(r.export_().formats(0), "gptq");
  EXPECT_EQ(r.evaluate().latency_tokens(), 32u);

  const v1::Recipe adamw =
      Parsed(std::string(kSmallest) + "distill: {lora: {rank: 4}, optimizer: {adamw: {beta1: 0.5}}}\n");
  EXPECT_EQ(adamw.distill().lora().lora_alpha(), 8);
  EXPECT_EQ(adamw.distill().optimizer().adamw().learning_rate(), 1e-3);
  EXPECT_EQ(adamw.distill().optimizer().adamw().beta1(), 0.5);
  EXPECT_EQ(adamw.distill().optimizer().adamw().beta2(), 0.999);
  const v1::Recipe search = Parsed(std::string(kSmallest) +
                                   "search: {trials: 9, parameters: [{name: temperature, min: 1, max: 2}]}\n"
                                   "evaluate: {benchmarks: [{name: arc_easy}, {name: piqa}]}\n");
  EXPECT_EQ(search.search().initial_trials(), 4u);
  EXPECT_EQ(search.evaluate().benchmarks(0).split(), "test");
  EXPECT_EQ(search.evaluate().benchmarks(1).split(), "validation");
}

TEST(RecipeTest, FillingTwiceChangesNothing) {
  const v1::Recipe once = Parsed(kSmallest);
  v1::Recipe twice = once;
  FillDefaults(&twice);
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(once, twice));
  EXPECT_THAT(CheckRecipe(twice), IsOk());
}

TEST(RecipeTest, WrittenValuesStay) {
  const v1::Recipe r =
      Parsed(std::string(kSmallest) + "distill: {kl_weight: 0, steps: 7, optimizer: {muon: {momentum: 0}}}\n");
  EXPECT_EQ(r.distill().kl_weight(), 0);
  EXPECT_EQ(r.distill().steps(), 7u);
  EXPECT_EQ(r.distill().optimizer().muon().momentum(), 0);
}

TEST(RecipeTest, PathsAreResolved) {
  const char* home = std::getenv("HOME");
  ASSERT_NE(home, nullptr);
  const v1::Recipe r = Parsed(R"(
student: {model: ../models/m.gguf}
teacher: {model: ~/teacher}
data: {task: piqa, seeds: {file: seeds.jsonl}}
evaluate: {benchmarks: [{name: piqa, file: /abs/./x.jsonl}, {name: arc_easy}]}
)");
  EXPECT_EQ(r.name(), "r") << "named as the file";
  EXPECT_EQ(r.student().model(), "/models/m.gguf");
  EXPECT_EQ(r.teacher().model(), (fs::path(home) / "teacher").lexically_normal().string());
  EXPECT_EQ(r.data().seeds().file(), "/recipes/seeds.jsonl");
  EXPECT_EQ(r.evaluate().benchmarks(0).file(), "/abs/x.jsonl");
  EXPECT_EQ(r.evaluate().benchmarks(1).file(), "");
  EXPECT_EQ(
      Parsed("name: x\nstudent: {model: 'hub://a/b'}\ndata: {task: piqa, seeds: {benchmark: piqa}}").student().model(),
      "hub://a/b");
}

TEST(RecipeTest, AZeroThatWouldMeanTheDefaultIsRefused) {
  EXPECT_THAT(Error("distill:\n  steps: 0\n"), StartsWith("r.yaml:5: distill.steps must not be zero"));
  EXPECT_THAT(Error("data: {}\n"), HasSubstr("given twice"));
  EXPECT_THAT(Error("quantize: {gptq: {damp_fraction: 0.0}}\n"),
              HasSubstr("quantize.gptq.damp_fraction must not be zero"));
  EXPECT_THAT(ParseRecipe(std::string(kSmallest) + "seed: 0\nexport: {merged_model: false}\nsearch: {trials: 0}\n",
                          "r.yaml", "/"),
              IsOk());
}

TEST(RecipeTest, ErrorsOfChecksNameTheLine) {
  EXPECT_EQ(Error("distill:\n  temperature: -1\n"), "r.yaml:5: distill.temperature must be from 0.5 to 8, is -1");
  EXPECT_EQ(Error("search:\n  trials: 2\n  parameters:\n    - name: temperature\n      min: 2\n      max: 1\n"),
            "r.yaml:9: search.parameters[0].max must be above min (2), is 1");
}

struct Case {
  const char* yaml;
  const char* message;
};

TEST(RecipeTest, RangesOfDistillation) {
  for (const Case& c : std::vector<Case>{
           {"distill: {kl_weight: 1.01}", "distill.kl_weight must be from 0 to 1, is 1.01"},
           {"distill: {kl_weight: -0.1}", "distill.kl_weight must be from 0 to 1"},
           {"distill: {top_k: 100000}", "distill.top_k must be from 1 to 65536"},
           {"distill: {lora: {rank: 5000}}", "distill.lora.rank must be from 1 to 4096"},
           {"distill: {lora: {lora_alpha: -1}}", "distill.lora.lora_alpha must be > 0"},
           {"distill: {optimizer: {muon: {learning_rate: -1}}}", "distill.optimizer.muon.learning_rate must be > 0"},
           {"distill: {optimizer: {muon: {momentum: 1}}}",
            "distill.optimizer.muon.momentum must be at least 0 and below 1"},
           {"distill: {optimizer: {muon: {weight_decay: -1}}}", "weight_decay must be >= 0"},
           {"distill: {optimizer: {adamw: {beta2: 1}}}",
            "distill.optimizer.adamw.beta2 must be at least 0 and below 1"},
           {"distill: {tokens_per_step: 8}", "distill.tokens_per_step must be from 16"},
           {"quantize: {gptq: {bits: 5}}", "quantize.gptq.bits must be 2, 3, 4 or 8, is 5"},
           {"quantize: {gptq: {group_size: -2}}", "quantize.gptq.group_size must be > 0, or -1"},
           {"quantize: {gptq: {damp_fraction: 1}}", "quantize.gptq.damp_fraction must be between 0 and 1"},
           {"quantize: {gptq: {grid: full}}", "quantize.gptq.grid is 'full', which is not known"},
           {"quantize: {gptq: {order: group}}", "quantize.gptq.order is 'group', which is not known; did you mean 'groups'?"},
           {"quantize: {gptq: {alpha: 1.5}}", "quantize.gptq.alpha must be from 0 to 1, is 1.5"},
           {"quantize: {gptq: {bits_budget: 1.5}}", "quantize.gptq.bits_budget must be from 2 to 9, is 1.5"},
           {"quantize: {gptq: {bits_budget: 3.5, bytes_budget: 1000}}", "quantize.gptq.bytes_budget cannot be given together"},
           {"quantize: {gptq: {bits: 3, bits_budget: 3.5}}", "quantize.gptq.bits cannot be given together with a budget"},
           {"export: {gguf: {embeddings: q8_0}}", "export.gguf.embeddings is for the format gguf, which export.formats does not name"},
           {"quantize: {gptq: {widths: [3, 4]}}", "quantize.gptq.widths are for a budget; give quantize.gptq.bits_budget"},
           {"quantize: {gptq: {bits_budget: 5, widths: [4, 6]}}", "quantize.gptq.widths[1] must be 2, 3, 4 or 8, is 6"},
           {"quantize: {gptq: {bits_budget: 5, widths: [4, 4]}}", "quantize.gptq.widths[1] is 4 after 4; give each once, ascending"},
           {"quantize: {recover: {learning_rate: 1}}", "quantize.recover.learning_rate must be from 1e-07 to 0.1, is 1"},
           {"quantize: {recover: {layer_weight: -1}}", "quantize.recover.layer_weight must be from 0 to 1e+06, is -1"},
           {"quantize: {recover: {tokens_per_step: 100}}", "quantize.recover.tokens_per_step must be at least sequence_length"},
           {"quantize: {gptq: {max_kl: -1}}", "quantize.gptq.max_kl must be >= 0, is -1"},
           {"quantize: {gptq: {max_ppl_ratio: 0.9}}", "quantize.gptq.max_ppl_ratio must be > 1, is 0.9"},
           {"quantize: {gptq: {calibration: {general_share: 0.5}}}", "quantize.gptq.calibration.general names no file"},
           {"quantize: {gptq: {calibration: {duplicate_threshold: 2}}}",
            "quantize.gptq.calibration.duplicate_threshold must be > 0 and at most 1"},
           {"quantize: {gptq: {calibration_tokens: 100}}",
            "quantize.gptq.calibration_tokens must be at least sequence_length"},
           {"teacher: {context: {few_shot: 65}}", "teacher.context.few_shot must be from 0 to 64"},
           {"evaluate: {benchmarks: [{name: arc_esy}]}",
            "evaluate.benchmarks[0].name is 'arc_esy', which is not known; did you mean "
            "'arc_easy'?"},
           {"evaluate: {benchmarks: [{name: piqa}, {name: piqa}]}", "evaluate.benchmarks[1].name is 'piqa' again"},
           {"evaluate: {benchmarks: [{name: piqa, split: tset}]}",
            "evaluate.benchmarks[0].split is 'tset', which is not known; did you "
            "mean 'test'?"},
           {"resources: {threads: 5000}", "resources.threads must be from 0 to 4096"}})
    EXPECT_THAT(Error(c.yaml), HasSubstr(c.message));
  EXPECT_THAT(ParseRecipe(std::string(kSmallest) + "quantize: {gptq: {group_size: -1, bits: 3}}\n", "r.yaml", "/"),
              IsOk());
}

TEST(RecipeTest, RangesOfTheSearch) {
  const std::string temperature = "parameters: [{name: temperature, min: 1, max: 2}]";
  for (const Case& c : std::vector<Case>{
           {"search: {trials: 3}", "search.parameters is missing"},
           {"search: {parameters: [{name: temperature, min: 1, max: 2}]}", "search.trials is 0"},
           {"search: {trials: 3, initial_trials: 4, parameters: [{name: temperature, min: 1, max: 2}]}",
            "search.initial_trials must be at most search.trials (3), is 4"},
           {"search: {trials: 3, parameters: [{name: temprature, min: 1, max: 2}]}", "did you mean 'temperature'?"},
           {"search: {trials: 3, parameters: [{name: temperature, min: 1, max: 2}, {name: temperature, min: 1, max: "
            "2}]}",
            "search.parameters[1].name is 'temperature' again"},
           {"search: {trials: 2, parameters: [{name: optimizer, choices: [muon, adam]}]}", "did you mean 'adamw'?"},
           {"search: {trials: 2, parameters: [{name: optimizer, choices: [muon, muon]}]}",
            "choices[1] is 'muon' again"},
           {"search: {trials: 2, parameters: [{name: optimizer, min: 1, max: 2}]}", "has choices, not min, max or log"},
           {"search: {trials: 2, parameters: [{name: optimizer}]}", "choices is missing"},
           {"search: {trials: 2, parameters: [{name: temperature, choices: [a]}]}", "choices goes only with optimizer"},
           {"search: {trials: 3, parameters: [{name: optimizer, choices: [muon, adamw]}]}",
            "search.trials must be at most 2 (there are no more different settings), is 3"},
           {"search: {trials: 2, parameters: [{name: kl_weight, min: 0.5, max: 1.5}]}", "max must be from 0 to 1"},
           {"search: {trials: 2, parameters: [{name: kl_weight, min: 0, max: 1, log: true}]}",
            "min must be > 0 on a logarithmic"},
           {"search: {trials: 2, parameters: [{name: lora_rank, min: 4.5, max: 8}]}",
            "min must be a whole number, is 4.5"},
           {"search: {trials: 2, parameters: [{name: learning_rate, min: -1, max: 8}]}", "min must be > 0"},
           {"search: {trials: 2000, parameters: [{name: temperature, min: 1, max: 2}]}",
            "search.trials must be from 1 to 1000"}})
    EXPECT_THAT(Error(c.yaml), HasSubstr(c.message));
  EXPECT_THAT(ParseRecipe(kSmallest + ("search: {trials: 5, " + temperature) + "}\n", "r.yaml", "/"), IsOk());
}

TEST(RecipeTest, RangesOfTheData) {
  for (const Case& c : std::vector<Case>{
           {"data: {seeds: {benchmark: piqa}}", "data.task is missing; known: arc_easy"},
           {"data: {task: pika, seeds: {benchmark: piqa}}",
            "data.task is 'pika', which is not known; did you mean 'piqa'?"},
           {"data: {task: piqa}", "data.seeds must name either a benchmark or a file"},
           {"data: {task: piqa, seeds: {benchmark: piqa, file: x}}", "data.seeds must name either"},
           {"data: {task: piqa, seeds: {file: x, split: train}}", "data.seeds.split goes only with"},
           {"data: {task: piqa, seeds: {benchmark: arc_easy}}", "seeds must have the row format of the task"},
           {"data: {task: piqa, seeds: {benchmark: piqa, split: validation}}", "data.seeds.split must be train"},
           {"data: {task: piqa, seeds: {benchmark: piqa, limit: 8}, curate: {seed_examples: 9}}",
            "data.curate.seed_examples must be at most data.seeds.limit (8), is 9"},
           {"data: {task: piqa, seeds: {benchmark: piqa}, synthesize: {shards: 200}}",
            "data.synthesize.shards must be at most"},
           {"data: {task: piqa, seeds: {benchmark: piqa}, synthesize: {top_p: 1.5}}",
            "data.synthesize.top_p must be > 0"},
           {"data: {task: piqa, seeds: {benchmark: piqa}, critique: {keep_fraction: 2}}",
            "data.critique.keep_fraction"},
           {"data: {task: piqa, seeds: {benchmark: piqa}, curate: {held_out_fraction: 0.9}}", "must be below 1"},
           {"data: {task: piqa, seeds: {benchmark: piqa}, curate: {validation_fraction: 1}}",
            "data.curate.validation_fraction"}})
    EXPECT_THAT(DataError(c.yaml), HasSubstr(c.message));
}

TEST(RecipeTest, FormatsOfTheExport) {
  EXPECT_THAT(Error("export: {formats: [gptq, compressed_tensor]}\n"), HasSubstr("did you mean 'compressed_tensors'?"));
  EXPECT_THAT(Error("export: {formats: [gguf, gguf]}\n"), HasSubstr("name each once"));
  EXPECT_THAT(Error("export: {formats: [compressed_tensors]}\nquantize: {gptq: {bits: 3}}\n"), HasSubstr("holds 4 and 8 bits"));
  Parsed(std::string(kSmallest) + "export: {formats: [gguf]}\nquantize: {gptq: {bits: 3, group_size: 16, order: classic}}\n");
  Parsed(std::string(kSmallest) + "export: {formats: [gguf]}\nquantize: {gptq: {bits: 8, grid: asymmetric}}\n");
  EXPECT_THAT(Error("export: {formats: [compressed_tensors]}\nquantize: {gptq: {order: classic}}\n"), HasSubstr("permuted"));
  EXPECT_THAT(Error("export: {formats: [gguf], gguf: {embeddings: q4_0}}\n"), HasSubstr("export.gguf.embeddings"));
  const v1::Recipe mixed = Parsed(std::string(kSmallest) + "export: {formats: [gguf, gptq_v2], gguf: {embeddings: q8_0}}\n"
                                                           "quantize: {gptq: {bits_budget: 4.5}}\n");
  EXPECT_EQ(mixed.export_().formats_size(), 2);
  // What came of the widths decides later.
  EXPECT_EQ(mixed.quantize().gptq().bits(), 0u);
  EXPECT_EQ(mixed.quantize().recover().learning_rate(), 0);
  EXPECT_EQ(Parsed(std::string(kSmallest) + "quantize: {gptq: {bits: 3}}\n").quantize().recover().learning_rate(), 0.004);
}

TEST(RecipeTest, WidthsOfABudgetAreThoseThatTheFormatsHold) {
  const auto widths = [](const std::string& more) {
    const v1::Gptq gptq = Parsed(std::string(kSmallest) + more).quantize().gptq();
    return std::vector<int>(gptq.widths().begin(), gptq.widths().end());
  };
  EXPECT_THAT(widths(""), ElementsAre());
  EXPECT_THAT(widths("quantize: {gptq: {bits_budget: 4.5}}\n"), ElementsAre(2, 3, 4, 8));
  EXPECT_THAT(widths("quantize: {gptq: {bytes_budget: 100000000}}\nexport: {formats: [gptq, gptq_v2]}\n"), ElementsAre(2, 3, 4, 8));
  EXPECT_THAT(widths("quantize: {gptq: {bits_budget: 4.5}}\nexport: {formats: [gptq, gguf]}\n"), ElementsAre(4, 8));
  EXPECT_THAT(widths("quantize: {gptq: {bits_budget: 4.5}}\nexport: {formats: [compressed_tensors]}\n"), ElementsAre(4, 8));
  EXPECT_THAT(widths("quantize: {gptq: {bits_budget: 5, grid: asymmetric}}\nexport: {formats: [gguf]}\n"), ElementsAre(4));
  EXPECT_THAT(widths("quantize: {gptq: {bits_budget: 4.5, widths: [3, 4]}}\nexport: {formats: [gptq]}\n"), ElementsAre(3, 4));
  for (const char* format : {"gguf", "compressed_tensors"})
    EXPECT_THAT(Error(Join("quantize: {gptq: {bits_budget: 4.5, widths: [3, 8]}}\nexport: {formats: [gptq, ", format, "]}\n")),
                HasSubstr(Join("quantize.gptq.widths[0] is 3, which the format '", format, "' stores as 4")));
}

TEST(RecipeTest, NamesAndModels) {
  for (const char* name : {"Demo", "a_b", "-a", "a-", "ä", "a b"}) {
    v1::Recipe recipe = Parsed(kSmallest);
    recipe.set_name(name);
    EXPECT_THAT(CheckRecipe(recipe), StatusIs(absl::StatusCode::kInvalidArgument, StartsWith("name must be"))) << name;
  }
  v1::Recipe recipe = Parsed(kSmallest);
  recipe.set_name(std::string(64, 'a'));
  EXPECT_THAT(CheckRecipe(recipe), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ParseRecipe("name: x\ndata: {task: piqa, seeds: {benchmark: piqa}}", "r.yaml", "/"),
              StatusIs(absl::StatusCode::kInvalidArgument, StartsWith("r.yaml:1: student.model is missing")));
}

TEST(RecipeTest, FilesOfARecipe) {
  const fs::path folder = fs::path(::testing::TempDir()) / "recipe_test_data";
  fs::remove_all(folder);
  ASSERT_THAT(WriteFileAtomically(folder / "piqa/train.jsonl", "{}\n"), IsOk());
  const v1::Recipe recipe = Parsed(std::string(kSmallest) + "evaluate: {benchmarks: [{name: piqa}]}\n");
  EXPECT_THAT(RecipeFiles(recipe, folder),
              StatusIs(absl::StatusCode::kNotFound,
                       HasSubstr("piqa/validation.jsonl; bring it with: refinery data pull piqa")));
  ASSERT_THAT(WriteFileAtomically(folder / "piqa/validation.jsonl", "{}\n"), IsOk());
  StatusOr<std::map<std::string, fs::path>> files = RecipeFiles(recipe, folder);
  ASSERT_THAT(files, IsOk());
  EXPECT_THAT(*files,
              ::testing::UnorderedElementsAre(::testing::Pair("seeds", folder / "piqa/train.jsonl"),
                                              ::testing::Pair("benchmark/piqa", folder / "piqa/validation.jsonl")));
  v1::Recipe own = recipe;
  own.mutable_data()->mutable_seeds()->set_file("/nowhere/seeds.jsonl");
  EXPECT_THAT(RecipeFiles(own, folder),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("data.seeds.file: no file /nowhere")));
  fs::remove_all(folder);
}

TEST(RecipeTest, MissingAndOversizedFiles) {
  EXPECT_THAT(LoadRecipe("/nowhere/r.yaml"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nowhere/r.yaml")));
  EXPECT_THAT(ParseRecipe(std::string(limits::kMaxRecipeBytes + 1, '#'), "r.yaml", "/"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a recipe has at most")));
}

TEST(RecipeTest, EveryCommittedRecipeIsGood) {
  int recipes = 0;
  for (const auto& entry : fs::directory_iterator(REFINERY_SOURCE_DIR "/deploy/recipes")) {
    if (entry.path().extension() != ".yaml") continue;
    EXPECT_THAT(LoadRecipe(entry.path()), IsOk()) << entry.path();
    ++recipes;
  }
  EXPECT_GE(recipes, 1);
}

}  // namespace
}  // namespace refinery
