// common/yaml_message.h
//
// YAML -> protobuf message by reflection: the message is the schema. Mappings become messages (or map fields),
// sequences become repeated fields, scalars are parsed by the field's type. Nothing is guessed: an unknown key, a key
// that stands twice, a value of the wrong type or two members of a oneof are errors.
//
// Errors: INVALID_ARGUMENT "NAME:LINE: ..." that says which field, what was expected and, for an unknown key, the
// nearest known one. Threads: no shared state.

#pragma once

#include <google/protobuf/message.h>

#include <map>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery {

// Where things stood in the text, for messages that are made after parsing.
struct YamlPlaces {
  std::map<std::string, int> lines;  // field path ("distill.lora.rank", "search.parameters[1].min") -> line, from 1
  // Scalar fields that were written with the value that proto3 cannot tell from "unset" (0, 0.0, "", false).
  std::vector<std::string> written_zeros;

  // The line of `path` or of its nearest parent that was written; 0 when none was.
  int LineOf(const std::string& path) const;
};

// Fills `message` (which should be empty) from `text`; `name` stands for the file in errors.
Status YamlToMessage(const std::string& text, const std::string& name, google::protobuf::Message* message,
                     YamlPlaces* places);

// `message` as YAML in field order, without unset fields. YamlToMessage reads it back to an equal message.
std::string MessageToYaml(const google::protobuf::Message& message);

// Of `candidates`, the one nearest to `word` by edit distance (insertions, deletions, substitutions, swaps of
// neighbours), or
// "" when none is near: more than a third of the longer word would have to change.
std::string Nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace refinery
