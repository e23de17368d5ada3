#include "server/api/list.h"

#include <openssl/crypto.h>
#include <openssl/hmac.h>
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/escaping.h"
#include "common/digest.h"
#include "common/error_details.h"
#include "common/files.h"
#include "server/api/filter.h"
#include "server/api/visible.h"

namespace refinery::api {
namespace {

constexpr int32_t kDefaultPageSize = 50;
constexpr int32_t kMaxPageSize = 500;
constexpr size_t kMaxTokenBytes = 8192;
constexpr size_t kSignatureBytes = 16;

std::string Sign(const std::string& key, const std::string& text) {
  unsigned char mac[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()), reinterpret_cast<const unsigned char*>(text.data()), text.size(), mac,
       &size);
  return std::string(reinterpret_cast<char*>(mac), kSignatureBytes);
}

// Where a page ended.
struct Position {
  std::vector<SortValue> values;
  uint64_t created_seq = 0;
};

// What must be the same from page to page.
std::string Bound(const v1::ListJobsRequest& request, const security::Principal& principal) {
  nlohmann::json parts = {request.filter(), request.order_by(), request.tenant(), principal.name, principal.tenant};
  return DigestOf(parts.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

std::string MakeToken(const Position& position, const std::string& bound, const std::string& key) {
  nlohmann::json values = nlohmann::json::array();
  for (const SortValue& value : position.values) values.push_back({value.number, absl::BytesToHexString(value.text)});
  const std::string text = nlohmann::json({bound, position.created_seq, values}).dump();
  return absl::WebSafeBase64Escape(Sign(key, text) + text);
}

StatusOr<Position> ReadToken(const std::string& token, const std::string& bound, const std::string& key) {
  const Status wrong = WithField(InvalidArgument("page_token does not belong to this list: it must come from the page before, with "
                                                 "the same filter, order_by and tenant; start again without one"),
                                 "page_token");
  std::string raw;
  if (token.size() > kMaxTokenBytes || !absl::WebSafeBase64Unescape(token, &raw) || raw.size() < kSignatureBytes) return wrong;
  const std::string text = raw.substr(kSignatureBytes);
  if (CRYPTO_memcmp(Sign(key, text).data(), raw.data(), kSignatureBytes) != 0) return wrong;
  const nlohmann::json parts = nlohmann::json::parse(text, nullptr, false);  // ours, as the signature says
  if (parts.is_discarded() || parts.at(0).get<std::string>() != bound) return wrong;
  Position position{.created_seq = parts.at(1).get<uint64_t>()};
  for (const nlohmann::json& value : parts.at(2)) {
    position.values.push_back({.number = value.at(0).get<double>(), .text = absl::HexStringToBytes(value.at(1).get<std::string>())});
  }
  return position;
}

// Whether a comes before b; jobs that are equal in every field come newest first.
bool Before(const Position& a, const Position& b, const std::vector<SortKey>& order) {
  const int sign = Compare(a.values, b.values, order);
  return sign != 0 ? sign < 0 : a.created_seq > b.created_seq;
}

}  // namespace

StatusOr<std::string> LoadPageKey(const std::filesystem::path& state) {
  constexpr size_t kKeyBytes = 46;  // of NewToken
  const std::filesystem::path path = state / "page_key";
  StatusOr<std::string> key = ReadFile(path, 4096);
  if (key.ok() && key->size() == kKeyBytes) return key;
  RF_ASSIGN_OR_RETURN(const std::string made, NewToken());
  const mode_t before = umask(0077);
  const Status status = WriteFileAtomically(path, made);
  umask(before);
  RF_RETURN_IF_ERROR(status);
  return made;
}

Status ListJobs(const jobs::State& state, const security::Principal& principal, const v1::ListJobsRequest& request,
                const std::string& page_key, const jobs::Now& now, v1::ListJobsResponse* response) {
  if (request.page_size() < 0) {
    return WithField(InvalidArgument("page_size must not be negative, is ", request.page_size()), "page_size");
  }
  const size_t page_size = request.page_size() == 0 ? kDefaultPageSize : std::min(request.page_size(), kMaxPageSize);
  const StatusOr<JobPredicate> filter = ParseFilter(request.filter());
  if (!filter.ok()) return WithField(filter.status(), "filter");
  const StatusOr<std::vector<SortKey>> order = ParseOrder(request.order_by());
  if (!order.ok()) return WithField(order.status(), "order_by");
  const std::string bound = Bound(request, principal);
  Position after{.created_seq = UINT64_MAX};
  const bool is_first = request.page_token().empty();
  if (!is_first) {
    RF_ASSIGN_OR_RETURN(after, ReadToken(request.page_token(), bound, page_key));
  }

  std::vector<std::pair<Position, const jobs::JobState*>> found;
  // Newest first; without another order the page is complete as soon as it is full.
  for (auto id = state.order.rbegin(); id != state.order.rend(); ++id) {
    const jobs::JobState& job = state.jobs.at(*id);
    const std::string tenant = TenantOf(job);
    if (!principal.MaySee(tenant) || (!request.tenant().empty() && request.tenant() != tenant)) continue;
    if (order->empty() && job.created_seq >= after.created_seq) continue;
    if (!(*filter)(job)) continue;
    Position position{.values = SortValues(job, *order), .created_seq = job.created_seq};
    if (!is_first && !Before(after, position, *order)) continue;
    found.emplace_back(std::move(position), &job);
    if (order->empty() && found.size() > page_size) break;
  }
  const size_t shown = std::min(found.size(), page_size);
  const auto middle = found.begin() + static_cast<std::ptrdiff_t>(shown);
  std::partial_sort(found.begin(), middle, found.end(),
                    [&](const auto& a, const auto& b) { return Before(a.first, b.first, *order); });
  for (size_t i = 0; i < shown; ++i) *response->add_jobs() = ShowJob(*found[i].second, false, now);
  if (found.size() > shown) response->set_next_page_token(MakeToken(found[shown - 1].first, bound, page_key));
  return absl::OkStatus();
}

}  // namespace refinery::api
