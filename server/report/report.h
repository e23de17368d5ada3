// server/report/report.h
//
// The report of a finished job: report.md, a self-contained report.html with plots (inline SVG, no scripts, no
// network), and the summary table for the terminal. Pure.

#pragma once

#include <map>
#include <string>
#include <vector>

#include "refinery/v1/events.pb.h"
#include "refinery/v1/job_service.pb.h"

namespace refinery::report {

struct ReportInput {
  v1::Job job;                                // with tasks, measurements and trials
  std::vector<v1::Event> notes;               // every TaskNote event
  std::map<std::string, std::string> curves;  // train task path -> its curve.jsonl (lines {"step","loss","kl",
                                              // "cross_entropy","validation_loss"?,"seconds"})
  std::string curate_summary;                 // summary.json of curate
};

struct Report {
  std::string markdown;
  std::string html;
  std::string table;  // plain text, aligned, for the terminal and the job's log
};

Report MakeReport(const ReportInput& input);

// The summary table alone: one row per variant (student, student-gptq, refined, refined-gptq,
// refined-recovered, best-adamw, best-muon).
std::string SummaryTable(const v1::Job& job);

}  // namespace refinery::report
