// client/render/json.h
//
// The output of -o json: protobuf's JSON with the fields' original names and with every field present, so that the schema is
// the .proto files and does not depend on values.

#pragma once

#include <google/protobuf/message.h>

#include <string>

namespace refinery::client {

enum class JsonForm { kPretty, kLine };
std::string ToJson(const google::protobuf::Message& message, JsonForm form = JsonForm::kPretty);

}  // namespace refinery::client
