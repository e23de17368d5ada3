#include "server/plan/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <set>

#include "common/digest.h"
#include "common/recipe.h"
#include "tests/support/status_matchers.h"

namespace refinery::plan {
namespace {

using refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

v1::Recipe DemoRecipe() {
  StatusOr<v1::Recipe> recipe = LoadRecipe(REFINERY_SOURCE_DIR "/deploy/recipes/demo.yaml");
  RF_CHECK(recipe.ok());
  // The summaries show the model's place, which has the user's home in it.
  recipe->mutable_student()->set_model("/models/small.gguf");
  recipe->mutable_teacher()->set_model("/models/small.gguf");
  // The numbers of the demo are tuned now and then; its shape is what is tested.
  recipe->mutable_data()->mutable_synthesize()->set_examples(128);
  recipe->mutable_data()->mutable_synthesize()->set_shards(1);
  recipe->mutable_data()->mutable_critique()->set_keep_fraction(0.7);
  recipe->mutable_teacher()->mutable_context()->set_few_shot(5);
  recipe->mutable_distill()->set_steps(20);
  recipe->mutable_distill()->set_top_k(64);
  recipe->mutable_distill()->mutable_lora()->set_rank(16);
  recipe->mutable_quantize()->mutable_recover()->set_steps(64);
  recipe->mutable_search()->set_trials(4);
  recipe->mutable_search()->set_replicates(2);
  return *recipe;
}

// Small and independent of the demo's numbers.
v1::Recipe SmallRecipe() {
  v1::Recipe recipe;
  recipe.set_name("small");
  recipe.mutable_student()->set_model("/m/student");
  recipe.mutable_data()->set_task("piqa");
  recipe.mutable_data()->mutable_seeds()->set_file("/seeds.jsonl");
  recipe.mutable_data()->mutable_seeds()->set_limit(40);
  recipe.mutable_data()->mutable_synthesize()->set_examples(10);
  recipe.mutable_data()->mutable_synthesize()->set_shards(3);
  recipe.mutable_search()->set_trials(2);
  recipe.mutable_search()->set_replicates(2);
  v1::Parameter* optimizer = recipe.mutable_search()->add_parameters();
  optimizer->set_name("optimizer");
  optimizer->add_choices("muon");
  optimizer->add_choices("adamw");
  v1::Benchmark* benchmark = recipe.mutable_evaluate()->add_benchmarks();
  benchmark->set_name("piqa");
  benchmark->set_file("/piqa.jsonl");
  benchmark->set_limit(50);
  FillDefaults(&recipe);
  return recipe;
}

std::map<std::string, std::string> Files(const v1::Recipe& recipe) {
  std::map<std::string, std::string> files = {{"seeds", DigestOf("seeds")}};
  for (const v1::Benchmark& benchmark : recipe.evaluate().benchmarks())
    files[Join("benchmark/", benchmark.name())] = DigestOf(benchmark.name());
  if (!recipe.quantize().gptq().calibration().general().empty()) files["general"] = DigestOf("general");
  return files;
}

Plan MustPlan(const v1::Recipe& recipe) {
  StatusOr<Plan> plan = MakePlan(recipe, Files(recipe));
  EXPECT_THAT(plan, refinery::testing::IsOk());
  return plan.ok() ? *plan : Plan();
}

std::vector<std::string> InputsOf(const PlannedTask& task) {
  std::vector<std::string> lines;
  for (const Input& input : task.inputs) {
    const char* source = input.source == Input::Source::kFile   ? "file"
                         : input.source == Input::Source::kTask ? "task"
                                                                : "study";
    lines.push_back(Join(input.name, " = ", source, " ", input.from));
  }
  return lines;
}

// Goal: the order can run and every edge ends somewhere.  Method: needs come before, inputs from tasks are among the
// needs.
TEST(PlanTest, OrderIsTopologicalAndEveryInputIsNeeded) {
  for (const v1::Recipe& recipe : {DemoRecipe(), SmallRecipe()}) {
    const Plan plan = MustPlan(recipe);
    std::set<std::string> before;
    for (const PlannedTask& task : plan.tasks) {
      const std::set<std::string> needs(task.needs.begin(), task.needs.end());
      EXPECT_EQ(needs.size(), task.needs.size()) << task.path << " needs one task twice";
      for (const std::string& need : needs) EXPECT_TRUE(before.count(need)) << task.path << " comes before " << need;
      std::set<std::string> names;
      for (const Input& input : task.inputs) {
        EXPECT_TRUE(names.insert(input.name).second) << task.path << " has two inputs " << input.name;
        if (input.source == Input::Source::kTask) {
          EXPECT_TRUE(needs.count(input.from)) << task.path;
        } else if (input.source == Input::Source::kFile) {
          EXPECT_TRUE(Files(recipe).count(input.from)) << task.path;
        } else {
          for (const PlannedTask& other : plan.tasks) {
            EXPECT_TRUE(other.kind != v1::TRAIN || needs.count(other.path)) << task.path;
          }
        }
      }
      EXPECT_TRUE(before.insert(task.path).second) << task.path << " stands twice";
      EXPECT_EQ(task.spec.path(), task.path);
    }
  }
}

TEST(PlanTest, EveryTaskHasTheParametersOfItsKind) {
  for (const PlannedTask& task : MustPlan(DemoRecipe()).tasks) {
    // Kind n carries the member n + 9 of the oneof (recipe order in task.proto).
    EXPECT_EQ(static_cast<int>(task.spec.params_case()), static_cast<int>(task.kind) + 9) << task.path;
  }
}

TEST(PlanTest, TheDemosPlanAsText) {
  const std::string text = PlanText(MustPlan(DemoRecipe()));
  const std::string golden =
      R"(task                        what                                                           after
import/student              read /models/small.gguf
synthesize/0                the teacher writes 128 examples                                import/student
critique/0                  the judge keeps the best 70 %                                  import/student, synthesize/0
curate                      drop duplicates and benchmark items, split                     critique/0
teacher-logits              top 64 of the teacher per token, which sees 5 solved examples  import/student, curate
trial/0/replicate/0         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/0/replicate/1         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/1/replicate/0         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/1/replicate/1         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/2/replicate/0         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/2/replicate/1         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/3/replicate/0         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
trial/3/replicate/1         train a rank-16 adapter for 20 steps                           import/student, curate, teacher-logits
merge/best                  fold the best adapter into the student                         import/student, every trial (8)
quantize/student            GPTQ 4 bit, groups of 64 of the untouched student              import/student, curate
quantize/refined            GPTQ 4 bit, groups of 64 of the refined model                  import/student, curate, every trial (8)
recover/refined             tune its scales for up to 64 steps                             import/student, quantize/refined, curate, every trial (8)
evaluate/student            measure held-out KL, speed, arc_easy                           import/student, curate, teacher-logits
evaluate/student-gptq       measure held-out KL, speed, arc_easy                           import/student, quantize/student, curate, teacher-logits
evaluate/refined            measure held-out KL, speed, arc_easy                           import/student, curate, teacher-logits, every trial (8)
evaluate/refined-gptq       measure held-out KL, speed, arc_easy                           import/student, quantize/refined, curate, teacher-logits
evaluate/refined-recovered  measure held-out KL, speed, arc_easy                           import/student, recover/refined, curate, teacher-logits
evaluate/best-adamw         measure held-out KL, speed, arc_easy                           import/student, curate, teacher-logits, every trial (8)
evaluate/best-muon          measure held-out KL, speed, arc_easy                           import/student, curate, teacher-logits, every trial (8)
export                      write the model folders and the manifest                       import/student, recover/refined, merge/best, every trial (8)
25 tasks
)";
  EXPECT_EQ(text, golden);
}

TEST(PlanTest, ATeacherOfItsOwnIsImportedAndUsed) {
  v1::Recipe recipe = SmallRecipe();
  EXPECT_EQ(MustPlan(recipe).Find("import/teacher"), nullptr);
  recipe.mutable_teacher()->set_model("/m/teacher");
  const Plan plan = MustPlan(recipe);
  ASSERT_NE(plan.Find("import/teacher"), nullptr);
  EXPECT_EQ(plan.Find("import/teacher")->spec.import_model().uri(), "/m/teacher");
  for (const char* path : {"synthesize/0", "critique/2", "teacher-logits"}) {
    ASSERT_NE(plan.Find(path), nullptr) << path;
    EXPECT_EQ(InputsOf(*plan.Find(path))[0], "teacher = task import/teacher") << path;
  }
}

TEST(PlanTest, InputsOfEachStage) {
  const Plan plan = MustPlan(SmallRecipe());
  EXPECT_THAT(InputsOf(*plan.Find("curate")),
              ElementsAre("scored-0 = task critique/0", "scored-1 = task critique/1", "scored-2 = task critique/2",
                          "seeds = file seeds", "benchmark-piqa = file benchmark/piqa"));
  EXPECT_THAT(InputsOf(*plan.Find("teacher-logits")),
              ElementsAre("teacher = task import/student", "student = task import/student", "examples = task curate",
                          "seeds = file seeds"));
  EXPECT_THAT(InputsOf(*plan.Find("trial/1/replicate/0")),
              ElementsAre("student = task import/student", "examples = task curate", "logits = task teacher-logits"));
  EXPECT_THAT(InputsOf(*plan.Find("merge/best")), ElementsAre("student = task import/student", "adapter = study best"));
  EXPECT_THAT(InputsOf(*plan.Find("quantize/student")),
              ElementsAre("student = task import/student", "examples = task curate"));
  EXPECT_THAT(InputsOf(*plan.Find("quantize/refined")),
              ElementsAre("student = task import/student", "adapter = study best", "examples = task curate"));
  EXPECT_THAT(InputsOf(*plan.Find("recover/refined")),
              ElementsAre("student = task import/student", "adapter = study best", "quantized = task quantize/refined",
                          "examples = task curate"));
  EXPECT_THAT(
      InputsOf(*plan.Find("evaluate/refined-gptq")),
      ElementsAre("student = task import/student", "quantized = task quantize/refined", "examples = task curate",
                  "logits = task teacher-logits", "benchmark-piqa = file benchmark/piqa"));
  EXPECT_THAT(InputsOf(*plan.Find("evaluate/best-adamw")),
              ElementsAre("student = task import/student", "adapter = study best-adamw", "examples = task curate",
                          "logits = task teacher-logits", "benchmark-piqa = file benchmark/piqa"));
  EXPECT_THAT(InputsOf(*plan.Find("export")),
              ElementsAre("student = task import/student", "adapter = study best", "quantized = task recover/refined",
                          "merged = task merge/best"));
}

// Goal: general text reaches both quantizations as an input, and only the delivered model has gates.
TEST(PlanTest, CalibrationTextIsAnInputAndGatesAreTheDeliveredModels) {
  v1::Recipe recipe = SmallRecipe();
  recipe.mutable_quantize()->mutable_recover()->set_enabled(false);
  v1::Gptq* gptq = recipe.mutable_quantize()->mutable_gptq();
  gptq->set_max_kl(0.25);
  gptq->set_max_ppl_ratio(1.5);
  gptq->set_bits_budget(3.5);
  gptq->mutable_calibration()->set_general("/texts/general.txt");
  gptq->mutable_calibration()->set_general_share(0.25);
  const Plan plan = MustPlan(recipe);
  const PlannedTask& student = *plan.Find("quantize/student");
  const PlannedTask& refined = *plan.Find("quantize/refined");
  EXPECT_EQ(InputsOf(student).back(), "general = file general");
  EXPECT_EQ(InputsOf(refined).back(), "general = file general");
  EXPECT_EQ(student.spec.quantize().gptq().max_kl(), 0);
  EXPECT_EQ(student.spec.quantize().gptq().max_ppl_ratio(), 0);
  EXPECT_EQ(refined.spec.quantize().gptq().max_kl(), 0.25);
  EXPECT_EQ(refined.spec.quantize().gptq().max_ppl_ratio(), 1.5);
  EXPECT_EQ(refined.spec.quantize().gptq().calibration().general(), "");  // a path of the user's machine changes no task
  EXPECT_EQ(refined.spec.quantize().gptq().calibration().general_share(), 0.25);
  EXPECT_THAT(refined.summary, HasSubstr("3.5 bits a weight on average"));
  EXPECT_THAT(refined.spec.quantize().formats(), ElementsAre("gptq"));  // what its budget bounds
  EXPECT_EQ(MustPlan(SmallRecipe()).Find("quantize/refined")->spec.quantize().formats_size(), 0);
}

// Goal: what recovery can still mend stops no job; the gates move on to the recovered model.
TEST(PlanTest, WithRecoveryTheGatesAreTheRecoveredModels) {
  v1::Recipe recipe = SmallRecipe();
  v1::Gptq* gptq = recipe.mutable_quantize()->mutable_gptq();
  gptq->set_max_kl(0.25);
  gptq->set_max_ppl_ratio(1.5);
  gptq->set_held_out_tokens(512);
  gptq->set_sequence_length(128);
  const Plan plan = MustPlan(recipe);
  EXPECT_EQ(plan.Find("quantize/refined")->spec.quantize().gptq().max_kl(), 0);
  EXPECT_EQ(plan.Find("quantize/refined")->spec.quantize().gptq().max_ppl_ratio(), 0);
  const v1::QualityGate& gate = plan.Find("recover/refined")->spec.recover().gate();
  EXPECT_EQ(gate.max_kl(), 0.25);
  EXPECT_EQ(gate.max_ppl_ratio(), 1.5);
  EXPECT_EQ(gate.held_out_tokens(), 512u);
  EXPECT_EQ(gate.sequence_length(), 128u);
}

// Goal: what is delivered is recovered unless the recipe says no.
TEST(PlanTest, RecoveryCanBeSwitchedOff) {
  v1::Recipe recipe = SmallRecipe();
  recipe.mutable_quantize()->mutable_recover()->set_steps(9);
  Plan plan = MustPlan(recipe);
  EXPECT_EQ(plan.Find("recover/refined")->spec.recover().settings().steps(), 9u);
  EXPECT_NE(plan.Find("recover/refined")->spec.seed(), 0u);
  recipe.mutable_quantize()->mutable_recover()->set_enabled(false);
  plan = MustPlan(recipe);
  EXPECT_EQ(plan.Find("recover/refined"), nullptr);
  EXPECT_EQ(plan.Find("evaluate/refined-recovered"), nullptr);
  EXPECT_THAT(InputsOf(*plan.Find("export")),
              ElementsAre("student = task import/student", "adapter = study best", "quantized = task quantize/refined",
                          "merged = task merge/best"));
}

TEST(PlanTest, TrialsCarryIndexSettingsFreeParametersAndTheirOwnSeed) {
  const v1::Recipe recipe = SmallRecipe();
  const Plan plan = MustPlan(recipe);
  std::set<uint64_t> seeds;
  int trials = 0;
  for (const PlannedTask& task : plan.tasks) {
    if (task.kind != v1::TRAIN) {
      EXPECT_EQ(task.trial, -1) << task.path;
      continue;
    }
    ++trials;
    EXPECT_EQ(task.path, Join("trial/", task.trial, "/replicate/", task.replicate));
    EXPECT_EQ(task.spec.seed(), DeriveSeed(recipe.seed(), task.path));
    EXPECT_FALSE(task.spec.train().has_settings());
    EXPECT_EQ(task.spec.train().steps(), 30u);
    seeds.insert(task.spec.seed());
  }
  EXPECT_EQ(trials, 4);
  EXPECT_EQ(seeds.size(), 4u);
}

TEST(PlanTest, OnlyTriedOptimizersHaveAnEvaluation) {
  auto evaluations = [](const v1::Recipe& recipe) {
    std::vector<std::string> paths;
    for (const PlannedTask& task : MustPlan(recipe).tasks)
      if (task.kind == v1::EVALUATE) paths.push_back(task.path.substr(9));
    return paths;
  };
  v1::Recipe recipe = SmallRecipe();
  EXPECT_THAT(evaluations(recipe),
              UnorderedElementsAre("student", "student-gptq", "refined", "refined-gptq", "refined-recovered", "best-adamw", "best-muon"));
  recipe.mutable_search()->mutable_parameters(0)->mutable_choices()->RemoveLast();
  EXPECT_THAT(evaluations(recipe),
              UnorderedElementsAre("student", "student-gptq", "refined", "refined-gptq", "refined-recovered", "best-muon"));
  recipe.clear_search();
  recipe.mutable_distill()->mutable_optimizer()->mutable_adamw();
  FillDefaults(&recipe);
  EXPECT_THAT(evaluations(recipe),
              UnorderedElementsAre("student", "student-gptq", "refined", "refined-gptq", "refined-recovered", "best-adamw"));
}

TEST(PlanTest, EvaluationsTakeLimitsButNoClientPaths) {
  const Plan plan = MustPlan(SmallRecipe());
  const v1::EvaluateParams& params = plan.Find("evaluate/student")->spec.evaluate();
  ASSERT_EQ(params.benchmarks_size(), 1);
  EXPECT_EQ(params.benchmarks(0).limit(), 50u);
  EXPECT_EQ(params.benchmarks(0).split(), "validation");
  EXPECT_EQ(params.benchmarks(0).file(), "");
  EXPECT_EQ(params.latency_tokens(), 32u);
}

// Goal: with shards each variant's benchmark items are shared by that many tasks, and the variant's own task merges them: it
// reads no benchmark, they read neither examples nor logits.
TEST(PlanTest, ShardedEvaluationsAreMerged) {
  v1::Recipe recipe = SmallRecipe();
  recipe.mutable_evaluate()->set_shards(3);
  const Plan plan = MustPlan(recipe);
  const PlannedTask* merge = plan.Find("evaluate/student-gptq");
  ASSERT_NE(merge, nullptr);
  EXPECT_TRUE(merge->spec.evaluate().merge());
  EXPECT_EQ(merge->spec.evaluate().shards(), 3u);
  std::vector<std::string> names;
  for (const Input& input : merge->inputs) names.push_back(input.name);
  EXPECT_THAT(names, ::testing::ElementsAre("student", "quantized", "examples", "logits", "shard-0", "shard-1", "shard-2"));
  for (uint32_t shard = 0; shard < 3; ++shard) {
    const PlannedTask* task = plan.Find(Join("evaluate/student-gptq/shard/", shard));
    ASSERT_NE(task, nullptr);
    EXPECT_EQ(task->spec.evaluate().shard(), shard);
    EXPECT_EQ(task->spec.evaluate().shards(), 3u);
    EXPECT_FALSE(task->spec.evaluate().merge());
    EXPECT_EQ(task->spec.evaluate().variant(), "student-gptq");
    names.clear();
    for (const Input& input : task->inputs) names.push_back(input.name);
    EXPECT_THAT(names, ::testing::ElementsAre("student", "quantized", "benchmark-piqa"));
    EXPECT_THAT(merge->needs, ::testing::Contains(task->path));
  }
}

// Goal: what is the same work is done once.  Method: the refined model and the best Muon model get the same adapter.
TEST(PlanTest, EqualEvaluationsHaveEqualDigests) {
  const Plan plan = MustPlan(SmallRecipe());
  auto digest = [&](const std::string& path, const std::string& adapter) {
    v1::TaskSpec spec = plan.Find(path)->spec;
    for (const Input& input : plan.Find(path)->inputs) {
      v1::ArtifactRef* ref = spec.add_inputs();
      ref->set_name(input.name);
      ref->set_digest(DigestOf(input.name == "adapter" ? adapter : input.from));
    }
    return TaskDigest(spec, "1");
  };
  EXPECT_EQ(digest("evaluate/refined", "a"), digest("evaluate/best-muon", "a"));
  EXPECT_NE(digest("evaluate/refined", "a"), digest("evaluate/best-adamw", "b"));
  EXPECT_NE(digest("evaluate/student", "a"), digest("evaluate/student-gptq", "a"));
  EXPECT_NE(digest("trial/0/replicate/0", "a"), digest("trial/0/replicate/1", "a"));
}

TEST(PlanTest, AMissingFileIsNamed) {
  const v1::Recipe recipe = SmallRecipe();
  EXPECT_THAT(MakePlan(recipe, {}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'seeds'")));
  EXPECT_THAT(MakePlan(recipe, {{"seeds", DigestOf("x")}}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'benchmark/piqa'")));
}

TEST(PlanTest, TooManyTasksAreRefused) {
  v1::Recipe recipe = SmallRecipe();
  recipe.mutable_search()->set_trials(1000);
  recipe.mutable_search()->set_replicates(100);
  EXPECT_THAT(MakePlan(recipe, Files(recipe)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("lower data.synthesize.shards")));
}

TEST(PlanTest, ShardsShareTheExamples) {
  const Plan plan = MustPlan(SmallRecipe());
  EXPECT_EQ(plan.Find("synthesize/0")->summary, "the teacher writes 4 examples");
  EXPECT_EQ(plan.Find("synthesize/2")->summary, "the teacher writes 3 examples");
  EXPECT_EQ(plan.Find("synthesize/2")->spec.synthesize().shard(), 2u);
  EXPECT_EQ(plan.Find("synthesize/2")->spec.synthesize().seed_limit(), 40u);
}

}  // namespace
}  // namespace refinery::plan
