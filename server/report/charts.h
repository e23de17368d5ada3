// server/report/charts.h
//
// The plots of a job's report, each an SVG or "" when there is nothing to show.

#pragma once

#include <map>
#include <string>
#include <vector>

#include "refinery/v1/job_service.pb.h"

namespace refinery::report {

struct CurvePoint {
  double step = 0;
  double loss = 0;
  double validation_loss = 0;  // NaN where none was measured
};
// Lines of curve.jsonl that are no JSON objects, or have no step and loss, are left out.
std::vector<CurvePoint> ParseCurve(const std::string& jsonl);

// `curves`: train task path -> curve.jsonl.
std::string LossChart(const v1::Job& job, const std::map<std::string, std::string>& curves);
std::string ValidationChart(const v1::Job& job, const std::map<std::string, std::string>& curves);
std::string SearchChart(const v1::Job& job);
// Held-out KL of every variant over `measurement`, scaled by `scale`.
std::string QualityChart(const v1::Job& job, const std::string& measurement, double scale, const std::string& title,
                         const std::string& x_label);

}  // namespace refinery::report
