#include "client/render/json.h"

#include <google/protobuf/util/json_util.h>

#include "common/status.h"

namespace refinery::client {

std::string ToJson(const google::protobuf::Message& message, JsonForm form) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  options.add_whitespace = form == JsonForm::kPretty;
  std::string text;
  RF_CHECK(google::protobuf::util::MessageToJsonString(message, &text, options).ok());
  if (text.empty() || text.back() != '\n') text += '\n';
  return text;
}

}  // namespace refinery::client
