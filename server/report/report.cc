#include "server/report/report.h"

#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "common/recipe.h"
#include "server/report/charts.h"
#include "server/report/document.h"
#include "server/report/numbers.h"
#include "server/report/sections.h"
#include "server/report/variants.h"

namespace refinery::report {
namespace {

std::string Subtitle(const v1::Job& job) {
  std::string text = Join("Job ", job.id());
  // The report is written before the job ends, so "running" would be the state of every good job.
  const std::string state = v1::Job::State_Name(job.state());
  if (job.state() == v1::Job::FAILED || job.state() == v1::Job::CANCELLED)
    text += Join(", ", Str(absl::AsciiStrToLower(View(state))));
  if (job.end_time_ms() > job.create_time_ms())
    text += Join(" after ", Seconds(static_cast<double>(job.end_time_ms() - job.create_time_ms()) / 1000));
  const v1::Recipe& recipe = job.recipe();
  text += Join(". Student ", recipe.student().model());
  text += recipe.teacher().model() == recipe.student().model() ? std::string(", its own teacher")
                                                               : Join(", teacher ", recipe.teacher().model());
  if (recipe.teacher().context().few_shot() > 0)
    text += Join(" (which sees ", recipe.teacher().context().few_shot(), " solved examples)");
  return text + Join(". Task ", recipe.data().task(), ". Seed ", recipe.seed(), ".");
}

void AddSummary(const v1::Job& job, Document* document) {
  const Claim claim = ClaimOf(job);
  document->Callout(claim.sentence, claim.holds);
  if (!job.reason().empty()) document->Callout(Join("The job ended early: ", job.reason()), false);
  document->Heading("Results");
  document->Add(SummaryRows(job));
  document->Paragraph(
      "KL: from the teacher to the model, per token. KL, perplexity and answers right: on the held-out examples, which "
      "were used neither for training nor for "
      "choosing. Values are mean ± standard error over items; it does not hold the spread between training seeds, "
      "which the "
      "trials below show. Seeds: training runs behind a number, out of those of the chosen trial; the one with the "
      "lowest "
      "validation loss was taken. Size: weights as stored, 1 MB = 1,000,000 bytes. Time per token: on the worker that "
      "ran the "
      "evaluation, while other tasks may have run.");
}

void AddFigures(const ReportInput& input, Document* document) {
  std::vector<std::string> figures;
  for (std::string svg :
       {LossChart(input.job, input.curves), ValidationChart(input.job, input.curves), SearchChart(input.job),
        QualityChart(input.job, "model_bytes", 1e-6, "Size against quality", "model size [MB]"),
        QualityChart(input.job, "ms_per_token", 1, "Latency against quality", "time per token [ms]")})
    if (!svg.empty()) figures.push_back(std::move(svg));
  if (figures.empty()) return;
  document->Heading("Plots");
  document->Figures(std::move(figures));
}

void AddTrials(const v1::Job& job, Document* document) {
  if (job.trials().empty()) return;
  document->Heading("Trials");
  const std::optional<uint32_t> best = BestTrial(job);
  document->Paragraph(best.has_value() ? Join("The refined model comes from trial ", *best,
                                              ", which has the lowest mean validation loss.")
                                       : std::string("No trial succeeded."));
  document->Paragraph(
      "Validation loss: nats per token, mean ± standard error over the seeds of a trial. From: a Sobol point of "
      "the start, or the Gaussian process model by expected improvement.");
  document->Add(TrialRows(job));
}

std::string NumberedLines(const std::string& text) {
  std::string out;
  int number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    out += absl::StrFormat("%3d  %s\n", ++number, text.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

}  // namespace

Report MakeReport(const ReportInput& input) {
  const v1::Job& job = input.job;
  Document document{.title = Join("Refinery report: ", job.recipe().name()), .subtitle = Subtitle(job)};
  AddSummary(job, &document);
  AddFigures(input, &document);
  AddTrials(job, &document);

  if (Table data = DataRows(input.curate_summary); !data.rows.empty()) {
    document.Heading("Data");
    document.Add(std::move(data));
  }
  if (Table quantized = QuantizationRows(job); !quantized.rows.empty()) {
    document.Heading("What quantization costs");
    document.Paragraph("On held-out examples, beside the model before it; gates are held against the last row of the delivered model.");
    document.Add(std::move(quantized));
  }
  if (Table exported = ExportRows(job); !exported.rows.empty()) {
    document.Heading("Exported formats");
    document.Add(std::move(exported));
  }
  document.Heading("Fallbacks and notes");
  Table notes = NoteRows(input.notes);
  if (notes.rows.empty()) {
    document.Paragraph("None: nothing fell back to another way.");
  } else {
    document.Add(std::move(notes));
  }
  if (Table failures = FailureRows(job); !failures.rows.empty()) {
    document.Heading("Failed tasks");
    document.Add(std::move(failures));
  }
  document.Heading("Times");
  document.Add(KindTimeRows(job));
  document.Fold(Join("Every task (", job.tasks_size(), ")"), TaskTimeRows(job));
  document.Heading("Every number");
  document.Paragraph(
      "The last columns say which part of the recipe asked for it, by field and by line of the recipe below.");
  document.Fold("Every measurement of every variant", MeasurementRows(job));
  document.Heading("Recipe");
  document.Paragraph("With every default filled in.");
  document.Code(NumberedLines(MessageToYaml(job.recipe())));
  return {.markdown = ToMarkdown(document),
          .html = ToHtml(document),
          .table = SummaryTable(job) + ClaimOf(job).sentence + "\n"};
}

std::string SummaryTable(const v1::Job& job) { return ToText(SummaryRows(job)); }

}  // namespace refinery::report
