// server/report/sections.h
//
// The parts of a report besides the variants: trials, data, notes, times.

#pragma once

#include <string>
#include <vector>

#include "refinery/v1/events.pb.h"
#include "refinery/v1/job_service.pb.h"
#include "server/report/document.h"

namespace refinery::report {

Table TrialRows(const v1::Job& job);
// `summary` is curate's summary.json: an object of counts; empty when it is none.
Table DataRows(const std::string& summary);
// Held-out perplexity and KL of the plainly rounded, the quantized and the recovered model. Empty where nothing was held out.
Table QuantizationRows(const v1::Job& job);
// Bytes of each exported format, with and without embeddings, and of its linear layers beside bfloat16. Empty before the export.
Table ExportRows(const v1::Job& job);
// Equal notes are one row with their count.
Table NoteRows(const std::vector<v1::Event>& notes);
// Tasks that failed for good.
Table FailureRows(const v1::Job& job);
Table KindTimeRows(const v1::Job& job);
Table TaskTimeRows(const v1::Job& job);

// "SYNTHESIZE" -> "synthesize".
std::string KindName(v1::TaskKind kind);

}  // namespace refinery::report
