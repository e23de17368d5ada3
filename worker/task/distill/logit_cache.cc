#include "worker/task/runtime/torch.h"

#include "worker/task/distill/logit_cache.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/distill/tail_grid.h"

namespace refinery::distill {
namespace {

constexpr char kFormat[] = "refinery.logit_cache";
constexpr int64_t kVersion = 2;
constexpr char kTensorFile[] = "logits.safetensors";
constexpr char kIndexFile[] = "index.json";

// Positions per block when a teacher's logits are brought to float32.
constexpr int64_t kBlock = 128;

StatusOr<int64_t> IntegerOf(const nlohmann::json& json, const char* key, const std::string& where) {
  if (!json.is_object() || !json.contains(key) || !json[key].is_number_integer() || json[key].get<int64_t>() < 0) {
    return DataLoss(where, ": '", key, "' is missing or not a number >= 0; make the logit cache again");
  }
  return json[key].get<int64_t>();
}

StatusOr<std::string> StringOf(const nlohmann::json& json, const char* key, const std::string& where) {
  if (!json.is_object() || !json.contains(key) || !json[key].is_string()) {
    return DataLoss(where, ": '", key, "' is missing or not a string; make the logit cache again");
  }
  return json[key].get<std::string>();
}

StatusOr<nlohmann::json> ReadIndex(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  nlohmann::json index = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (index.is_discarded() || !index.is_object()) return DataLoss(path.string(), ": not a JSON object");
  RF_ASSIGN_OR_RETURN(const std::string format, StringOf(index, "format", path.string()));
  RF_ASSIGN_OR_RETURN(const int64_t version, IntegerOf(index, "version", path.string()));
  if (format != kFormat || version != kVersion) {
    return DataLoss(path.string(), ": is '", format, "' version ", version, ", wanted '", kFormat, "' version ",
                    kVersion, "; make the logit cache again");
  }
  const auto grid = index.find("inverse_temperatures");
  if (grid == index.end() || *grid != nlohmann::json(kInverseTemperatures)) {
    return DataLoss(path.string(), ": 'inverse_temperatures' is missing or not the grid of version ", kVersion,
                    "; make the logit cache again");
  }
  return index;
}

// key -> [begin, end) of the index; the ranges must lie in [0, tokens].
StatusOr<std::map<std::string, std::pair<int64_t, int64_t>>> ReadRows(const nlohmann::json& index, int64_t tokens,
                                                                      const std::string& where) {
  std::map<std::string, std::pair<int64_t, int64_t>> rows;
  if (!index.contains("rows") || !index["rows"].is_array()) return DataLoss(where, ": 'rows' is missing");
  for (const nlohmann::json& row : index["rows"]) {
    RF_ASSIGN_OR_RETURN(const std::string key, StringOf(row, "key", where));
    RF_ASSIGN_OR_RETURN(const int64_t begin, IntegerOf(row, "begin", where));
    RF_ASSIGN_OR_RETURN(const int64_t end, IntegerOf(row, "end", where));
    if (begin > end || end > tokens) {
      return DataLoss(where, ": row '", key, "' is [", begin, ", ", end, ") of ", tokens, " tokens");
    }
    if (!rows.emplace(key, std::make_pair(begin, end)).second) return DataLoss(where, ": row '", key, "' twice");
  }
  return rows;
}

StatusOr<at::Tensor> ReadTensor(const checkpoint::SafetensorsFile& file, const std::string& name, at::ScalarType type,
                                at::IntArrayRef shape, const std::string& where) {
  StatusOr<at::Tensor> tensor = file.Get(name);
  if (!tensor.ok()) return DataLoss(where, ": ", Message(tensor.status()));
  if (tensor->scalar_type() != type || tensor->sizes() != shape) {
    return DataLoss(where, ": tensor '", name, "' does not have the shape that ", kIndexFile, " names");
  }
  return tensor;
}

}  // namespace

StatusOr<std::shared_ptr<LogitCache>> LogitCache::Open(const std::filesystem::path& folder) {
  const std::filesystem::path index_path = folder / kIndexFile;
  const std::filesystem::path tensor_path = folder / kTensorFile;
  const std::string where = index_path.string();
  RF_ASSIGN_OR_RETURN(const nlohmann::json index, ReadIndex(index_path));
  auto cache = std::make_shared<LogitCache>();
  LogitCacheInfo& info = cache->info_;
  RF_ASSIGN_OR_RETURN(info.teacher_digest, StringOf(index, "teacher_digest", where));
  RF_ASSIGN_OR_RETURN(info.tokenizer_digest, StringOf(index, "tokenizer_digest", where));
  RF_ASSIGN_OR_RETURN(info.vocab_size, IntegerOf(index, "vocab_size", where));
  RF_ASSIGN_OR_RETURN(info.top_k, IntegerOf(index, "top_k", where));
  if (info.top_k < 1 || info.top_k > info.vocab_size) {
    return DataLoss(where, ": top_k is ", info.top_k, " of a vocabulary of ", info.vocab_size);
  }
  RF_ASSIGN_OR_RETURN(const int64_t tokens, IntegerOf(index, "tokens", where));
  RF_ASSIGN_OR_RETURN(const std::string wanted, StringOf(index, "logits_digest", where));
  RF_ASSIGN_OR_RETURN(cache->rows_, ReadRows(index, tokens, where));

  RF_ASSIGN_OR_RETURN(const std::string found, DigestOfFile(tensor_path));
  if (found != wanted) {
    return DataLoss(tensor_path.string(), ": has digest ", found, ", but ", kIndexFile, " names ", wanted,
                    "; the file is damaged or from another run");
  }
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(tensor_path));
  const std::string tensor_where = tensor_path.string();
  const int64_t k = info.top_k;
  RF_ASSIGN_OR_RETURN(cache->ids_, ReadTensor(*file, "ids", at::kInt, {tokens, k}, tensor_where));
  RF_ASSIGN_OR_RETURN(cache->logits_, ReadTensor(*file, "logits", at::kFloat, {tokens, k}, tensor_where));
  RF_ASSIGN_OR_RETURN(cache->tail_logits_, ReadTensor(*file, "tail_logits", at::kFloat, {tokens}, tensor_where));
  RF_ASSIGN_OR_RETURN(cache->tail_log_partitions_,
                      ReadTensor(*file, "tail_log_partitions", at::kFloat, {tokens, kGridSize}, tensor_where));
  if (cache->ids_.numel() > 0 &&
      (cache->ids_.min().item<int64_t>() < 0 || cache->ids_.max().item<int64_t>() >= info.vocab_size)) {
    return DataLoss(tensor_where, ": a token id lies outside the vocabulary of ", info.vocab_size);
  }
  return cache;
}

StatusOr<TeacherRows> LogitCache::Get(const std::string& key) const {
  const auto found = rows_.find(key);
  if (found == rows_.end()) {
    return NotFound("logit cache: no row for example ", key, "; it was made from other examples or another tokenizer");
  }
  const auto [begin, end] = found->second;
  return TeacherRows{.ids = ids_.narrow(0, begin, end - begin),
                     .logits = logits_.narrow(0, begin, end - begin),
                     .tail_logits = tail_logits_.narrow(0, begin, end - begin),
                     .tail_log_partitions = tail_log_partitions_.narrow(0, begin, end - begin)};
}

LogitCacheWriter::LogitCacheWriter(const LogitCacheInfo& info) : info_(info) {
  TORCH_CHECK(info_.vocab_size > 0 && info_.top_k > 0, "LogitCacheWriter: vocab_size and top_k must be positive");
  info_.top_k = std::min(info_.top_k, info_.vocab_size);
}

void LogitCacheWriter::Add(const std::string& key, const at::Tensor& logits) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) == info_.vocab_size, "LogitCacheWriter: logits ", logits.sizes(),
              " for a vocabulary of ", info_.vocab_size);
  std::vector<at::Tensor> ids, values, partitions;
  for (int64_t begin = 0; begin < logits.size(0); begin += kBlock) {
    const int64_t count = std::min(kBlock, logits.size(0) - begin);
    const at::Tensor block = logits.narrow(0, begin, count).to(at::kFloat);
    const at::Tensor partition = block.logsumexp({1}, /*keepdim=*/true);
    const auto [top, top_ids] = block.topk(info_.top_k, 1, /*largest=*/true, /*sorted=*/true);
    // The rest is summed by itself: as 1 - sum of the entries it would drown in rounding errors.
    const at::Tensor rest = block.scatter(1, top_ids, -std::numeric_limits<double>::infinity());
    ids.push_back(top_ids.to(at::kCPU, at::kInt));
    values.push_back((top - partition).to(at::kCPU));
    partitions.push_back(TailLogPartitions(rest.sub_(partition)).to(at::kCPU));
  }
  if (ids.empty()) return;
  const at::Tensor grid = at::cat(partitions);
  rows_[key] = {.ids = at::cat(ids),
                .logits = at::cat(values),
                .tail_logits = grid.select(1, kPlainPoint).contiguous(),
                .tail_log_partitions = grid};
}

Status LogitCacheWriter::Write(const std::filesystem::path& folder) const {
  std::vector<at::Tensor> ids = {at::empty({0, info_.top_k}, at::kInt)};
  std::vector<at::Tensor> values = {at::empty({0, info_.top_k}, at::kFloat)};
  std::vector<at::Tensor> tails = {at::empty({0}, at::kFloat)};
  std::vector<at::Tensor> partitions = {at::empty({0, kGridSize}, at::kFloat)};
  nlohmann::json rows = nlohmann::json::array();
  int64_t tokens = 0;
  for (const auto& [key, row] : rows_) {
    const int64_t count = row.ids.size(0);
    rows.push_back({{"key", key}, {"begin", tokens}, {"end", tokens + count}});
    tokens += count;
    ids.push_back(row.ids);
    values.push_back(row.logits);
    tails.push_back(row.tail_logits);
    partitions.push_back(row.tail_log_partitions);
  }
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(folder / kTensorFile,
                                                  {{"ids", at::cat(ids)},
                                                   {"logits", at::cat(values)},
                                                   {"tail_logits", at::cat(tails)},
                                                   {"tail_log_partitions", at::cat(partitions)}}));
  RF_ASSIGN_OR_RETURN(const std::string digest, DigestOfFile(folder / kTensorFile));
  const nlohmann::json index = {{"format", kFormat},
                                {"version", kVersion},
                                {"teacher_digest", info_.teacher_digest},
                                {"tokenizer_digest", info_.tokenizer_digest},
                                {"vocab_size", info_.vocab_size},
                                {"top_k", info_.top_k},
                                {"inverse_temperatures", kInverseTemperatures},
                                {"tokens", tokens},
                                {"logits_digest", digest},
                                {"rows", rows}};
  return WriteFileAtomically(folder / kIndexFile, index.dump(1) + "\n");
}

}  // namespace refinery::distill
