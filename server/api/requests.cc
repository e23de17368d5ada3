#include "server/api/requests.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <cctype>

#include "common/digest.h"
#include "common/error_details.h"

namespace refinery::api {
namespace {

constexpr size_t kMaxIdBytes = 64;
constexpr size_t kDigestDigits = 32;

// The same for equal requests in any process: map fields in one order.
std::string BytesOf(const google::protobuf::Message& message) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  google::protobuf::io::CodedOutputStream coded(&stream);
  coded.SetSerializationDeterministic(true);
  RF_CHECK(message.SerializeToCodedStream(&coded));
  coded.Trim();
  return bytes;
}

}  // namespace

Status CheckRequestId(const std::string& id) {
  const bool good = std::ranges::all_of(id, [](unsigned char c) { return std::isalnum(c) != 0 || c == '-' || c == '_'; });
  if (good && id.size() <= kMaxIdBytes) return absl::OkStatus();
  return WithField(InvalidArgument("request_id must be at most ", kMaxIdBytes, " letters, digits, '-' and '_'; a UUID is best"),
                   "request_id");
}

v1::RequestMark MakeMark(const std::string& caller, const std::string& id, std::string_view method,
                         const google::protobuf::Message& content) {
  v1::RequestMark mark;
  if (id.empty()) return mark;
  mark.set_key(Join(caller, "/", id));
  const std::string digest = DigestOf(Join(method, "\n", BytesOf(content)));
  mark.set_digest(digest.substr(digest.find(':') + 1, kDigestDigits));
  return mark;
}

}  // namespace refinery::api
