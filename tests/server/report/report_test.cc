#include "server/report/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/report/charts.h"
#include "server/report/numbers.h"
#include "server/report/sections.h"
#include "server/report/variants.h"
#include "tests/server/report/support.h"

namespace refinery::report {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

v1::Task* Find(v1::Job* job, const std::string& path) {
  for (v1::Task& task : *job->mutable_tasks())
    if (task.path() == path) return &task;
  return nullptr;
}

void SetKl(v1::Job* job, const std::string& variant, double value, double error) {
  v1::Measurement* kl = Find(job, "evaluate/" + variant)->mutable_measurements(0);
  ASSERT_EQ(kl->name(), "held_out_kl");
  kl->set_value(value);
  kl->set_standard_error(error);
}

TEST(ReportTest, SummaryTableIsAligned) {
  EXPECT_EQ(SummaryTable(ExampleInput().job),
            "variant           KL [nats]    perplexity  answers right   arc_easy acc      size  ms/token   seeds\n"
            "student       0.610 ± 0.021  13.60 ± 0.31  0.380 ± 0.090  0.520 ± 0.035  269.0 MB      14.2       –\n"
            "student-gptq  0.653 ± 0.021  14.20 ± 0.31  0.376 ± 0.090  0.505 ± 0.035  112.4 MB      9.10       –\n"
            "refined       0.402 ± 0.021  11.05 ± 0.31  0.386 ± 0.090  0.545 ± 0.035  269.0 MB      14.1  1 of 2\n"
            "refined-gptq  0.431 ± 0.021  11.37 ± 0.31  0.383 ± 0.090  0.530 ± 0.035  112.4 MB      9.00  1 of 2\n"
            "best-adamw    0.447 ± 0.021  11.55 ± 0.31  0.384 ± 0.090  0.535 ± 0.035  269.0 MB      14.3  1 of 2\n"
            "best-muon     0.402 ± 0.021  11.05 ± 0.31  0.386 ± 0.090  0.545 ± 0.035  269.0 MB      14.1  1 of 2\n");
}

TEST(ReportTest, AMissingVariantIsADash) {
  v1::Job job = ExampleInput().job;
  Find(&job, "evaluate/best-adamw")->clear_measurements();
  EXPECT_THAT(SummaryTable(job), HasSubstr("best-adamw                –             –"));
  v1::Job empty;
  EXPECT_THAT(SummaryTable(empty), StartsWith("variant"));
}

// The numbers: difference 0.653 - 0.431 = 0.222; error sqrt(2) * 0.021 = 0.0297; 0.222 / 0.0297 = 7.48.
TEST(ClaimTest, HoldsWithItsNumbers) {
  const Claim claim = ClaimOf(ExampleInput().job);
  EXPECT_TRUE(claim.holds);
  EXPECT_THAT(claim.sentence,
              HasSubstr("alone: yes. 0.4310 against 0.6530 nats per token, lower by 0.222 = 7.5 standard errors"));
  EXPECT_THAT(claim.sentence, HasSubstr("(0.030; 24 held-out examples"));
}

TEST(ClaimTest, IsHonestWhenItDoesNotHold) {
  v1::Job job = ExampleInput().job;
  SetKl(&job, "refined-gptq", 0.700, 0.01);
  SetKl(&job, "student-gptq", 0.653, 0.01);
  EXPECT_FALSE(ClaimOf(job).holds);
  EXPECT_THAT(ClaimOf(job).sentence,
              HasSubstr("alone: no. 0.7000 against 0.6530 nats per token, higher by 0.0470 = 3.3 standard"));

  SetKl(&job, "refined-gptq", 0.650, 0.01);
  EXPECT_FALSE(ClaimOf(job).holds) << "lower by chance is no proof";
  EXPECT_THAT(ClaimOf(job).sentence, HasSubstr("alone: yes, but within the noise."));

  SetKl(&job, "refined-gptq", 0.660, 0.01);
  EXPECT_THAT(ClaimOf(job).sentence, HasSubstr("alone: no, though within the noise."));
  EXPECT_FALSE(ClaimOf(job).holds);

  SetKl(&job, "refined-gptq", 0.5, 0);
  EXPECT_THAT(ClaimOf(job).sentence, HasSubstr("standard errors are not known"));

  SetKl(&job, "refined-gptq", std::numeric_limits<double>::quiet_NaN(), 0);
  EXPECT_FALSE(ClaimOf(job).holds);
  EXPECT_THAT(ClaimOf(job).sentence, HasSubstr("cannot be said, refined-gptq was not measured"));
}

TEST(ReportTest, HoldsEveryPart) {
  const Report report = MakeReport(ExampleInput());
  for (const char* part : {"Refinery report: demo", "demo-3f2a", "Results", "Trials", "Data", "Fallbacks and notes",
                           "Times", "Recipe", "lower by 0.222", "damping_raised", "by expected improvement", "diverged",
                           "written by the teacher", "synthesize/0"}) {
    EXPECT_THAT(report.html, HasSubstr(part));
    EXPECT_THAT(report.markdown, HasSubstr(EscapeMarkdown(part)));
  }
  EXPECT_THAT(report.table, HasSubstr("lower by 0.222"));
  EXPECT_THAT(report.markdown, HasSubstr("trial 3, which has the lowest mean validation loss"));
  size_t charts = 0;
  for (size_t at = 0; (at = report.html.find("<svg", at)) != std::string::npos; ++at) ++charts;
  EXPECT_EQ(charts, 5u);
}

TEST(ReportTest, HtmlIsSelfContained) {
  const std::string html = MakeReport(ExampleInput()).html;
  for (const char* outside : {"<script", "<link", "<img", "src=", "@import", "url(", "href="})
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  // The only address is the name of the SVG format.
  for (size_t at = 0; (at = html.find("http", at)) != std::string::npos; ++at)
    EXPECT_EQ(html.substr(at, 26), "http://www.w3.org/2000/svg");
}

TEST(ReportTest, TextFromOutsideIsEscapedEverywhere) {
  ReportInput input = ExampleInput();
  const std::string evil = "<script>alert('x')</script>|`*";
  input.job.set_id(evil);
  input.job.set_reason(evil);
  input.job.mutable_recipe()->set_name(evil);
  input.job.mutable_recipe()->mutable_student()->set_model(evil);
  input.job.mutable_recipe()->mutable_evaluate()->mutable_benchmarks(0)->set_name(evil);
  input.job.mutable_trials(0)->mutable_settings()->set_optimizer(evil);
  input.job.mutable_trials(0)->set_origin(evil);
  input.job.mutable_tasks(0)->set_worker(evil);
  input.job.mutable_tasks(0)->set_path(evil);
  input.job.mutable_tasks(0)->set_state(v1::Task::DEAD);
  input.job.mutable_tasks(0)->mutable_error()->set_message(evil);
  input.notes[0].mutable_task_note()->mutable_note()->set_text(evil);
  input.curate_summary = R"({"<script>": "<script>"})";
  const Report report = MakeReport(input);
  EXPECT_THAT(report.html, Not(HasSubstr("<script")));
  EXPECT_THAT(report.html, HasSubstr("&lt;script&gt;"));
  // In Markdown the recipe's code block may hold it, as code shows no HTML.
  EXPECT_THAT(report.markdown.substr(0, report.markdown.find("## Recipe")), Not(HasSubstr("<script")));
}

TEST(ReportTest, AnEmptyJobStillHasAReport) {
  const Report report = MakeReport({});
  EXPECT_THAT(report.html, HasSubstr("cannot be said"));
  EXPECT_THAT(report.html, Not(HasSubstr("<svg")));
  EXPECT_THAT(report.html, HasSubstr("nothing fell back"));
}

// Goal: plain rounding, GPTQ and recovery stand beside one another, in the tasks' order.
TEST(SectionsTest, QuantizationIsShownBesidePlainRounding) {
  v1::Job job;
  EXPECT_TRUE(QuantizationRows(job).rows.empty());
  const auto add = [&](v1::TaskKind kind, const std::string& path, std::initializer_list<std::pair<const char*, double>> figures) {
    v1::Task* task = job.add_tasks();
    task->set_kind(kind);
    task->set_path(path);
    for (const auto& [name, value] : figures) {
      v1::Measurement* measurement = task->add_measurements();
      measurement->set_name(name);
      measurement->set_value(value);
      measurement->set_count(2048);
    }
  };
  add(v1::QUANTIZE, "quantize/refined",
      {{"source_perplexity", 8}, {"quantized_perplexity", 10}, {"rounded_perplexity", 16}, {"quantized_kl", 0.25}, {"rounded_kl", 0.75}});
  add(v1::RECOVER, "recover/refined", {{"source_perplexity", 8}, {"recovered_perplexity", 9}, {"recovered_kl", 0.125}});
  add(v1::QUANTIZE, "quantize/student", {{"relative_error", 0.01}});  // nothing was held out
  EXPECT_THAT(QuantizationRows(job).rows,
              ElementsAre(ElementsAre("quantize/refined", "plainly rounded", "2048", "16.00", "2.000", "0.7500"),
                          ElementsAre("quantize/refined", "GPTQ", "2048", "10.00", "1.250", "0.2500"),
                          ElementsAre("recover/refined", "recovered", "2048", "9.000", "1.125", "0.1250")));
}

TEST(SectionsTest, ExportedFormatsShowTheirBytes) {
  v1::Job job;
  EXPECT_TRUE(ExportRows(job).rows.empty());
  v1::Task* task = job.add_tasks();
  task->set_kind(v1::EXPORT);
  for (const auto& [name, value] : {std::pair{"gguf/model_bytes", 116483328.0}, std::pair{"gguf/model_bytes_without_embeddings", 59860224.0},
                                    std::pair{"gguf/linear_bytes_to_bf16", 0.28125}}) {
    v1::Measurement* measurement = task->add_measurements();
    measurement->set_name(name);
    measurement->set_value(value);
  }
  EXPECT_THAT(ExportRows(job).rows, ElementsAre(ElementsAre("gguf", "116.5 MB", "59.9 MB", "0.2812")));
}

TEST(SectionsTest, EqualNotesAreOneRow) {
  const Table table = NoteRows(ExampleInput().notes);
  ASSERT_EQ(table.rows.size(), 1u);
  EXPECT_EQ(table.rows[0][3], "2");
}

TEST(SectionsTest, DataStartsWithTheTotals) {
  const Table table = DataRows(ExampleInput().curate_summary);
  EXPECT_THAT(table.rows[0], ElementsAre("written by the teacher", "128"));
  EXPECT_THAT(table.rows, Contains(ElementsAre("dropped or set aside: duplicate", "21")));
  EXPECT_TRUE(DataRows("").rows.empty());
  EXPECT_TRUE(DataRows("[1]").rows.empty());
  EXPECT_THAT(DataRows(R"({"reasons": {"short": 2}})").rows,
              ElementsAre(ElementsAre("dropped or set aside: reasons.short", "2")));
}

// Goal: the line that the table names is the one that the reader sees.  Method: look it up in the printed recipe.
TEST(VariantsTest, MeasurementsNameTheLineOfTheRecipe) {
  const v1::Job job = ExampleInput().job;
  std::vector<std::string> lines = {""};
  for (char c : MessageToYaml(job.recipe())) {
    if (c == '\n') lines.emplace_back();
    if (c != '\n') lines.back() += c;
  }
  int checked = 0;
  for (const auto& row : MeasurementRows(job).rows) {
    const size_t line = std::stoul(row[8]);
    ASSERT_LE(line, lines.size());
    const std::map<std::string, std::string> expected = {{"arc_easy/acc", "- name: arc_easy"},
                                                         {"held_out_kl", "held_out_fraction:"},
                                                         {"ms_per_token", "latency_tokens:"}};
    if (auto it = expected.find(row[1]); it != expected.end()) {
      EXPECT_THAT(lines[line - 1], HasSubstr(it->second));
    }
    ++checked;
  }
  EXPECT_EQ(checked, 6 * 7);
}

TEST(CurveTest, BadLinesAreLeftOut) {
  const std::vector<CurvePoint> points = ParseCurve(
      "{\"step\":1,\"loss\":2.5}\nnot json\n[]\n{\"step\":2,\"loss\":null}\n{\"loss\":1}\n"
      "{\"step\":3,\"loss\":2,\"validation_loss\":2.25}\n");
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(points[0].loss, 2.5);
  EXPECT_TRUE(std::isnan(points[0].validation_loss));
  EXPECT_EQ(points[1].validation_loss, 2.25);
}

TEST(NumbersTest, ErrorsHaveTwoDigitsAndValuesAsManyDecimals) {
  EXPECT_EQ(WithError(0.41234, 0.0347), "0.412 ± 0.035");
  EXPECT_EQ(WithError(13.597, 0.31), "13.60 ± 0.31");
  EXPECT_EQ(WithError(1234.5, 21.7), "1234 ± 22");
  EXPECT_EQ(WithError(0.5, 0), "0.5000");
  EXPECT_EQ(WithError(0.5, std::numeric_limits<double>::quiet_NaN()), "0.5000");
  EXPECT_EQ(Digits(123456, 3), "123456");
  EXPECT_EQ(Digits(0.00123456, 3), "0.00123");
  EXPECT_EQ(Digits(1.5e-7, 2), "1.5e-07");
  EXPECT_EQ(Digits(0, 3), "0.00");
  EXPECT_EQ(Seconds(59.94), "59.9 s");
  EXPECT_EQ(Seconds(185), "3 min 05 s");
  EXPECT_EQ(Seconds(7620), "2 h 07 min");
  EXPECT_EQ(Count(1, "seed"), "1 seed");
  EXPECT_EQ(Count(0, "seed"), "0 seeds");
}

}  // namespace
}  // namespace refinery::report
