// worker/task/distill/logit_cache.h
//
// Offline teacher distributions: for every answer token the top-k log-probabilities and the mass of the rest (the
// tail) at temperature 1 and over a grid of temperatures, keyed by the digest of the student's token ids.
// docs/formats.md holds the file layout.
//
// Shapes: N answer tokens over all examples, K entries per token, G points of the temperature grid (tail_grid.h).

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::distill {

struct TeacherRows {
  at::Tensor ids;          // [n, K] int32, descending by logit
  at::Tensor logits;       // [n, K] float32: log-probabilities, i.e. logits minus the row's log-partition at T = 1
  at::Tensor tail_logits;  // [n] float32: log of the mass outside the K entries at T = 1 (-inf when none)
  // [n, G] float32: log-partition of the tail per grid point; only temperatures other than 1 need it.
  at::Tensor tail_log_partitions = {};
};

struct LogitCacheInfo {
  std::string teacher_digest;
  std::string tokenizer_digest;
  int64_t vocab_size = 0;
  int64_t top_k = 0;
};

class LogitCache {
 public:
  static StatusOr<std::shared_ptr<LogitCache>> Open(const std::filesystem::path& folder);
  const LogitCacheInfo& info() const { return info_; }
  // Rows of one example, n = its answer tokens. NOT_FOUND when the key is not in the cache.
  StatusOr<TeacherRows> Get(const std::string& key) const;
  size_t size() const { return rows_.size(); }

 private:
  LogitCacheInfo info_;
  at::Tensor ids_, logits_, tail_logits_, tail_log_partitions_;
  std::map<std::string, std::pair<int64_t, int64_t>> rows_;  // key -> [begin, end)
};

// Collects rows and writes logits.safetensors + index.json. Rows are written in the order of their keys.
class LogitCacheWriter {
 public:
  explicit LogitCacheWriter(const LogitCacheInfo& info);
  // logits [n, V] any float dtype, as the teacher's head gave them for the positions that predict the n answer tokens.
  void Add(const std::string& key, const at::Tensor& logits);
  Status Write(const std::filesystem::path& folder) const;

 private:
  LogitCacheInfo info_;
  std::map<std::string, TeacherRows> rows_;
};

}  // namespace refinery::distill
