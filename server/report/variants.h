// server/report/variants.h
//
// The evaluated variants of a job and what follows from them: the summary table and the claim that the job was run for.

#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "refinery/v1/job_service.pb.h"
#include "server/report/document.h"

namespace refinery::report {

struct Variant {
  std::string name;      // "student", "refined-gptq", ...
  bool trained = false;  // holds an adapter
  std::map<std::string, v1::Measurement> measurements;

  // The measurement `name`, or null.
  const v1::Measurement* Find(const std::string& name) const;
};

// In the order of the report; variants that the job does not evaluate are left out, those without a result have no
// measurements.
std::vector<Variant> VariantsOf(const v1::Job& job);
const Variant* FindVariant(const std::vector<Variant>& variants, const std::string& name);

// One row per variant.
Table SummaryRows(const v1::Job& job);
// Every measurement with its standard error, items, seeds and the place in the recipe that asked for it.
Table MeasurementRows(const v1::Job& job);

// "Refined + GPTQ has lower held-out KL to the teacher than GPTQ alone": whether it is so, by how much, in standard
// errors.
struct Claim {
  bool holds = false;  // lower, by at least two standard errors where those are known
  std::string sentence;
};
Claim ClaimOf(const v1::Job& job);

// Index of the successful trial with the lowest mean objective (ties: the lower index), or none.
std::optional<uint32_t> BestTrial(const v1::Job& job);

}  // namespace refinery::report
